"""The default checkpoint, carried by the package. Installed as `modeling_lumina_mgpt.checkpoints`."""

from pathlib import Path


def default_checkpoint() -> Path:
    """Folder of the checkpoint that is used when none is named; the same in a checkout and in an installed wheel.

    Raises:
        FileNotFoundError: if the folder was left out of this installation.
    """
    folder = Path(__file__).parent / "lumina-mgpt-tabletop"
    if not folder.is_dir():
        raise FileNotFoundError(f"no default checkpoint at {folder}; name another one, for example with --model")
    return folder

"""The default checkpoint, carried by the package. Installed as `modeling_lumina_mgpt.checkpoints`."""

import os
import shutil
import warnings
from importlib.resources import files
from pathlib import Path


def default_checkpoint() -> Path:
    """Folder of the checkpoint that is used when none is named; the same in a checkout and in an installed wheel.

    Warns where its links to code were checked out as text: then only this package can load it.

    Raises:
        FileNotFoundError: if the folder was left out of this installation.
    """
    folder = Path(__file__).parent / "lumina-mgpt-tabletop"
    if not folder.is_dir():
        raise FileNotFoundError(f"no default checkpoint at {folder}; name another one, for example with --model")
    if any(path.read_text(encoding="utf-8").startswith("../") for path in folder.rglob("*.py")):
        command = f"python -c \"from {__name__} import link_code; link_code(r'{folder}')\""
        warnings.warn(f"{folder}: links to code became text on this platform; to repair, run {command}", stacklevel=2)
    return folder


def link_code(folder: str | os.PathLike) -> None:
    """Replaces a checkpoint's code files by links to this package's own; by copies where there are no links."""
    sources = [Path(str(files(name))) for name in ("modeling_lumina_mgpt", "modeling_lumina_mgpt.pipelines")]
    folder = Path(folder).resolve()
    for path in (*folder.glob("*.py"), *folder.glob("*/root_*.py")):
        name = path.relative_to(folder)
        source = next(place / name for place in sources if (place / name).is_file())
        path.unlink()
        try:
            path.symlink_to(os.path.relpath(source, path.parent))
        except OSError:
            shutil.copyfile(source, path)

"""Where checkpoints are: the default one, carried by the package. Installed as `modeling_lumina_mgpt.checkpoints`."""

import os
import re
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


def existing(name: str, what: str, others: str = "") -> str:
    """`name` again, of something that is there or may be a repo; without asking the Hub for what is a folder's name.

    Args:
        what: the argument's name, and `others`: what else it accepts, for the error.

    Raises:
        ValueError: if it is neither; also if only the part before the slash is there, as of runs/no-such-run.
    """
    path = Path(name)
    if path.exists():
        return name
    if path.parent.is_dir() and path.parent != Path():
        raise ValueError(f"{what} {name!r}: {path.parent} has no {path.name}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(f"{what} {name!r}: neither {others}a folder nor a repo NAMESPACE/NAME")
    return name


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

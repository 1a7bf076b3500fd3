"""Files that are whole or not there, whatever happens to the process that writes them."""

import os
import time
from pathlib import Path
from socket import gethostname

import psutil


def write_whole(path: Path, content: bytes) -> None:
    """A file that appears when it is whole and on the disk; what a killed process has left of it goes."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        if not _is_written(part):
            part.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.{gethostname()}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _is_written(part: Path) -> bool:
    """Whether somebody may still write this temporary file, which takes a second or so."""
    *_, pid, _ = part.name.split(".")
    try:
        if f".{gethostname()}.{pid}." in part.name and psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
            return False  # killed, and its parent has not asked for it yet
        return time.time() - part.stat().st_mtime < 60
    except psutil.AccessDenied:  # another user's
        return True
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False

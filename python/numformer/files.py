"""Files that are there whole or not at all: written aside, synced, renamed."""
import contextlib
import os
from pathlib import Path

__all__ = ["replace_file"]


def replace_file(path, content):
    """Make `content` the file at `path`: after a kill at any point it holds the old or the new.

    Parameters
    ----------
    path : str or Path
        Its folder is made where it is missing.
    content : bytes, str, or callable
        A callable is given the open binary file to write to.

    Raises
    ------
    OSError
        Disk full, no permission ...: nothing half-written is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise

"""Files that are there whole or not at all: written aside, synced, renamed."""
import contextlib
import json
import os
import threading
from pathlib import Path

import numpy as np

__all__ = ["json_text", "replace_file", "state_bytes"]


def json_text(value, **options):
    """`value` as JSON, NumPy's numbers and arrays as numbers and lists."""
    return json.dumps(value, default=lambda x: x.tolist(), **options)


def state_bytes(state):
    """`state` as JSON in an array of bytes: that of any bit generator, of which some hold arrays."""
    return np.frombuffer(json_text(state).encode(), np.uint8)


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
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
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

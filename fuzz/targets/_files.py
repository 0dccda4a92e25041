"""Bytes as a file: most readers take a path."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

_SHM = Path("/dev/shm")  # memory: a disk would be the slowest part of fuzzing


def scratch() -> Path:
    """A folder of this process, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="steelyard-fuzz-", dir=_SHM if _SHM.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def put(path: Path, data: bytes) -> Path:
    """`path`, holding `data`."""
    path.write_bytes(data)
    return path

"""Files that are whole or absent, and paths that cannot escape."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from steelyard.base.errors import FormatError, SteelyardError


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` so that `path` holds either its old content or all of the new one, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def new_file(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary file's path beside `path`; on success it is fsynced and renamed to `path`, on failure removed.

    For files too large to hold (else `write_atomic`). Raises SteelyardError where `path` exists already.
    """
    if path.exists() or path.is_symlink():
        raise SteelyardError(f"{path} exists already: remove it or choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.rename(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def new_folder(path: Path, *, mode: int = 0o755) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is fsynced and renamed to `path`, on failure removed.

    Raises SteelyardError where `path` exists already: a finished folder is never overwritten.
    """
    if path.exists() or path.is_symlink():
        raise SteelyardError(f"{path} exists already: remove it or choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    temporary.chmod(mode)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            elif file.is_dir() and not file.is_symlink():
                fsync_folder(file)
        fsync_folder(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path`, a file made for that where absent, alone among processes; waits for whoever has it.

    Its content is left, and a link is refused (FormatError): who may write beside it could point it at any file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FormatError(f"{path}: is a symbolic link, where a lock belongs: remove it") from error
        raise
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def open_regular(path: Path) -> BufferedReader:
    """Open a stranger's file for reading. Raises FormatError where it is a link, pipe, device or folder, at once: a
    pipe would block for ever, a device never end. Other failures (absent, not permitted) are OSError, as of `open`.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FormatError(f"{path}: is a symbolic link: copy the file itself") from error
        if error.errno == errno.ENXIO:  # a socket
            raise FormatError(f"{path}: is not a plain file: remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FormatError(f"{path}: is not a plain file: remove it")
    return os.fdopen(handle, "rb")


def read_bounded(path: Path, limit: int) -> bytes:
    """A stranger's plain file. Raises FormatError where it has over `limit` bytes, or is none (`open_regular`)."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FormatError(f"{path}: is over {limit:,} bytes, more than such a file may have")
    return data


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, refused (FormatError) where it is absolute, holds `..`, or leaves `root` through a link."""
    candidate = Path(relative)
    if candidate.is_absolute() or ".." in candidate.parts or "\\" in relative or "\x00" in relative or not relative:
        raise FormatError(f"{relative!r}: a path in {root} must be relative and stay inside it")
    path = root / candidate
    if not path.resolve().is_relative_to(root.resolve()):
        raise FormatError(f"{relative!r}: leaves {root} through a symbolic link")
    return path

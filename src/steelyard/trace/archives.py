"""The raw storages of a PyTorch checkpoint (`.bin`, `.pt`), hashed without unpickling anything.

Since version 1.6 such a file is a zip whose members `*/data/0`, `*/data/1`... are the tensors' bytes, uncompressed,
beside a pickle that is never opened here. The bytes alone are enough for the digest table (`digests.Table`).

    >>> [digest for member, size, digest in storages(Path("pytorch_model.bin"))]
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from steelyard.base.errors import FormatError
from steelyard.base.files import open_regular
from steelyard.model.headers import MAX_TENSORS
from steelyard.trace.tensors import real_path

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_DIRECTORY = 16 << 20  # bytes of the zip's table of members
_CHUNK = 4 << 20
_STORAGE = re.compile(r"(?:[^/]+/)*data/\d+")


def storages(path: Path) -> Iterator[tuple[str, int, str]]:
    """(member, bytes, SHA-256) of each storage in the checkpoint.

    Raises FormatError where the file is no zip (a bare pickle), its table is broken or too long, members are
    compressed, encrypted or overlap, or there is no storage.
    """
    real = real_path(path)
    with open_regular(real) as file:
        size = os.fstat(file.fileno()).st_size
        _check_directory(path, file.read(4), size, real)
        try:
            with zipfile.ZipFile(file) as archive:
                members = [one for one in archive.infolist() if _STORAGE.fullmatch(one.filename)]
                if not members:
                    raise FormatError(f"{path}: a zip without tensors' storages: not a PyTorch checkpoint")
                if any(one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 1 for one in members):
                    raise FormatError(f"{path}: its storages are compressed or encrypted, which PyTorch never does")
                if sum(one.file_size for one in members) > size:
                    raise FormatError(f"{path}: its members claim more bytes than the file has: they overlap")
                for one in members:
                    yield one.filename, one.file_size, _hash(archive, one)
        except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError, OverflowError, struct.error) as error:
            raise FormatError(f"{path}: a broken zip ({type(error).__name__}): download it again") from error


def _check_directory(path: Path, start: bytes, size: int, real: Path) -> None:
    """Bound what `zipfile` will read of the table of members, which it holds in memory."""
    if start[:4] != b"PK\x03\x04":
        raise FormatError(f"{path}: a pickle outside a zip: it cannot be compared without running it")
    with open_regular(real) as file:
        file.seek(max(0, size - 66_000))
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise FormatError(f"{path}: a zip cut short: download it again")
    count = int.from_bytes(tail[at + 10 : at + 12], "little")
    length = int.from_bytes(tail[at + 12 : at + 16], "little")
    if (far := tail.rfind(b"PK\x06\x06", 0, at)) >= 0 and len(tail) >= far + 56:  # zip64
        count = int.from_bytes(tail[far + 32 : far + 40], "little")
        length = int.from_bytes(tail[far + 40 : far + 48], "little")
    if count > 4 * MAX_TENSORS or length > MAX_DIRECTORY:
        raise FormatError(f"{path}: claims {count:,} members, more than any model has")


def _hash(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    state = hashlib.sha256()
    with archive.open(member) as data:
        while chunk := data.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()

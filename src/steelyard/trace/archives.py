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
from typing import BinaryIO

from steelyard.base.errors import FormatError
from steelyard.base.files import open_regular
from steelyard.model.headers import MAX_TENSORS
from steelyard.trace.tensors import real_path

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_DIRECTORY = 16 << 20  # bytes of the zip's table of members
_CHUNK = 4 << 20
_END, _LOCATOR64, _END64 = 22, 20, 56  # bytes of the records at a zip's end, before its comment
_MOST_COMMENT = 65_536  # bytes, as `zipfile` looks for them
_STORAGE = re.compile(r"(?:[^/]+/)*data/\d+")


def storages(path: Path) -> Iterator[tuple[str, int, str]]:
    """(member, bytes, SHA-256) of each storage in the checkpoint.

    Raises FormatError where the file is no zip (a bare pickle), its table is broken or too long, members are
    compressed, encrypted or overlap, or there is no storage; and where two readers could take two tables for its.
    """
    real = real_path(path)
    with open_regular(real) as file:
        size = os.fstat(file.fileno()).st_size
        _check_directory(path, file, size)
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


def _check_directory(path: Path, file: BinaryIO, size: int) -> None:
    """Bound the table of members that `zipfile` will hold in memory.

    Its length is read from the records that `zipfile` reads. That finds them by place, other readers and later versions
    by the addresses in them: an archive in which the two differ is refused, and one with two ends.
    """
    if file.read(4) != b"PK\x03\x04":
        raise FormatError(f"{path}: a pickle outside a zip: it cannot be compared without running it")
    begin = max(0, size - _MOST_COMMENT - _END - _LOCATOR64 - _END64)
    file.seek(begin)
    tail = file.read(size - begin)
    at = tail.find(b"PK\x05\x06")
    if at < 0 or len(tail) < at + _END:
        raise FormatError(f"{path}: a zip cut short: download it again")
    if tail.find(b"PK\x05\x06", at + 1) >= 0:
        raise FormatError(f"{path}: a zip with two ends, which PyTorch never writes: convert it to safetensors")
    count, length = struct.unpack_from("<HL", tail, at + 10)
    table = at
    if tail[max(0, at - _LOCATOR64) : at].startswith(b"PK\x06\x07"):
        table = at - _LOCATOR64 - _END64
        if table < 0 or not _is_end64(tail, table, begin):
            raise FormatError(f"{path}: a zip whose end is not where it says: download it again")
        far_count, far_length = struct.unpack_from("<2Q", tail, table + 32)
        if count not in (far_count, 0xFFFF) or length not in (far_length, 0xFFFFFFFF):
            raise FormatError(f"{path}: a zip with two tables of members, which PyTorch never writes: convert it")
        length = far_length
    members = 0
    if length <= MAX_DIRECTORY:
        file.seek(max(0, begin + table - length))
        members = file.read(length).count(b"PK\x01\x02")  # `zipfile` does not heed the number that is claimed
    if length > MAX_DIRECTORY or members > 4 * MAX_TENSORS:
        raise FormatError(f"{path}: claims {length:,} bytes of members' names, more than any model has")


def _is_end64(tail: bytes, at: int, begin: int) -> bool:
    """Whether a zip64 end record lies there, of its least length, and the locator after it says so; one disk."""
    kind, rest = struct.unpack_from("<4sQ", tail, at)
    disk, place, disks = struct.unpack_from("<LQL", tail, at + _END64 + 4)
    return kind == b"PK\x06\x06" and rest == _END64 - 12 and (disk, place) == (0, begin + at) and disks <= 1


def _hash(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    state = hashlib.sha256()
    with archive.open(member) as data:
        while chunk := data.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()

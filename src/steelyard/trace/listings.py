"""Copies that are not here: a Hub repository's listing and a torrent, compared by the digests they carry.

A listing is the JSON of the Hub's `api/models/ORG/NAME?blobs=true` or `.../tree/main`: large files have a SHA-256. A
torrent (BEP 3, https://www.bittorrent.org/beps/bep_0003.html) has SHA-1 digests of pieces of all its files laid end to
end; version 2 (BEP 52) has the root of a SHA-256 tree over 16 KiB blocks of each file. Our bytes are hashed the same
way. Equal digests prove a copy; other digests prove nothing, for any cast changes them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from steelyard.base.errors import FormatError
from steelyard.base.files import open_regular, read_bounded
from steelyard.base.strict import strict_json
from steelyard.model.headers import MAX_ENTRIES, MAX_JSON, MAX_SIZE, quote

MAX_TORRENT = 32 << 20
_BLOCK = 16 << 10  # a leaf of a version 2 tree, BEP 52
_MAX_DEPTH = 16
_MAX_VALUES = 500_000
_NAMED, _PATH, _OID = (re.compile(rb'"%s"\s*:\s*"' % word) for word in (b"rfilename", b"path", b"oid"))
_START = 64 << 10


@dataclass(frozen=True, slots=True)
class Listed:
    """A file that a listing names. `sha256` is None for a small one, which the Hub keeps in git."""

    path: str
    size: int | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class TorrentFile:
    """A file in a torrent: `start` is where it begins among all files laid end to end (version 1)."""

    path: str
    start: int
    length: int
    root: bytes | None


@dataclass(frozen=True)
class Torrent:
    """A torrent's claims. `pieces` are SHA-1 digests (20 bytes each) of version 1; empty in one of version 2 alone.
    `total` is the length of all its files."""

    name: str
    piece_length: int
    pieces: Sequence[bytes] = field(repr=False)
    files: Sequence[TorrentFile]
    total: int


def read_listing(path: Path) -> list[Listed]:
    """The files of a Hub listing. Raises FormatError where the JSON is not one."""
    value = strict_json(read_bounded(path, MAX_JSON), str(path), limit=MAX_JSON)
    entries = value.get("siblings") if isinstance(value, dict) else value
    if not isinstance(entries, list) or len(entries) > MAX_ENTRIES:
        raise FormatError(f"{path}: siblings: must be a list of files, as the Hub's API gives it")
    found = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise FormatError(f"{path}: siblings: must be a list of objects, as the Hub's API gives it")
        if entry.get("type") == "directory":
            continue
        name = entry.get("rfilename", entry.get("path"))
        if not isinstance(name, str):
            raise FormatError(f"{path}: a file without a name (rfilename or path)")
        stored = entry.get("lfs")
        lfs: Mapping[str, Any] = stored if isinstance(stored, dict) else {}
        digest = lfs.get("sha256", lfs.get("oid"))
        size = lfs.get("size", entry.get("size"))
        valid = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)
        found.append(Listed(name, size if type(size) is int else None, digest if valid else None))
    return found


def is_listing(path: Path) -> bool:
    """Whether a JSON file in a tree is worth reading as a listing: its first 64 KiB name files as the Hub's API does.

    Trees hold many other JSON files (settings, data, vocabularies, in which the same words are tokens), which are not
    suspects.
    """
    with open_regular(path) as data:
        start = data.read(_START)
    return bool(_NAMED.search(start)) or (bool(_PATH.search(start)) and bool(_OID.search(start)))


# --- torrents ---------------------------------------------------------------------------------------------------------


class _Bencode:
    """A bounded parser: depth, number of values, and no integer or string that is not in its one spelling."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at, self.values = path, data, 0, 0

    def refuse(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: not a torrent: {what} at byte {self.at:,}: download it again")

    def value(self, depth: int = 0) -> Any:
        self.values += 1
        if depth > _MAX_DEPTH or self.values > _MAX_VALUES:
            raise self.refuse("nested too deeply, or too many values")
        kind = self.data[self.at : self.at + 1]
        if kind == b"i":
            return self.number()
        if kind.isdigit():
            return self.string()
        if kind == b"l":
            self.at += 1
            items = []
            while self.data[self.at : self.at + 1] != b"e":
                items.append(self.value(depth + 1))
            self.at += 1
            return items
        if kind == b"d":
            self.at += 1
            found: dict[bytes, Any] = {}
            while self.data[self.at : self.at + 1] != b"e":
                key = self.string()
                if key in found:
                    raise self.refuse("a key given twice")
                found[key] = self.value(depth + 1)
            self.at += 1
            return found
        raise self.refuse("no value")

    def number(self) -> int:
        match = re.compile(rb"i(0|-?[1-9]\d{0,18})e").match(self.data, self.at)
        if match is None:
            raise self.refuse("a broken number")
        self.at = match.end()
        return int(match[1])

    def string(self) -> bytes:
        match = re.compile(rb"(0|[1-9]\d{0,9}):").match(self.data, self.at)
        if match is None or int(match[1]) > len(self.data) - match.end():
            raise self.refuse("a broken string")
        self.at = match.end() + int(match[1])
        return self.data[match.end() : self.at]


def read_torrent(path: Path) -> Torrent:
    """The torrent's files and digests. Raises FormatError where it is broken, too large, or its sizes do not add up."""
    parser = _Bencode(path, read_bounded(path, MAX_TORRENT))
    value = parser.value()
    if parser.at != len(parser.data):
        raise parser.refuse("something follows the end")
    info = value.get(b"info") if isinstance(value, dict) else None
    if not isinstance(info, dict):
        raise FormatError(f"{path}: not a torrent: it has no info")
    piece_length = _size(path, info.get(b"piece length"))
    if not _BLOCK <= piece_length <= 1 << 30:
        raise FormatError(f"{path}: a piece length of {piece_length:,} bytes, which no torrent has")
    name = _text(path, info.get(b"name"))
    pieces = info.get(b"pieces", b"")
    if not isinstance(pieces, bytes) or len(pieces) % 20:
        raise FormatError(f"{path}: pieces: must be digests of 20 bytes each")
    files = _files(path, info, name) if pieces else _tree(path, info.get(b"file tree"), "", 0)
    total = sum(one.length for one in files)
    if pieces and len(pieces) // 20 != -(-total // piece_length):
        raise FormatError(f"{path}: {len(pieces) // 20:,} pieces do not make the {total:,} bytes of its files")
    if not files:
        raise FormatError(f"{path}: names no file")
    return Torrent(name, piece_length, [pieces[at : at + 20] for at in range(0, len(pieces), 20)], files, total)


def _size(path: Path, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise FormatError(f"{path}: an impossible length {quote(value)}")
    return value


def _text(path: Path, value: Any) -> str:
    if not isinstance(value, bytes):
        raise FormatError(f"{path}: a name that is no text")
    return value.decode("utf-8", "replace")


def _files(path: Path, info: Mapping[bytes, Any], name: str) -> list[TorrentFile]:
    if b"length" in info:
        return [TorrentFile(name, 0, _size(path, info[b"length"]), None)]
    listed = info.get(b"files")
    if not isinstance(listed, list) or len(listed) > MAX_ENTRIES:
        raise FormatError(f"{path}: files: must be a list")
    found, at = [], 0
    for entry in listed:
        parts = entry.get(b"path") if isinstance(entry, dict) else None
        if not isinstance(parts, list):
            raise FormatError(f"{path}: files: a file without a path")
        length = _size(path, entry.get(b"length"))
        found.append(TorrentFile("/".join(_text(path, part) for part in parts), at, length, None))
        at += length
    return found


def _tree(path: Path, tree: Any, prefix: str, depth: int) -> list[TorrentFile]:
    if not isinstance(tree, dict):
        raise FormatError(f"{path}: neither pieces nor a file tree")
    found = []
    for key, value in tree.items():
        if key == b"" and isinstance(value, dict):
            root = value.get(b"pieces root")
            valid = root if isinstance(root, bytes) and len(root) == 32 else None
            found.append(TorrentFile(prefix.strip("/"), 0, _size(path, value.get(b"length")), valid))
        else:
            found += _tree(path, value, f"{prefix}/{_text(path, key)}", depth + 1)
    return found


def matching_pieces(torrent: Torrent, file: TorrentFile, ours: Path, limit: int) -> tuple[int, int]:
    """(equal, compared) pieces that lie wholly inside `file`, against our file of the same length.

    Reads at most `limit` bytes of ours (one piece at least): pieces spread evenly over the file. Left out is what an
    unrelated model of these shapes has as well: pieces in our header, or of one byte repeated. Nothing where the
    lengths differ.
    """
    size = torrent.piece_length
    with open_regular(ours) as data:
        if os.fstat(data.fileno()).st_size != file.length or not torrent.pieces:
            return 0, 0
        first, last = -(-(file.start + _header(data, ours)) // size), (file.start + file.length) // size
        if file.start + file.length == torrent.total:
            last = len(torrent.pieces)  # the last piece of all is as long as what is left
        count = min(last - first, max(1, limit // size))
        chosen = sorted({first + index * (last - first) // count for index in range(count)}) if count > 0 else []
        equal = compared = 0
        for piece in chosen:
            data.seek(piece * size - file.start)
            part = data.read(size)
            if part.count(part[:1]) < len(part):
                compared += 1
                equal += hashlib.sha1(part, usedforsecurity=False).digest() == torrent.pieces[piece]
    return equal, compared


def _header(data: BinaryIO, path: Path) -> int:
    """Bytes of our file before its tensors."""
    return 8 + int.from_bytes(data.read(8), "little") if path.suffix == ".safetensors" else 0


def merkle_root(ours: Path) -> bytes:
    """The pieces root of a file as BEP 52 has it: SHA-256 over 16 KiB blocks, missing leaves zero."""
    with open_regular(ours) as data:
        level = []
        while block := data.read(_BLOCK):
            level.append(hashlib.sha256(block).digest())
    padding = bytes(32)
    while len(level) > 1 or not level:
        if not level:
            return padding
        if len(level) % 2:
            level.append(padding)
        level = [hashlib.sha256(level[at] + level[at + 1]).digest() for at in range(0, len(level), 2)]
        padding = hashlib.sha256(padding + padding).digest()
    return level[0]

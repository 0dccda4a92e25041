"""The tensors of a suspect, read row by row: safetensors (any names, sharded or not) and GGUF, or arrays in memory.

A suspect is a stranger's file. Headers are scanned by `model.headers`, which bounds and checks them; after that only
the rows that are asked for are read, and every byte is counted. Nothing is ever unpickled.

    >>> suspect = open_tensors(Path("suspect"))
    >>> suspect.read("model.embed_tokens.weight", slice(0, 16)).shape, suspect.bytes_read
    ((16, 576), 18432)
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from steelyard.base.errors import FormatError, SteelyardError, require_extra
from steelyard.base.files import open_regular
from steelyard.model.headers import (
    GGML_TYPES,
    MAX_TENSORS,
    GGUFHeader,
    quote,
    read_json_object,
    scan_gguf,
    scan_safetensors,
)

Float32 = np.ndarray[Any, np.dtype[np.float32]]
Float64 = np.ndarray[Any, np.dtype[np.float64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]
Rows = slice | IntArray | None

MAX_READ = 4 << 30  # bytes of float32 that one `read` may make; the embedding of Llama 3.1 405B takes 8.4 GB
MAX_SHARDS = 2_000  # safetensors files of one model
_CHUNK, _MARKED = 4 << 20, 4 << 10
# Elements and bytes of a block.
BLOCKS = {name: (elements, size) for name, elements, size in GGML_TYPES.values()}
_PLAIN = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "BOOL": "u1", "U8": "u1",
    "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8",
}  # fmt: skip
FLOATS = frozenset(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")) | BLOCKS.keys()
READABLE = FLOATS | {"I8"}  # a row of whole numbers is the weights' row but for its scale, which no cosine sees


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor. `dtype` in safetensors' spelling ("BF16") or GGUF's ("Q4_0"); `shape` row-major, as Hugging
    Face has it; `start` and `end` are offsets in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


class Tensors(Protocol):
    """Tensors by the names they are stored under. `config` is what the file says of its sizes: a hint, not a fact."""

    entries: Mapping[str, Entry]
    config: Mapping[str, Any]
    gguf: bool
    bytes_read: int

    def read(self, name: str, rows: Rows = None) -> Float32:
        """Rows of the first axis (all without `rows`) as float32 in the stored order; only those bytes are read.

        Raises FormatError where the tensor is no floating-point one, too large to hold, or the file became shorter.
        """

    def raw(self, name: str, rows: Rows = None) -> Bytes:
        """The same rows as stored: [rows, bytes of a row]."""

    def chunks(self, name: str, size: int = _CHUNK) -> Iterator[memoryview]:
        """The stored bytes, in pieces of at most `size`."""


def open_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file, a folder of them (sharded or not), or a GGUF.

    Raises FormatError for headers that lie (see `model.headers`), for a name in two files, and where nothing is there
    that can be read without running code.
    """
    real = real_path(path)
    if real.is_dir():
        files = weight_files(real)
        config = _config(real / "config.json")
    elif real.suffix.lower() == ".gguf" or _magic(real) == b"GGUF":
        return _open_gguf(real, path)
    else:
        files, config = [real], _config(real.parent / "config.json")
    if len(files) == 1 and files[0].suffix.lower() == ".gguf":
        return _open_gguf(real_path(files[0]), files[0])
    entries: dict[str, Entry] = {}
    for file in files:
        target = real_path(file)
        for name, info in scan_safetensors(target).items():
            if name in entries:
                raise FormatError(f"{path}: tensor {quote(name)} is in two files: give the one that is meant")
            entries[name] = Entry(name, info.dtype, info.shape, target, info.start, info.end)
        if len(entries) > MAX_TENSORS:
            raise FormatError(f"{path}: holds over {MAX_TENSORS:,} tensors, more than any model has: give a model")
    if not entries:
        raise FormatError(f"{path}: holds no tensor: give another copy")
    return _Stored(split_fused(entries), config, gguf=False)


def split_fused(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Gate and up rows, or query, key and value rows, that were laid one after the other in one matrix (as Phi-3 has
    them), as tensors of their own: each is a run of the matrix's bytes."""
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        base, rows = name.removesuffix("gate_up_proj.weight"), entry.shape[0] if len(entry.shape) == 2 else 0
        parts: tuple[tuple[str, int], ...] = ()
        if base != name and rows % 2 == 0:
            parts = (("gate", rows // 2), ("up", rows // 2))
        elif (base := name.removesuffix("qkv_proj.weight")) != name:
            output = entries.get(f"{base}o_proj.weight")
            queries = output.shape[1] if output is not None and len(output.shape) == 2 else rows
            if 0 < queries < rows and (rows - queries) % 2 == 0:
                parts = (("q", queries), ("k", (rows - queries) // 2), ("v", (rows - queries) // 2))
        cut = {f"{base}{part}_proj.weight": count for part, count in parts if count}
        if not cut or cut.keys() & entries.keys():
            found[name] = entry
            continue
        at, row = entry.start, (entry.end - entry.start) // rows
        for part, count in cut.items():
            found[part] = Entry(part, entry.dtype, (count, *entry.shape[1:]), entry.file, at, at + count * row)
            at += count * row
    return found


def fingerprint(tensors: Tensors) -> str:
    """By which a suspect is known again: SHA-256 over names, types, shapes and the first `_MARKED` bytes of each
    tensor."""
    state = hashlib.sha256()
    for name, entry in sorted(tensors.entries.items()):
        state.update(repr((name, entry.dtype, entry.shape)).encode())
        state.update(next(tensors.chunks(name, _MARKED), b""))
    return state.hexdigest()


def real_path(path: Path) -> Path:
    """`path` with links followed. Raises FormatError where it leads nowhere or round in a circle."""
    try:
        return Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise FormatError(f"{path}: cannot be opened: {error.strerror}: give a file or a folder") from error


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: model.safetensors, which loaders take first, else those an index names, else all
    safetensors, else its GGUF.

    Raises FormatError where there is none, or several GGUFs, or the index is broken or names what is not there.
    """
    with os.scandir(folder) as found:
        names = sorted(entry.name for entry in found)
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    plain = [name for name in names if name.lower().endswith(".safetensors")]
    if "model.safetensors" in plain:
        chosen = ["model.safetensors"]
    elif len(indexes) == 1:
        chosen = _indexed(folder / indexes[0], set(plain))
    else:
        chosen = plain or [name for name in names if name.lower().endswith(".gguf")]
    if not chosen:
        raise FormatError(f"{folder}: holds neither safetensors nor GGUF: nothing to compare without running code")
    if len(chosen) > 1 and chosen[0].lower().endswith(".gguf"):
        raise FormatError(f"{folder}: holds several GGUF files: give one of them")
    if len(chosen) > MAX_SHARDS:
        raise FormatError(f"{folder}: holds over {MAX_SHARDS:,} safetensors files: give one model's folder")
    return [folder / name for name in chosen]


def _indexed(index: Path, present: set[str]) -> list[str]:
    weight_map = read_json_object(real_path(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError(f"{index}: weight_map: must name the file of each tensor: give the files themselves")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name not in present:
            raise FormatError(f"{index}: names {quote(name)}, which is not there: give the whole model, or one file")
    return names


def _config(path: Path) -> Mapping[str, Any]:
    """config.json where it can be read: only a hint, so a broken one is none."""
    try:
        return read_json_object(real_path(path))
    except FormatError:
        return {}


def _magic(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(4)


def _open_gguf(real: Path, named: Path) -> Tensors:
    header: GGUFHeader = scan_gguf(real)
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise FormatError(f"{named}: is one part of several: join them with llama-gguf-split first")
    entries = {
        name: Entry(name, info.kind, info.shape, real, info.start, info.end) for name, info in header.tensors.items()
    }
    if not entries:
        raise FormatError(f"{named}: holds no tensor: give another copy")
    config = {key: value for key, value in header.metadata.items() if isinstance(value, int | float | str)}
    return _Stored(entries, config, gguf=True)


class _Stored:
    def __init__(self, entries: Mapping[str, Entry], config: Mapping[str, Any], *, gguf: bool) -> None:
        self.entries, self.config, self.gguf, self.bytes_read = entries, config, gguf, 0

    def read(self, name: str, rows: Rows = None) -> Float32:
        entry = self.entries[name]
        if entry.dtype not in READABLE:
            raise FormatError(f"{entry.file}: tensor {quote(name)} is {entry.dtype}: not floating-point weights")
        if len(entry.shape) < 2:  # a quantised vector's elements are not rows of bytes
            whole = decode(self._bytes(entry, [(0, 1)], entry.end - entry.start), entry.dtype)
            return whole.reshape(entry.shape)[... if rows is None else rows]
        data = self.raw(name, rows)
        return decode(data.reshape(-1), entry.dtype).reshape(len(data), *entry.shape[1:])

    def raw(self, name: str, rows: Rows = None) -> Bytes:
        entry = self.entries[name]
        count = entry.shape[0] if entry.shape else 1
        spans, order = _spans(rows, count)
        total, width = sum(stop - start for start, stop in spans), (entry.end - entry.start) // max(count, 1)
        if total * math.prod(entry.shape[1:]) * 4 > MAX_READ:
            raise FormatError(f"{entry.file}: tensor {quote(name)}: {total:,} rows of {width:,} bytes are too many")
        data = self._bytes(entry, spans, width).reshape(total, width)
        return data if order is None else data[order]

    def _bytes(self, entry: Entry, spans: list[tuple[int, int]], row: int) -> Bytes:
        out = np.empty(sum(stop - start for start, stop in spans) * row, dtype=np.uint8)
        at, view = 0, out.data
        with open_regular(entry.file) as file:
            for start, stop in spans:
                need, offset = (stop - start) * row, entry.start + start * row
                while need:
                    got = os.preadv(file.fileno(), [view[at : at + need]], offset)
                    if not got:
                        raise FormatError(f"{entry.file}: became shorter while it was read: leave it and try again")
                    at, need, offset = at + got, need - got, offset + got
        self.bytes_read += at
        return out

    def chunks(self, name: str, size: int = _CHUNK) -> Iterator[memoryview]:
        entry = self.entries[name]
        buffer, at = memoryview(bytearray(min(size, entry.end - entry.start))), entry.start
        with open_regular(entry.file) as file:
            while at < entry.end:
                got = os.preadv(file.fileno(), [buffer[: entry.end - at]], at)
                if not got:
                    raise FormatError(f"{entry.file}: became shorter while it was read: leave it and try again")
                self.bytes_read += got
                at += got
                yield buffer[:got]


def _spans(rows: Rows, count: int) -> tuple[list[tuple[int, int]], IntArray | None]:
    """The runs of neighbouring rows to read, and where each row asked for lies in them (None: as read)."""
    if rows is None:
        return [(0, count)], None
    if isinstance(rows, slice):
        start, stop, step = rows.indices(count)
        if step == 1:
            return [(start, max(start, stop))], None
        rows = np.arange(start, stop, step)
    rows = np.asarray(rows, dtype=np.int64)
    if rows.size == 0:
        return [], None
    if rows.min() < 0 or rows.max() >= count:
        raise SteelyardError(f"row {int(rows.max())} of a tensor of {count} rows was asked for")
    unique, order = np.unique(rows, return_inverse=True)
    breaks = np.flatnonzero(np.diff(unique) != 1) + 1
    runs = np.split(unique, breaks)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs], order


def decode(data: Bytes, dtype: str) -> Float32:
    """Stored bytes to float32, flat. `dtype` as in `Entry`."""
    if dtype not in _PLAIN:
        try:
            import gguf
            import gguf.quants
        except ImportError:
            raise require_extra("gguf", "models") from None
        blocks = data.reshape(-1, BLOCKS[dtype][1])
        with np.errstate(over="ignore", invalid="ignore"):
            values: Float32 = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[dtype])
        return values.astype(np.float32, copy=False).reshape(-1)
    stored = data.view(_PLAIN[dtype])
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype.startswith("F8"):
        table: Float32 = _float8(dtype)[stored]
        return table
    with np.errstate(over="ignore", invalid="ignore"):
        return stored.astype(np.float32)


def _float8(dtype: str) -> Float32:
    """The 256 values of an 8-bit float (Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1)."""
    bits = np.arange(256)
    mantissa, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    exponent = (bits & 0x7F) >> mantissa
    fraction = (bits & ((1 << mantissa) - 1)) / (1 << mantissa)
    values = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - float(bias)))
    if dtype == "F8_E4M3":
        values[(bits & 0x7F) == 0x7F] = np.nan
    else:
        top = exponent == 31
        values[top] = np.where(fraction[top] == 0, np.inf, np.nan)
    return np.where(bits & 0x80, -values, values).astype(np.float32)


class _Memory:
    def __init__(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self._arrays = {name: np.asarray(value, dtype=np.float32) for name, value in arrays.items()}
        self.entries: Mapping[str, Entry] = {
            name: Entry(name, "F32", value.shape, Path("memory"), 0, value.nbytes)
            for name, value in self._arrays.items()
        }
        self.config: Mapping[str, Any] = {}
        self.gguf, self.bytes_read = False, 0

    def read(self, name: str, rows: Rows = None) -> Float32:
        found: Float32 = self._arrays[name] if rows is None else self._arrays[name][rows]
        self.bytes_read += found.nbytes
        return found

    def raw(self, name: str, rows: Rows = None) -> Bytes:
        found = np.ascontiguousarray(self.read(name, rows))
        return found.view(np.uint8).reshape(len(found), -1)

    def chunks(self, name: str, size: int = _CHUNK) -> Iterator[memoryview]:
        data = np.ascontiguousarray(self._arrays[name]).tobytes()
        self.bytes_read += len(data)
        yield from (memoryview(data[at : at + size]) for at in range(0, len(data), size))


def in_memory(arrays: Mapping[str, np.ndarray[Any, Any]]) -> Tensors:
    """The same protocol over arrays, as float32: for pipelines and tests."""
    return _Memory(arrays)

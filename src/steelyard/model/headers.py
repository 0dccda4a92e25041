"""What a model file claims, checked before anything believes it: bounded scans of safetensors and GGUF headers.

Nothing here imports torch or reads a weight. A hostile file (sizes that lie, terabyte claims, millions of entries, deep
nesting, cut short) is refused in well under a second and 100 MB, because every count and length is held against the
file's real size, or against a limit below, before memory is asked for.

    >>> scan_safetensors(Path("model.safetensors"))["lm_head.weight"].shape
    (49152, 576)
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from steelyard.base.errors import FormatError
from steelyard.base.files import open_regular, read_bounded
from steelyard.base.strict import strict_json

MAX_TENSORS = 20_000  # in one file; Llama 3.1 405B has 1,138 in all
MAX_DIMENSIONS = 8
MAX_SIZE = 1 << 46  # 64 TiB: no dimension, offset or length of a real model comes near
MAX_SAFETENSORS_HEADER = 8 << 20  # bytes; a tensor takes about 110
MAX_JSON = 8 << 20  # bytes of a settings file; the largest in use, an index or a tokenizer_config.json, take 2 MB
MAX_GGUF_HEADER = 32 << 20  # bytes; a vocabulary of 256,000 with its merges takes 15 MB
MAX_GGUF_KEYS = 10_000
MAX_GGUF_TEXT = 1 << 20  # bytes of one string outside arrays: the longest is a chat template
MAX_GGUF_TEXTS = 4 << 20  # bytes of all strings outside arrays: a character may take four times its bytes in memory
MAX_GGUF_STRINGS = 1_000_000  # over all string arrays: tokens and merges
MAX_DEPTH = 16  # folders in a model folder
MAX_ENTRIES = 100_000  # files and folders in it

# Bytes per element, safetensors spelling.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

# ggml type number -> (name, elements per block, bytes per block), ggml.h and ggml-common.h of llama.cpp.
GGML_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2),
}  # fmt: skip

# GGUF value type number -> numpy type, for numbers; 7 is bool, 8 string, 9 array.
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file. `dtype` in safetensors' spelling; `start` and `end` are offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GGUFTensorInfo:
    """One tensor of a GGUF file. `shape` is slowest dimension first (as numpy has it); offsets are in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GGUFArray:
    """An array in GGUF metadata, not read yet: value type number, element count, byte range in the file."""

    kind: int
    count: int
    start: int
    end: int


@dataclass(frozen=True)
class GGUFHeader:
    """A scanned GGUF header. Arrays in `metadata` are `GGUFArray`; `strings` and `numbers` read them."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensorInfo]
    alignment: int
    data_start: int
    _file_size: int = field(repr=False, default=0)

    def _array(self, key: str) -> tuple[GGUFArray, bytes]:
        value = self.metadata.get(key)
        if not isinstance(value, GGUFArray):
            raise FormatError(f"{self.path}: {key}: must be an array: convert the model again")
        with open_regular(self.path.resolve()) as file:
            file.seek(value.start)
            return value, file.read(value.end - value.start)

    def strings(self, key: str) -> list[str]:
        """The string array at `key`. Raises FormatError where it is absent, of another type, or not UTF-8."""
        value, data = self._array(key)
        if value.kind != _STRING:
            raise FormatError(f"{self.path}: {key}: must be an array of strings: convert the model again")
        found, at = [], 0
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(value.count):
                (length,) = unpack(data, at)
                found.append(data[at + 8 : at + 8 + length].decode())
                at += 8 + length
        except (UnicodeDecodeError, struct.error):
            raise FormatError(f"{self.path}: {key}: entry {len(found)} is not UTF-8: convert the model again") from None
        return found

    def numbers(self, key: str) -> np.ndarray[Any, np.dtype[Any]]:
        """The number array at `key`, in its own type. Raises FormatError where it is absent or not numbers."""
        value, data = self._array(key)
        if value.kind not in _NUMBERS:
            raise FormatError(f"{self.path}: {key}: must be an array of numbers: convert the model again")
        return np.frombuffer(data, dtype=_NUMBERS[value.kind])


def quote(name: object) -> str:
    """A name out of a hostile file, fit for one line of a message."""
    text = ascii(name)
    return text if len(text) <= 80 else text[:77] + "..."


_REMEDY = "download it again, or convert the model again"


def _refuse(path: Path, what: str, remedy: str = _REMEDY) -> NoReturn:
    raise FormatError(f"{path}: {what}: {remedy}")


def _check_name(path: Path, name: str) -> None:
    if not name or len(name) > 512 or not name.isprintable():
        _refuse(path, f"tensor name {quote(name)} is empty, too long or not printable")


# --- safetensors ------------------------------------------------------------------------------------------------------


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, in order, so that a name given twice is seen."""


def _raise_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    fields = dict(entry) if isinstance(entry, _Pairs) else {}
    if len(fields) != 3 or len(entry) != 3 or fields.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"tensor {quote(name)} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _refuse(path, f"tensor {quote(name)} has the unknown dtype {quote(dtype)}")
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        _refuse(path, f"tensor {quote(name)} has an impossible shape")
    if type(offsets) is not list or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _refuse(path, f"tensor {quote(name)} has impossible data_offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        _refuse(path, f"tensor {quote(name)}: data_offsets do not fit its shape and dtype")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def scan_safetensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors a safetensors file holds, by name, in file order of their data.

    Raises FormatError where the header is cut short, over the limits, not strict JSON, names a tensor twice or an
    unknown dtype, or where the byte ranges do not cover the data exactly: no overlap, no hole, nothing past the end.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(9)
        if len(start) < 9:
            _refuse(path, "is cut short: no safetensors header")
        # A length of eight letters is text; no file is so long.
        if start[8:] != b"{" or (start.isascii() and 0 not in start):
            _refuse_other(path, start)
        (length,) = struct.unpack_from("<Q", start)
        if length > size - 8:
            _refuse(path, f"claims a header of {length:,} bytes but is {size:,} bytes long")
        if length > MAX_SAFETENSORS_HEADER:
            _refuse(path, f"has a header of {length:,} bytes, over the limit of {MAX_SAFETENSORS_HEADER:,}")
        raw = start[8:] + file.read(max(length, 1) - 1)
    if len(raw) < length:
        _refuse(path, "became shorter while it was read")
    # Every object, array, element and string costs at least one of these bytes: that bounds what the parse can make.
    limits = {b"{": MAX_TENSORS + 2, b"[": 2 * MAX_TENSORS, b",": 8 * MAX_TENSORS, b'"': 12 * MAX_TENSORS}
    if any(raw.count(byte) > limit for byte, limit in limits.items()):
        _refuse(path, f"claims more than {MAX_TENSORS:,} tensors, or as much metadata")
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_Pairs, parse_constant=_raise_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else "it is not UTF-8 JSON"
        _refuse(path, f"has a broken safetensors header: {reason}")
    tensors: dict[str, TensorInfo] = {}
    metadata = False
    for name, entry in header:
        if name == "__metadata__":
            if metadata or not isinstance(entry, _Pairs) or not all(isinstance(value, str) for _, value in entry):
                _refuse(path, "has broken __metadata__: it must be one map of strings")
            metadata = True
            continue
        _check_name(path, name)
        if name in tensors:
            _refuse(path, f"names tensor {quote(name)} twice")
        tensors[name] = _tensor(path, name, entry, 8 + length)
    at = 8 + length
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end))
    for tensor in ordered:
        if tensor.start != at:
            kind = "overlaps the one before it" if tensor.start < at else "leaves a hole before it"
            _refuse(path, f"tensor {quote(tensor.name)} {kind}")
        at = tensor.end
    if at != size:
        what = (
            f"claims {at - size:,} bytes more than it has" if at > size else f"has {size - at:,} bytes no tensor owns"
        )
        _refuse(path, what)
    return {tensor.name: tensor for tensor in ordered}


def _refuse_other(path: Path, start: bytes) -> NoReturn:
    """Say of a file that is no safetensors what it is, and so what to do with it."""
    if start.startswith(b"GGUF"):
        _refuse(path, "is a GGUF file, where safetensors is read", "convert it to safetensors")
    what = "is no safetensors file (nor GGUF): it has no such header"
    suffix = path.suffix.lower()
    if start.startswith((b"PK\x03\x04", b"\x80")) or suffix in (".bin", ".pt", ".pth", ".ckpt"):  # a zip, a pickle
        _refuse(path, what, "convert it to safetensors")
    _refuse(path, what, _REMEDY if suffix == ".safetensors" else "give a model's folder or its weight file")


# --- GGUF -------------------------------------------------------------------------------------------------------------


class _Cursor:
    """Reads values from the first bytes of a GGUF file, refusing every length that goes past what is there."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.at = self.strings = self.texts = 0

    def skip(self, count: int, what: str) -> int:
        """Step over `count` bytes; returns where they begin."""
        start = self.at
        if count > self.size - start:
            _refuse(self.path, f"is cut short or lies about a length: {what} needs {count:,} bytes")
        if count > len(self.data) - start:
            _refuse(self.path, f"has a header over the limit of {MAX_GGUF_HEADER:,} bytes, at {what}")
        self.at = start + count
        return start

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code), what))[0]

    def text(self, what: str, limit: int = MAX_GGUF_TEXT) -> str:
        length = self.number("Q", what)
        if length > limit:
            _refuse(self.path, f"claims {length:,} bytes for {what}")
        self.texts += length
        if self.texts > MAX_GGUF_TEXTS:
            _refuse(self.path, f"has over {MAX_GGUF_TEXTS:,} bytes of names and texts, at {what}")
        start = self.skip(length, what)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            _refuse(self.path, f"{what} is not UTF-8")

    def array(self, what: str) -> GGUFArray:
        kind, count = self.number("I", what), self.number("Q", what)
        start = self.at
        if kind == _ARRAY:
            _refuse(self.path, f"{what} is an array of arrays, which no model needs")
        if kind in _NUMBERS:
            width = np.dtype(_NUMBERS[kind]).itemsize
            if count > self.size // width:
                _refuse(self.path, f"is cut short or lies about a length: {what} claims {count:,} elements")
            self.skip(count * width, what)
        elif kind == _STRING:
            if count > self.size // 8:
                _refuse(self.path, f"is cut short or lies about a length: {what} claims {count:,} strings")
            self.strings += count
            if self.strings > MAX_GGUF_STRINGS:
                _refuse(self.path, f"claims more than {MAX_GGUF_STRINGS:,} strings, at {what}")
            data, at, end = self.data, self.at, len(self.data)
            unpack = struct.Struct("<Q").unpack_from
            for index in range(count):
                if at + 8 > end or (length := unpack(data, at)[0]) > end - at - 8:
                    self.at = at
                    self.skip(8 + (length if at + 8 <= end else 0), f"{what}, string {index:,},")
                at += 8 + length
            self.at = at
        else:
            _refuse(self.path, f"{what} is an array of the unknown type {kind}")
        return GGUFArray(kind, count, start, self.at)

    def value(self, what: str) -> Any:
        kind = self.number("I", what)
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _NUMBERS:
            _refuse(self.path, f"{what} is of the unknown type {kind}")
        item = np.dtype(_NUMBERS[kind])
        start = self.skip(item.itemsize, what)
        number = np.frombuffer(self.data, item, 1, start)[0].item()
        if kind == _BOOL:
            if number not in (0, 1):
                _refuse(self.path, f"{what} is a bool of value {number}")
            return bool(number)
        return number


def _check_start(path: Path, cursor: _Cursor) -> int:
    magic = cursor.data[:4]
    if magic != b"GGUF":
        known = magic in (b"tjgg", b"fmgg", b"lmgg", b"algg", b"FUGG")
        _refuse(path, "is a GGML file from before GGUF" if known else f"is not a GGUF file (it begins with {magic!r})")
    cursor.skip(4, "the magic")
    version: int = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        _refuse(path, "is a big-endian GGUF file", "convert the model to little-endian")
    if version not in (2, 3):
        _refuse(path, f"is GGUF version {version}; versions 2 and 3 are read")
    return version


def scan_gguf(path: Path) -> GGUFHeader:
    """The metadata and tensor table of a GGUF file (versions 2 and 3, little-endian).

    Raises FormatError for a wrong magic, version or byte order, lengths past the end, counts over the limits, nested
    arrays, names given twice, unknown types, an alignment that is no power of two, and tensors that do not lie one
    after the other inside the file. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    with open_regular(path.resolve()) as file:  # the user's own choice of a file, which may be a link to it
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, MAX_GGUF_HEADER))
    cursor = _Cursor(path, data, size)
    version = _check_start(path, cursor)
    tensor_count, key_count = cursor.number("Q", "the tensor count"), cursor.number("Q", "the key count")
    if tensor_count > MAX_TENSORS:
        _refuse(path, f"claims {tensor_count:,} tensors; the limit is {MAX_TENSORS:,}")
    if key_count > MAX_GGUF_KEYS:
        _refuse(path, f"claims {key_count:,} keys; the limit is {MAX_GGUF_KEYS:,}")
    metadata: dict[str, Any] = {}
    for index in range(key_count):
        key = cursor.text(f"key {index}", 512)
        if not key or not key.isprintable():
            _refuse(path, f"key {quote(key)} is empty or not printable")
        if key in metadata:
            _refuse(path, f"has the key {quote(key)} twice")
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 65536 or alignment & (alignment - 1):
        _refuse(path, f"general.alignment is {quote(alignment)}: it must be a power of two from 8 to 65536")
    entries = [_tensor_entry(path, cursor) for _ in range(tensor_count)]
    data_start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensorInfo] = {}
    at = 0
    for name, kind, shape, offset, length in entries:
        if name in tensors:
            _refuse(path, f"names tensor {quote(name)} twice")
        if offset != at:
            _refuse(path, f"tensor {quote(name)} is at offset {offset:,} where {at:,} follows: overlap or hole")
        if data_start + offset + length > size:
            _refuse(
                path,
                f"tensor {quote(name)} ends {data_start + offset + length - size:,} bytes past the end of the file",
            )
        tensors[name] = GGUFTensorInfo(name, kind, shape, data_start + offset, data_start + offset + length)
        at = -(-(offset + length) // alignment) * alignment
    if entries and size > data_start + at:
        _refuse(path, f"has {size - data_start - at:,} bytes after its last tensor")
    return GGUFHeader(path, version, metadata, tensors, alignment, data_start)


def _tensor_entry(path: Path, cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
    name = cursor.text("a tensor name", 512)
    _check_name(path, name)
    dimensions = cursor.number("I", f"tensor {quote(name)}")
    if not 1 <= dimensions <= 4:
        _refuse(path, f"tensor {quote(name)} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q", f"tensor {quote(name)}") for _ in range(dimensions))[::-1]
    number, offset = cursor.number("I", f"tensor {quote(name)}"), cursor.number("Q", f"tensor {quote(name)}")
    if number not in GGML_TYPES:
        known = ", ".join(kind for kind, _, _ in GGML_TYPES.values())
        _refuse(path, f"tensor {quote(name)} is of ggml type {number}, which is not read (read are {known})")
    kind, block, block_bytes = GGML_TYPES[number]
    elements = math.prod(shape)
    if elements == 0 or elements > MAX_SIZE or offset > MAX_SIZE:
        _refuse(path, f"tensor {quote(name)} has an impossible size")
    if shape[-1] % block:
        _refuse(path, f"tensor {quote(name)} of type {kind} has rows of {shape[-1]}, not a multiple of {block}")
    return name, kind, shape, offset, elements // block * block_bytes


# --- JSON files and folders -------------------------------------------------------------------------------------------


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FormatError where it is too large, not strict JSON, or gives a key twice."""
    try:
        raw = read_bounded(path, MAX_JSON)
    except FileNotFoundError:
        _refuse(path, "is missing")
    except OSError as error:
        _refuse(path, f"cannot be read ({error.strerror})")
    if raw.count(b"{") + raw.count(b"[") > 10 * MAX_TENSORS or raw.count(b",") > 20 * MAX_TENSORS:
        _refuse(path, "has more entries than any model needs")
    try:
        value = strict_json(raw, str(path), limit=MAX_JSON)
    except FormatError as error:
        raise FormatError(f"{error}: {_REMEDY}") from None
    if not isinstance(value, dict):
        _refuse(path, "must hold a JSON object")
    return value


_UNSAFE_SUFFIXES = frozenset(
    (
        *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".msgpack", ".npy", ".npz"),  # pickles
        *(".py", ".pyc", ".so", ".dll", ".dylib"),  # code
        *(".gguf", ".onnx"),  # weights in another format
    )
)
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_CODE_KEYS = ("auto_map", "custom_pipelines")


def refuse_unsafe_files(folder: Path) -> None:
    """Raise FormatError where a model folder, at any depth, holds something that runs or a second set of weights.

    Refused: pickles and every other format that can carry code, Python files, `auto_map`, adapters, symbolic links, and
    safetensors other than one `model.safetensors` or the shards of one `model.safetensors.index.json`.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder}: is not a folder: give a model folder")
    weights = []
    for path in _walk(folder):
        name, suffix = path.relative_to(folder).as_posix(), path.suffix.lower()
        if path.is_symlink():
            raise FormatError(f"{folder}: {name}: is a symbolic link: copy the file itself")
        if path.is_dir():
            continue
        if not path.is_file():
            raise FormatError(f"{folder}: {name}: is not a plain file: remove it")
        if suffix in _UNSAFE_SUFFIXES:
            raise FormatError(f"{folder}: {name}: {suffix} files are refused: keep safetensors, JSON and text only")
        if path.name.startswith("adapter_"):
            raise FormatError(f"{folder}: {name}: adapters are refused: merge it into the weights first")
        if suffix == ".safetensors":
            weights.append(name)
    _refuse_second_weights(folder, weights)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            _refuse_code_keys(folder / name, read_json_object(folder / name))


def _walk(folder: Path) -> list[Path]:
    """Everything in a folder at any depth, sorted; bounded, and links are not followed."""
    found: list[Path] = []
    level = [folder]
    try:
        for _ in range(MAX_DEPTH + 1):
            inner: list[Path] = []
            for place in level:
                with os.scandir(place) as entries:
                    for entry in entries:
                        found.append(place / entry.name)
                        if len(found) > MAX_ENTRIES:
                            raise FormatError(f"{folder}: holds over {MAX_ENTRIES:,} files: give a model folder")
                        if entry.is_dir(follow_symlinks=False):
                            inner.append(found[-1])
            if not inner:
                return sorted(found)
            level = inner
    except OSError as error:
        raise FormatError(f"{folder}: cannot be read: {error.strerror}") from error
    raise FormatError(f"{folder}: folders nested deeper than {MAX_DEPTH}: remove them")


def _refuse_second_weights(folder: Path, weights: list[str]) -> None:
    index = (folder / "model.safetensors.index.json").is_file()
    for name in weights:
        if name != "model.safetensors" and not (_SHARD.fullmatch(name) and index):
            raise FormatError(f"{folder}: {name}: a weight file that no index names: keep one set of weights")
    if "model.safetensors" in weights and (index or len(weights) > 1):
        raise FormatError(f"{folder}: model.safetensors beside an index: two sets of weights, keep one")
    if len({match.group(2) for name in weights if (match := _SHARD.fullmatch(name))}) > 1:
        raise FormatError(f"{folder}: shards of two sets of weights: keep one")


def _refuse_code_keys(path: Path, value: Any) -> None:
    if isinstance(value, dict):
        for key in _CODE_KEYS:
            if key in value:
                raise FormatError(f"{path}: {key}: names code to run: remove it")
        for inner in value.values():
            _refuse_code_keys(path, inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_code_keys(path, inner)

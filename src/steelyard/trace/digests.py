"""Which tensors are ours whatever they are called: digests of their bytes, as stored and cast, and requantisation.

A digest is the SHA-256 of a tensor's little-endian bytes alone: no name, no shape, no place in a file. A release's
table holds those of its tensors as stored and in the other types that people cast to, so that one lookup answers for
re-sharded, renamed and cast copies. A tensor of few values (norms of ones, an identity, a mask) is in unrelated models
too: it proves nothing and is left out.

    >>> table = Table(tensor_digests(open_tensors(release)))
    >>> [table.find(one.sha256) for one in stored_digests(open_tensors(suspect)).values()]
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from steelyard.base.errors import require_extra
from steelyard.base.progress import Progress, Silent
from steelyard.trace.tensors import BLOCKS, FLOATS, Bytes, Float32, Tensors, decode

CASTS = ("BF16", "F16", "F32")
FEW = 16  # values: a tensor of no more is nobody's own


@dataclass(frozen=True, slots=True)
class Stored:
    """What a pass over a tensor's bytes tells. `common`: at most `FEW` values; `finite`: no NaN or infinity."""

    sha256: str
    common: bool
    finite: bool


@dataclass(frozen=True, slots=True)
class TensorDigests:
    """A registered tensor: its name, stored type, shape, and the digest in each type (its own among them)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Found:
    """A digest met in a table: the registered tensor, and the type it was cast to (its own: not at all)."""

    tensor: str
    dtype: str
    cast: bool


class Table:
    """Registered tensors by digest."""

    def __init__(self, tensors: Iterable[TensorDigests]) -> None:
        self._found: dict[str, list[Found]] = {}
        self.count = 0
        for tensor in tensors:
            self.count += 1
            for dtype, digest in tensor.digests.items():
                self._found.setdefault(digest, []).append(Found(tensor.name, dtype, dtype != tensor.dtype))

    def find(self, sha256: str) -> list[Found]:
        """Registered tensors of these bytes; tied ones are several."""
        return self._found.get(sha256, [])


def stored_digests(
    tensors: Tensors,
    names: Sequence[str] | None = None,
    *,
    row_order: Mapping[str, np.ndarray[Any, Any]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Stored]:
    """The digests of a suspect's tensors by stored name.

    `row_order`: for tensors whose format keeps rows in another order, the stored row of each row (`roles.stored_rows`).
    """
    chosen = list(tensors.entries if names is None else names)
    orders = row_order or {}
    total = sum(tensors.entries[name].end - tensors.entries[name].start for name in chosen) / 1e6

    def one(name: str) -> Stored:
        if name in orders:
            data = tensors.raw(name)[orders[name]].tobytes()
            return _stored([memoryview(data)], tensors.entries[name].dtype)
        return _stored(tensors.chunks(name), tensors.entries[name].dtype)

    found = {}
    # hashlib and numpy let go of the interpreter lock, so threads use every core.
    with (progress or Silent()).task("digests", total, "MB") as task, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, stored in zip(chosen, pool.map(one, chosen), strict=True):
            found[name] = stored
            task.advance((tensors.entries[name].end - tensors.entries[name].start) / 1e6)
    return found


_BITS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}


def _stored(chunks: Iterable[memoryview], dtype: str) -> Stored:
    state, finite, values = hashlib.sha256(), True, _Values()
    for chunk in chunks:
        state.update(chunk)
        if dtype in _BITS:
            kind, exponent = _BITS[dtype]
            bits = np.frombuffer(chunk, dtype=kind)
            finite = finite and not bool(((bits & exponent) == exponent).any())
            values.add(bits)
    return Stored(state.hexdigest(), dtype in _BITS and values.few, finite)


class _Values:
    """Whether a tensor, seen piece by piece, has at most `FEW` different values. Looks no further than it must."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    @property
    def few(self) -> bool:
        return len(self._seen) <= FEW

    def add(self, bits: np.ndarray[Any, Any]) -> None:
        at, step = 0, 64
        while self.few and at < len(bits):
            self._seen.update(np.unique(bits[at : at + step]).tolist())
            at, step = at + step, min(step * 4, 1 << 20)


def cast(values: Float32, dtype: str) -> Bytes:
    """float32 values as the little-endian bytes of BF16, F16 or F32, rounded to nearest even as PyTorch does."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.ascontiguousarray(rounded.astype("<u2")).view(np.uint8)
    with np.errstate(over="ignore"):
        kind = {"F16": "<f2", "F32": "<f4"}[dtype]
        return np.ascontiguousarray(values.astype(kind)).view(np.uint8)


_COMPUTED = ("inv_freq", "rope_freqs.weight", "rope.freqs", "cos_cached", "sin_cached", "freqs_cis", "position_ids")


def tensor_digests(tensors: Tensors, progress: Progress | None = None) -> Iterator[TensorDigests]:
    """Every tensor of a release with its digests as stored and cast; without any those that unrelated models have too:
    of few values, and what is computed from the settings (rotary embeddings' frequencies, sines and cosines)."""
    names = [name for name, entry in tensors.entries.items() if entry.dtype in FLOATS]
    total = sum(tensors.entries[name].end - tensors.entries[name].start for name in names) / 1e6

    def one(name: str) -> TensorDigests:
        entry = tensors.entries[name]
        wanted = [dtype for dtype in CASTS if dtype != entry.dtype] if entry.dtype in CASTS else []
        states = {dtype: hashlib.sha256() for dtype in (entry.dtype, *wanted)}
        seen = _Values()
        for chunk in tensors.chunks(name):
            states[entry.dtype].update(chunk)
            if wanted:
                values = decode(np.frombuffer(chunk, dtype=np.uint8), entry.dtype)
                seen.add(np.frombuffer(chunk, dtype=_BITS[entry.dtype][0]))
                for dtype in wanted:
                    states[dtype].update(cast(values, dtype).data)
        common = (bool(wanted) and seen.few) or name.endswith(_COMPUTED) or "rotary_emb." in name
        digests = {} if common else {dtype: state.hexdigest() for dtype, state in states.items()}
        return TensorDigests(name, entry.dtype, entry.shape, digests)

    with (
        (progress or Silent()).task("digests of the tensors", total, "MB") as task,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for name, digest in zip(names, pool.map(one, names), strict=True):
            task.advance((tensors.entries[name].end - tensors.entries[name].start) / 1e6)
            yield digest


REQUANTISED = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
)  # what the gguf package quantises to the very bytes llama.cpp makes


def requantised(ours: Float32, dtype: str, stored: Bytes) -> float:
    """The share of a suspect's quantised blocks that quantising our rows gives to the byte.

    `ours` [rows, width] in float32; `stored` the suspect's rows [rows, bytes]; `dtype` one of `REQUANTISED`. Rows of an
    unrelated model agree in no block; a copy quantised from float16 or with an importance matrix in some.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise require_extra("gguf", "models") from None
    size = BLOCKS[dtype][1]
    made = gguf.quants.quantize(np.ascontiguousarray(ours), gguf.GGMLQuantizationType[dtype])
    equal = (made.reshape(-1, size) == stored.reshape(-1, size)).all(axis=1)
    return float(equal.mean())

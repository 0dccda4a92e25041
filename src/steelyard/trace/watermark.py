"""A mark in the weights that names the recipient, survives casts, quantisation and fine-tuning, and is kept nowhere.

Spread spectrum: one weight in BLOCK, chosen by the key, moves by one bfloat16 step, up or down by a keyed sign times a
symbol of the recipient's Tardos code (`tardos.py`). Choice, sign and position in the code are the same for all
recipients, so two copies differ only where their symbols do. The change is 0.43 times what a cast of float32 masters to
bfloat16 costs: relative RMS sqrt(1/64) of a step, against sqrt(1/12) for rounding.

Detection is not blind: it needs the unmarked weights, and a suspect expressed in their layout (`alignment.py`).

    >>> mark_folder(Path("model"), Path("copy"), key, "grant-1", Silent()).relative_rms
    0.00072
    >>> detect(original, suspect, key, ["grant-1", "grant-2"]).accused
    ('grant-1',)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard.base.errors import FormatError, UsageError
from steelyard.base.progress import Progress
from steelyard.model.headers import DTYPE_BYTES, TensorInfo, quote, read_json_object
from steelyard.model.identity import weight_files
from steelyard.trace import tardos
from steelyard.trace.rewrite import Pieces, read_exactly, rewrite_folder

Array = NDArray[np.float32]
Floats = NDArray[np.float64]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

BLOCK = 64  # one entry in so many moves
VECTOR_BLOCK = 32  # in 1-D weights (norms), which are few and stay exact where matrices are quantised
SMALLEST, LARGEST = 2.0**-13, 2.0**15  # weights outside are left: within, every dtype holds a step exactly
_STEP = 1 << 16  # one bfloat16 step on the bits of a float32
_FARTHEST = 2.0**40  # steps: what moved farther is counted as that far, and no square overflows
_FLOOR = 0.01  # in squared steps: noise below a tenth of a step is not told apart
_CHUNK = 1 << 20  # blocks marked at a time
_LOCAL = 1 << 12  # blocks whose noise is estimated together
_CLASSES = 8  # powers of two of |weight| told apart in that
# Storage types that can be marked: numpy's integer of the same bits, and one bfloat16 step on those bits.
_DTYPES: dict[str, tuple[np.dtype[Any], int]] = {
    "BF16": (np.dtype("<i2"), 1),
    "F16": (np.dtype("<i2"), 8),
    "F32": (np.dtype("<i4"), _STEP),
}


@dataclass(frozen=True)
class MarkReport:
    """What marking changed: root of the squared change over the squared weights, entries moved, entries in all."""

    relative_rms: float
    changed: int
    entries: int


@dataclass(frozen=True)
class Detection:
    """Per grant, in the order given: score, and log10 of the bound on the probability that an innocent scores as high.
    `accused`: those whose bound times the number of grants is at most `tardos.ACCUSE`, highest score first."""

    scores: NDArray[np.float64]
    log10_p: NDArray[np.float64]
    accused: tuple[str, ...]

    @property
    def p_values(self) -> NDArray[np.float64]:
        """The bounds themselves; 0 where one is below the smallest float."""
        return np.asarray(10.0**self.log10_p)


@dataclass(frozen=True)
class _Plan:
    """Where a tensor is marked. Of block i (of `size` flat entries), entry `offset[i]` carries `sign[i]` times the
    symbol at code position `position[i]`. The last block may be cut short, and its choice fall outside."""

    size: int
    controls: int  # entries of a block that were not chosen and tell its noise
    offset: NDArray[np.int64]
    sign: NDArray[np.int8]
    position: NDArray[np.uint16]


def _plan(key: bytes, name: str, shape: Sequence[int]) -> _Plan:
    size, controls = (BLOCK, 1) if len(shape) > 1 else (VECTOR_BLOCK, VECTOR_BLOCK - 1)
    blocks = -(-int(np.prod(shape)) // size)
    draws = np.frombuffer(tardos.stream(key, "carrier", name, count=4 * blocks), "<u4")
    sign = ((draws >> 14) & 2).astype(np.int8) - 1  # bit 15
    return _Plan(size, controls, (draws & (size - 1)).astype(np.int64), sign, (draws >> 16).astype(np.uint16))


def _markable(weights: Array) -> NDArray[np.bool_]:
    size = np.abs(weights)
    return np.asarray((size >= SMALLEST) & (size < LARGEST))


def mark(tensors: Mapping[str, Array], key: bytes, grant: str) -> dict[str, Array]:
    """Marked copies of float32 tensors by Hugging Face name: the values `mark_folder` stores."""
    symbols = _symbols(key, grant)
    tied = _is_tied(tensors)
    marked = {}
    for name, tensor in tensors.items():
        flat = np.array(tensor, np.float32).reshape(-1)  # a copy
        plan = _plan(key, _carrier(name, tied), tensor.shape)
        _move(flat.view(np.int32), flat.copy(), plan, symbols, _STEP)
        marked[name] = flat.reshape(tensor.shape)
    return marked


def _is_tied(tensors: Mapping[str, Array]) -> bool:
    return {HEAD, EMBEDDING} <= set(tensors) and np.array_equal(tensors[HEAD], tensors[EMBEDDING])


def _carrier(name: str, tied: bool) -> str:
    """Whose carrier a tensor has: a stored copy of the embedding must stay a copy."""
    return EMBEDDING if tied and name == HEAD else name


def _symbols(key: bytes, grant: str) -> NDArray[np.int8]:
    return tardos.code(key, grant).astype(np.int8) * 2 - 1


def _move(
    bits: NDArray[Any], values: Array, plan: _Plan, symbols: NDArray[np.int8], step: int, first: int = 0
) -> tuple[int, float]:
    """Move the chosen entries of `bits` by `step` bits, which moves the magnitude of a float.

    `bits` and `values` (the same entries as float32) are flat and begin at block `first`. Returns how many moved, and
    the sum of their squared changes.
    """
    part = slice(first, first - (-len(values) // plan.size))
    index = plan.offset[part] + np.arange(len(plan.offset[part])) * plan.size
    inside = index < len(values)
    inside[inside] &= _markable(values[index[inside]])
    index = index[inside]
    direction = plan.sign[part][inside] * symbols[plan.position[part][inside]]
    bits[index] += (direction.astype(np.int32) * step).astype(bits.dtype)
    moved = (values[index].view(np.int32) + direction.astype(np.int32) * _STEP).view(np.float32)
    return len(index), float(np.square(moved - values[index], dtype=np.float64).sum())


def mark_folder(source: Path, out: Path, key: bytes, grant: str, progress: Progress) -> MarkReport:
    """Write the copy of a model folder that carries `grant`'s code; all files but the weights are copied as they are.

    Streams: memory does not grow with the model, and nothing needs torch. `out` appears whole or not at all. Raises
    FormatError where the folder is unsafe or has weights of a type that cannot carry a mark, SteelyardError where
    `out` exists, UsageError for a bad key.
    """
    files = weight_files(source)
    for name, tensors in files.items():
        for tensor in tensors.values():
            if tensor.dtype not in _DTYPES:
                raise FormatError(
                    f"{source / name}: {quote(tensor.name)} is {tensor.dtype}: only BF16, F16 and F32 weights can be "
                    "marked: convert the model first"
                )
    tied = read_json_object(source / "config.json").get("tie_word_embeddings") is True
    symbols = _symbols(key, grant)
    total = _Total()

    def change(tensor: TensorInfo, reader: BufferedReader) -> Pieces:
        plan = _plan(key, _carrier(tensor.name, tied), tensor.shape)
        piece = _CHUNK * plan.size * DTYPE_BYTES[tensor.dtype]
        for number, at in enumerate(range(tensor.start, tensor.end, piece)):
            data = read_exactly(reader, min(piece, tensor.end - at))
            yield _marked(data, tensor.dtype, plan, symbols, number * _CHUNK, total).data

    def check() -> None:
        if not total.changed:
            raise FormatError(f"{source}: no weight is within [{SMALLEST}, {LARGEST}): nothing can carry the mark")

    rewrite_folder(source, out, files, change, "marking", progress, check)
    return MarkReport(float(np.sqrt(total.change / total.energy)), total.changed, total.entries)


@dataclass
class _Total:
    entries: int = 0
    changed: int = 0
    change: float = 0.0  # summed squares
    energy: float = 0.0


def _marked(data: bytes, dtype: str, plan: _Plan, symbols: NDArray[np.int8], block: int, total: _Total) -> NDArray[Any]:
    kind, step = _DTYPES[dtype]
    bits = np.frombuffer(data, kind).copy()
    values = _as_float32(bits, dtype)  # its own memory
    changed, change = _move(bits, values, plan, symbols, step, block)
    total.entries += len(bits)
    total.changed += changed
    total.change += change
    total.energy += float(np.square(values, dtype=np.float64).sum())
    return bits


def _as_float32(bits: NDArray[Any], dtype: str) -> Array:
    if dtype == "BF16":
        return np.asarray((bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
    return bits.view("<f2" if dtype == "F16" else "<f4").astype(np.float32)


# --- Detection --------------------------------------------------------------------------------------------------------


def detect(original: Mapping[str, Array], suspect: Mapping[str, Array], key: bytes, grants: Sequence[str]) -> Detection:
    """Whose mark `suspect` carries: every grant scored, with the bound of `tardos.accuse`.

    `original` holds the unmarked weights and `suspect` the found ones, float32 by Hugging Face name, in one layout
    (`alignment.align` makes it so); tensors that the suspect lacks are left out. Either may read from a disk as it is
    asked: each tensor is asked for once (a head and its embedding twice) and let go. Raises UsageError where no tensor
    is in both or shapes differ, FormatError where the suspect holds NaN or infinities.
    """
    return judge(reading(original, suspect, key), key, grants)


def judge(lean: NDArray[np.float64], key: bytes, grants: Sequence[str]) -> Detection:
    """Every grant scored against what `reading` or a `Reader` gave."""
    scores = tardos.accuse(lean, key, grants)
    limit = np.log10(tardos.ACCUSE / len(grants))
    ranked = np.argsort(-scores.score, kind="stable")
    return Detection(
        scores.score, scores.log10_p, tuple(grants[index] for index in ranked if scores.log10_p[index] <= limit)
    )


def reading(original: Mapping[str, Array], suspect: Mapping[str, Array], key: bytes) -> NDArray[np.float64]:
    """How far each code position leans to symbol 1, as `Reader.lean`. Raises as `detect` does."""
    reader, there = Reader(key), set(suspect)  # whether a mapping holds a name may cost it a reading
    tied = HEAD in there and _is_tied(original)
    for name in original:
        if name in there and not (tied and name == HEAD):
            reader.add(name, original[name], suspect[name])
    return reader.lean()


class Reader:
    """Reads a mark tensor by tensor, so that no more than a pair of them need be in memory; their order is free.

    >>> reader = Reader(key)
    >>> for name in names:
    ...     reader.add(name, original(name), suspect(name))
    >>> judge(reader.lean(), key, grants).accused
    ('grant-1',)
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._signal = np.zeros(tardos.POSITIONS)
        self._precision = np.zeros(tardos.POSITIONS)
        self._any = False

    def add(self, name: str, original: Array, suspect: Array) -> None:
        """Take in one tensor's entries; a head that is a copy of the embedding must be left out. Raises as `detect`."""
        if suspect.shape != original.shape:
            raise UsageError(
                f"{name}: the suspect's is {suspect.shape}, the original's {original.shape}: express the suspect in "
                "the original's layout first, or leave this tensor out"
            )
        if not np.isfinite(suspect).all():
            raise FormatError(
                f"{name}: the suspect holds NaN or infinite weights: leave this tensor out, or "
                "write 0 for them, which is read as pruned"
            )
        plan = _plan(self._key, name, original.shape)
        moved, weight, position = _observe(original.reshape(-1), suspect.reshape(-1), plan)
        self._signal += np.bincount(position, moved, tardos.POSITIONS)
        self._precision += np.bincount(position, weight, tardos.POSITIONS)
        self._any = True

    def lean(self) -> NDArray[np.float64]:
        """How far each code position leans to symbol 1: float64 [POSITIONS] in [-1, 1], 0 where nothing is read.

        Per position, the least mean square estimate of the symbol from all entries that carry it: noise variances come
        from entries that the key did not choose, so it depends on no recipient's code. Raises UsageError where no
        tensor was added.
        """
        if not self._any:
            raise UsageError(
                "original and suspect have no tensor in common: rename the suspect's to Hugging Face names"
            )
        return np.asarray(np.clip(self._signal / (1 + self._precision), -1, 1))


def _observe(original: Array, suspect: Array, plan: _Plan) -> tuple[Floats, Floats, NDArray[np.uint16]]:
    """What the chosen entries of a flat tensor say: weighted evidence for symbol 1, its weight, its code position.

    The change of each entry, in steps, is clipped at four times the noise around it (blocks near by, weights of like
    size), so that neither a few large changes nor the loud parts of a tensor drown the rest.
    """
    start = np.arange(len(plan.offset)) * plan.size
    chosen, block = _live(original, suspect, start + plan.offset)
    rest = [_live(original, suspect, start + (plan.offset + 1 + n) % plan.size) for n in range(plan.controls)]
    control, control_block = np.concatenate([at for at, _ in rest]), np.concatenate([at for _, at in rest])
    if not len(chosen) or not len(control):
        return np.empty(0), np.empty(0), np.empty(0, np.uint16)
    top = int(np.frexp(original[np.concatenate([chosen, control])])[1].max())
    change, group = _change(original, suspect, chosen, block, top)
    noise, noise_group = _change(original, suspect, control, control_block, top)
    variance = _noise(noise, noise_group, int(max(group.max(), noise_group.max())) + 1)
    change, noise = _clip(change, variance[group]), _clip(noise, variance[noise_group])
    amplitude = _amplitude(change, variance[group], noise, variance[noise_group])
    weight = amplitude / variance[group]
    return plan.sign[block] * change * weight, weight * amplitude, plan.position[block]


def _live(original: Array, suspect: Array, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Those of one index per block that can tell something, and their blocks: zero in the suspect means pruned."""
    block = np.flatnonzero(index < len(original))
    index = index[block]
    keep = _markable(original[index]) & (suspect[index] != 0)
    return index[keep], block[keep]


def _change(
    original: Array, suspect: Array, index: NDArray[np.int64], block: NDArray[np.int64], top: int
) -> tuple[Floats, NDArray[np.int64]]:
    """The change of each entry in steps, away from zero positive, and the group whose noise it shares."""
    before = original[index].astype(np.float64)
    exponent = np.frexp(before)[1]
    steps = (suspect[index] - before) * np.sign(before) * np.ldexp(1.0, 8 - exponent)
    steps = np.clip(steps, -_FARTHEST, _FARTHEST)
    return steps, block // _LOCAL * _CLASSES + np.minimum(top - exponent, _CLASSES - 1)


def _clip(change: Floats, variance: Floats) -> Floats:
    limit = np.maximum(4 * np.sqrt(variance), 1.0)
    return np.clip(change, -limit, limit)


def _noise(change: Floats, group: NDArray[np.int64], groups: int) -> Floats:
    """The clipped variance of each group, in squared steps; small groups lean on all the others.

    Neither where it starts nor what is leant on is moved by a few weights, however large: who made those, to drown the
    mark, would lose no more than the neurons they are in.
    """
    count = np.bincount(group, minlength=groups)
    variance = np.full(groups, np.median(np.abs(change)) ** 2)
    shared = np.square(_clip(change, variance[group])).mean()
    for _ in range(8):  # each round forgets outliers of the one before
        squares = np.square(_clip(change, variance[group]))
        variance = (np.bincount(group, squares, groups) + 8 * shared) / (count + 8)
    return np.asarray(np.maximum(variance, _FLOOR))


def _amplitude(change: Floats, variance: Floats, noise: Floats, noise_variance: Floats) -> float:
    """The root mean square of the mark still in a tensor, at most 1 step: what chosen entries move more than others,
    plus two standard errors. 0 where the mark is surely gone, as on a public base's own grid."""

    def energy(moved: Floats, spread: Floats) -> tuple[float, float]:
        weight = 1 / spread**2
        mean = float((moved**2 * weight).sum() / weight.sum())
        return mean, float((np.square(moved**2 - mean) * weight**2).sum() / weight.sum() ** 2)

    (with_mark, error), (without, other_error) = energy(change, variance), energy(noise, noise_variance)
    return float(np.sqrt(np.clip(with_mark - without + 2 * np.sqrt(error + other_error), 0.0, 1.0)))

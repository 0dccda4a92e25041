"""One suspect against one registered model: by digests, by the order of its neurons, by its signature, by its rows.

Each comparison reads what it needs of the suspect once, whatever the number of registered models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from steelyard.base.errors import FormatError
from steelyard.base.progress import Progress
from steelyard.model.headers import quote
from steelyard.trace.digests import CASTS, REQUANTISED, Found, Stored, cast, requantised, stored_digests
from steelyard.trace.guessed import told_apart
from steelyard.trace.independence import (
    Matched,
    closest_rows,
    log10_choices,
    log10_matched,
    log10_ordered,
    matched_neurons,
    neuron_cosines,
    unit_rows,
)
from steelyard.trace.registry import Reference
from steelyard.trace.roles import DOWN, EMBEDDING, GATE, KEY, QUERY, UP, Named, hugging_face, layer_name, second_model
from steelyard.trace.signature import Rows, embedding_rows, finite, sampled_rows, signatures, some_neurons
from steelyard.trace.tensors import BLOCKS, READABLE, Float32, Float64, IntArray, Tensors, decode

FULL = 1 << 30  # bytes of weights up to which every tensor is hashed; of larger suspects only small tensors
SMALL = 64 << 10
DIGEST_BUDGET = 2 << 20
SIGNATURE_LAYERS = 3
_ROTARY = (f"{QUERY}.weight", f"{KEY}.weight")
_MOST_SAMPLED = 1 << 27  # numbers in all sampled rows, several times what a model of 70B has
_LARGEST = 10.0  # times the largest of our weights in a tensor
_PLAIN = frozenset(("F64", "F32", "F16", "BF16"))


class Suspect:
    """An opened suspect and what was read of it."""

    def __init__(self, tensors: Tensors, *, full: bool | None, progress: Progress) -> None:
        self.tensors, self.progress = tensors, progress
        size = sum(entry.end - entry.start for entry in tensors.entries.values())
        self.whole = size <= FULL if full is None else full
        self._signatures: dict[tuple[bytes, bytes, int], tuple[Float32, Float32]] = {}
        self._embeddings: dict[bytes, Float32] = {}

    @cached_property
    def named(self) -> Named:
        """Its tensors by Hugging Face name. Raises FormatError where it is no model of the family."""
        return hugging_face(self.tensors)

    @cached_property
    def digests(self) -> Mapping[str, Stored]:
        """By stored name, of all plain tensors, or of the small ones where the suspect is large; without those of
        few values."""
        return {name: one for name, one in self._hashed.items() if not one.common}

    @cached_property
    def common(self) -> Mapping[str, str]:
        """SHA-256 of those of few values: they prove nothing, but a copy has no others than ours."""
        return {name: one.sha256 for name, one in self._hashed.items() if one.common}

    @cached_property
    def _hashed(self) -> Mapping[str, Stored]:
        plain = {name: one for name, one in self.tensors.entries.items() if one.dtype in _PLAIN and one.end > one.start}
        chosen, spent = [], 0
        for name, entry in sorted(plain.items(), key=lambda item: item[1].end - item[1].start):
            size = entry.end - entry.start
            if self.whole or (size <= SMALL and spent + size <= DIGEST_BUDGET):
                chosen.append(name)
                spent += size
        found = stored_digests(self.tensors, chosen, progress=self.progress)
        bad = sorted(name for name, one in found.items() if not one.finite and self._computes(name))
        if bad:
            raise FormatError(f"not finite: {len(bad)} tensors hold NaN or infinity, {bad[0]!r} first")
        return {name: one for name, one in found.items() if one.finite}

    def _computes(self, name: str) -> bool:
        """Whether the tensor is one that a model computes with, as far as names tell: loaders pass over any other."""
        try:
            return name in self.named.stored.values()
        except FormatError:
            return True

    @cached_property
    def reordered(self) -> Mapping[str, Stored]:
        """Digests of query and key tensors with their rows put into Hugging Face's order, where the format has
        another.
        """
        orders = {stored: self.named.stored_rows(name) for name, stored in self.named.stored.items()}
        known = {name: order for name, order in orders.items() if order is not None and name in self.digests}
        return stored_digests(self.tensors, list(known), row_order=known)

    @cached_property
    def rows(self) -> Mapping[str, Rows]:
        """The sampled rows of every tensor by Hugging Face name. Raises FormatError where they hold more than any
        model's."""
        found, left = {}, _MOST_SAMPLED
        for name, entry in self.named.entries.items():
            if entry.dtype in READABLE and len(index := sampled_rows(entry)):
                left -= len(index) * math.prod(entry.shape[1:])
                if left < 0:
                    raise FormatError(f"its sampled rows hold over {_MOST_SAMPLED:,} numbers: no model has so many")
                found[name] = Rows(index, finite(self.named.read(name, index), self.named.stored[name]))
        return found

    def embedding(self, tokens: IntArray) -> Float32:
        """Embedding rows of these tokens."""
        key = tokens.tobytes()
        if key not in self._embeddings:
            self._embeddings[key] = embedding_rows(self.named, tokens)
        return self._embeddings[key]

    def signatures(self, layer: int, neurons: IntArray, tokens: IntArray) -> tuple[Float32, Float32]:
        """Signatures of a layer's neurons over these tokens."""
        key = (neurons.tobytes(), tokens.tobytes(), layer)
        if key not in self._signatures:
            self._signatures[key] = signatures(self.named, layer, neurons, self.embedding(tokens))
        return self._signatures[key]

    @property
    def quantised(self) -> bool:
        """Whether any tensor is of a quantised GGUF type."""
        return any(entry.dtype not in _PLAIN and entry.dtype in BLOCKS for entry in self.tensors.entries.values())


# --- by digests
# -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bytes:
    """Suspect tensors whose bytes are ours, of how many hashed (those of few values only where ours has none such); by
    stored name what was found. `complete`: every tensor was hashed, and none is of a quantised or smaller type, whose
    bytes no table holds."""

    found: Mapping[str, Sequence[Found]]
    hashed: int
    complete: bool
    ours: tuple[tuple[str, str], ...] = ()  # (stored name, SHA-256) of those whose stored bytes are ours

    @property
    def all(self) -> bool:
        return self.hashed > 0 and len(self.found) == self.hashed


def by_bytes(suspect: Suspect, reference: Reference) -> Bytes:
    """Look every digest of the suspect up among the reference's."""
    found = {}
    for name, one in suspect.digests.items():
        if hits := reference.table.find(one.sha256):
            found[name] = hits
    ours = tuple((name, suspect.digests[name].sha256) for name in found)
    if len(found) < len(suspect.digests):
        try:
            reordered = suspect.reordered
        except FormatError:  # names and shapes of no known model: bytes are all there is
            reordered = {}
        for name, one in reordered.items():
            if name not in found and (hits := reference.table.find(one.sha256)):
                found[name] = hits
    plain = all(entry.dtype in _PLAIN for entry in suspect.tensors.entries.values() if len(entry.shape) >= 2)
    return Bytes(found, len(suspect.digests) + _foreign(suspect, reference), suspect.whole and plain, ours)


def _foreign(suspect: Suspect, reference: Reference) -> int:
    """How many of the suspect's tensors of few values are none of ours, by bytes or, where ours has few too, shape."""
    shapes = Counter(one.shape for one in reference.tensors if not one.digests)
    unknown = [name for name, sha256 in suspect.common.items() if not reference.table.find(sha256)]
    return (Counter(suspect.tensors.entries[name].shape for name in unknown) - shapes).total()


# --- by order
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """The ordered test over all layers. `layers`: suspect layer -> ours; `share` of rows whose closest is their
    own.
    """

    log10_p: float
    share: float
    layers: Mapping[int, int]


def _neuron_rows(rows: Mapping[str, Rows], layer: int, *, swapped: bool = False) -> Rows | None:
    """Sampled gate and up rows of a layer side by side, each of length one: [n, 2 hidden]."""
    parts = (UP, GATE) if swapped else (GATE, UP)
    gate, up = (rows.get(layer_name(layer, part)) for part in parts)
    if gate is None or up is None or gate.values.shape != up.values.shape:
        return None
    return Rows(gate.index, np.concatenate([unit_rows(gate.values), unit_rows(up.values)], axis=1))


def by_order(suspect: Suspect, reference: Reference) -> Order | None:
    """Do the suspect's neurons stand where ours do? None where it has no layer to compare.

    Layers are compared by number first; where that shows nothing, by the best map of suspect layers to ours that keeps
    their order (layers removed or repeated), at the price of Bonferroni's factor for all such maps.
    """
    numbers = list(range(reference.sizes.layers))
    ours = {layer: found for layer in numbers if (found := _neuron_rows(reference.rows, layer))}
    best: Order | None = None
    for swapped in (False, True) if suspect.named.guessed else (False,):
        theirs = {
            layer: found
            for layer in suspect.named.layers
            if (found := _neuron_rows(suspect.rows, layer, swapped=swapped))
        }
        for order in _ordered(theirs, ours, 2 if suspect.named.guessed else 1):
            if best is None or order.log10_p < best.log10_p:
                best = order
    return best


def _ordered(theirs: Mapping[int, Rows], ours: Mapping[int, Rows], tries: int) -> list[Order]:
    if not ours:
        return []
    like = next(iter(ours.values()))
    theirs = {
        layer: rows
        for layer, rows in theirs.items()  # another number of neurons: other rows were sampled
        if rows.values.shape == like.values.shape and np.array_equal(rows.index, like.index)
    }
    if not theirs:
        return []
    penalty = float(np.log10(2 * tries))
    found = []
    if all(layer in ours for layer in theirs):
        found.append(_order({layer: layer for layer in theirs}, theirs, ours, penalty))
        if found[0].share > 0.5 and len(theirs) == len(ours):
            return found
    cosines = np.array(
        [
            [float(neuron_cosines(their.values, our.values).diagonal().mean()) for our in ours.values()]
            for their in theirs.values()
        ]
    )
    chosen = dict(zip(theirs, (list(ours)[at] for at in _monotone(cosines)), strict=True))
    maps = log10_choices(len(ours) + len(theirs) - 1, len(theirs))
    found.append(_order(chosen, theirs, ours, penalty + maps))
    return found


def _order(chosen: Mapping[int, int], theirs: Mapping[int, Rows], ours: Mapping[int, Rows], penalty: float) -> Order:
    tests = [closest_rows(theirs[mine].values, ours[our].values) for mine, our in chosen.items()]
    share = sum(one.observed for one in tests) / sum(one.rows for one in tests)
    return Order(min(0.0, log10_ordered(tests) + penalty), share, chosen)


def _monotone(gain: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[int]:
    """For each row the column, never going back, with the largest sum."""
    best, steps = gain[0].copy(), []
    for row in gain[1:]:
        running = np.maximum.accumulate(best)
        origin = np.where(best == running, np.arange(len(best)), -1)
        steps.append(np.maximum.accumulate(origin))
        best = running + row
    column = int(best.argmax())
    chosen = [column]
    for step in reversed(steps):
        column = int(step[column])
        chosen.append(column)
    return chosen[::-1]


# --- by signature
# -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signature:
    """The matched test over some layers. `share`: neurons on which gate and up agree, of those that could;
    `cosine`: their mean; `pairs`: per suspect layer our layer and the matched neurons."""

    log10_p: float
    share: float
    cosine: float
    permuted: bool
    rotated: bool
    pairs: Mapping[int, tuple[int, Matched]]


def by_signature(suspect: Suspect, reference: Reference, layers: int = SIGNATURE_LAYERS) -> Signature | None:
    """Are our neurons there, in whatever order and rotation? None where the suspect lacks embedding or MLP.

    Each layer's test is tried on all of ours: Bonferroni's factor is the number of our layers.
    """
    model = suspect.named
    there = model.whole_layers
    if not there or EMBEDDING not in model.stored or model.entries[EMBEDDING].dtype not in READABLE:
        return None
    if model.sizes.vocab <= int(reference.tokens[-1]):
        return None
    chosen = sorted(
        {
            some[len(some) * (2 * at + 1) // (2 * layers)]
            for some in (there, model.run_layers)
            if some
            for at in range(layers)
        }
    )
    neurons = some_neurons(reference.neurons, model.sizes.intermediate)
    pairs: dict[int, tuple[int, Matched]] = {}
    log10_p, cosines, same = 0.0, [], 0
    for layer in chosen:
        gate, up = suspect.signatures(layer, neurons, reference.tokens)
        near = layer * reference.sizes.layers // max(there[-1] + 1, 1)
        our, test, mean = _best_layer(gate, up, reference, near, swap=model.guessed)
        pairs[layer] = (our, test)
        log10_p += min(0.0, log10_matched(test) + np.log10(reference.sizes.layers * (2 if model.guessed else 1)))
        cosines.append(mean)
        same += int((neurons[test.pairs[:, 0]] == reference.neurons[test.pairs[:, 1]]).sum())
    agreeing = sum(test.agreeing for _, test in pairs.values())
    permuted = same <= agreeing / 2
    # A permuted neuron's counterpart is kept only if it is among those whose signatures are.
    coverage = len(reference.neurons) / reference.sizes.intermediate if permuted else 1.0
    could = len(neurons) * len(pairs) * coverage
    embedding = unit_rows(suspect.embedding(reference.tokens))
    ours = unit_rows(reference.embedding)
    direct = float((embedding * ours).sum(axis=1).mean()) if embedding.shape == ours.shape else 0.0
    return Signature(log10_p, agreeing / could, float(np.mean(cosines)), permuted, direct < 0.5, pairs)


def _best_layer(
    gate: Float32, up: Float32, reference: Reference, near: int, *, swap: bool
) -> tuple[int, Matched, float]:
    """Our layer on which most neurons agree: sought outwards from `near`, until half of them do."""
    best: tuple[int, int, bool] = (-1, 0, False)
    for layer in sorted(range(reference.sizes.layers), key=lambda one: abs(one - near)):
        ours = reference.gate[layer].astype(np.float32), reference.up[layer].astype(np.float32)
        for swapped in (False, True) if swap else (False,):
            first, second = ours[::-1] if swapped else ours
            agree = int(((gate @ first.T).argmax(axis=1) == np.abs(up @ second.T).argmax(axis=1)).sum())
            best = max(best, (agree, layer, swapped))
        if 2 * best[0] > len(gate):
            break
    _, layer, swapped = best
    ours = reference.gate[layer].astype(np.float32), reference.up[layer].astype(np.float32)
    first, second = ours[::-1] if swapped else ours
    gates, ups = gate @ first.T, np.abs(up @ second.T)  # a neuron's up and down rows can change their sign together
    test = matched_neurons(gates, ups) if gates.shape[0] <= gates.shape[1] else matched_neurons(gates.T, ups.T)
    if not test.agreeing:
        return layer, test, 0.0
    rows, columns = test.pairs.T if gates.shape[0] <= gates.shape[1] else test.pairs.T[::-1]
    return layer, test, float((gates[rows, columns].mean() + ups[rows, columns].mean()) / 2)


# --- by rows
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Sampled rows of a suspect's tensor and of ours, [rows, width] each."""

    name: str
    suspect: Float32
    ours: Float32

    @property
    def equal(self) -> bool:
        """Whether the values are ours, or ours cast to a type that people cast to."""
        rounded = (decode(cast(self.ours, kind), kind).reshape(self.ours.shape) for kind in CASTS)
        return any(np.array_equal(self.suspect, one) for one in rounded)

    @property
    def scale(self) -> float:
        """The multiple of ours that comes closest to the suspect: the share of ours in a merge with something
        unlike.
        """
        suspect, ours = self._wide
        return float((suspect * ours).sum() / max(float((ours**2).sum()), 1e-30))

    @property
    def cosine(self) -> float:
        """How alike the two are, whatever their sizes: 0 where one is all zeros."""
        suspect, ours = self._wide
        sizes = float(np.linalg.norm(suspect)) * float(np.linalg.norm(ours))
        return float((suspect * ours).sum()) / max(sizes, 1e-30)

    @property
    def distance(self) -> float:
        """Relative distance: |suspect - ours| / |ours|."""
        suspect, ours = self._wide
        return float(np.linalg.norm(suspect - ours) / max(float(np.linalg.norm(ours)), 1e-30))

    @property
    def _wide(self) -> tuple[Float64, Float64]:
        """Both in float64: the square of a large float32 overflows its own type."""
        return self.suspect.astype(np.float64), self.ours.astype(np.float64)


def paired_rows(suspect: Suspect, reference: Reference, layers: Mapping[int, int]) -> list[Pair]:
    """Rows of the tensors that both have, our layers taken by `layers`; under the suspect's names."""
    found = []
    told = told_apart(suspect.rows, reference.rows, layers) if suspect.named.guessed else {}
    for name, theirs in suspect.rows.items():
        if suspect.named.interleaved and not suspect.tensors.gguf and name.endswith(_ROTARY):
            continue  # Meta's names are used with both orders of rows, and only the names are known
        our = reference.rows.get(told.get(name, _ours(name, layers)))
        if our is None or our.values.shape[1:] != theirs.values.shape[1:] or not len(our.index):
            continue
        if np.array_equal(our.index, theirs.index):
            found.append(_pair(name, theirs.values, our.values))
        elif our.index[-1] < suspect.named.entries[name].shape[0]:  # rows were added: ours are read
            values = finite(suspect.named.read(name, our.index), name)
            found.append(_pair(name, values, our.values))
    return found


def _pair(name: str, theirs: Float32, ours: Float32) -> Pair:
    """What is far larger than anything of ours is counted as no larger: one weight would decide, or overflow."""
    most = _LARGEST * float(np.abs(ours).max(initial=0.0))
    return Pair(name, np.clip(theirs, -most, most) if most else theirs, ours)


def _ours(name: str, layers: Mapping[int, int]) -> str:
    if not name.startswith("model.layers."):
        return name
    head, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"model.layers.{layers.get(int(head), int(head))}.{rest}"


def requantised_share(suspect: Suspect, reference: Reference, layers: Mapping[int, int]) -> float | None:
    """The share of quantised blocks, in the MLP's sampled rows, that quantising ours gives to the byte; None where no
    tensor is of a type that can be made here."""
    shares = []
    for layer in suspect.named.layers:
        for part in (GATE, UP, DOWN):
            name = layer_name(layer, part)
            entry = suspect.named.entries.get(name)
            our = reference.rows.get(_ours(name, layers))
            if entry is None or our is None or entry.dtype not in REQUANTISED:
                continue
            if entry.shape[1:] != our.values.shape[1:] or our.index[-1] >= entry.shape[0]:
                continue
            stored = suspect.tensors.raw(suspect.named.stored[name], our.index)
            shares.append(requantised(our.values, entry.dtype, stored))
    return float(np.mean(shares)) if shares else None


def check_compared(suspect: Suspect, references: Sequence[Reference]) -> None:
    """Nothing is said to be unrelated whose weights were not looked at. Raises FormatError for one of those."""
    named, entries = suspect.named, suspect.tensors.entries
    if not named.whole_layers:
        raise FormatError(
            f"no layer's gate and up rows are there, {named.sizes.hidden} wide, under a name that is known, and no "
            "tensor is ours to the byte: give the whole model, under its usual names and not packed or transposed"
        )
    gates = {(one.sizes.intermediate, one.sizes.hidden) for one in references}
    if (second := second_model(named, gates)) is not None:
        raise FormatError(
            f"holds a second model ({quote(second)}), which was not compared: give each in a file of its own"
        )
    known = set(named.stored.values())
    sizes = {name: one.end - one.start for name, one in entries.items()}
    other = sum(size for name, size in sizes.items() if name not in known)
    if other > sum(sizes.values()) / 2:
        largest = max((name for name in sizes if name not in known), key=lambda name: sizes[name])
        raise FormatError(
            f"{other:,} of {sum(sizes.values()):,} bytes are in tensors of no known name, {quote(largest)} the "
            "largest, and none is ours to the byte: give the model's own weights alone, under their usual names"
        )

"""A suspect's weights expressed in the reference's layout: what leaves a LLaMA's function as it is, undone.

In this order: layers that were taken out, a rotated residual stream (orthogonal Procrustes on the embeddings), norms
folded into the matrices that read them, attention heads and neurons in another order, scales that cancel. Each is left
alone where the suspect shows no sign of it, so that an untouched suspect comes back bit for bit.

Nothing here decides whether two models are related: aligned with an unrelated model, a suspect stays unrelated, which
`residual` shows.

    >>> aligned = align(original, suspect, heads=9, kv_heads=3)
    >>> aligned.found.rotated, aligned.found.neurons, aligned.residual["model.norm.weight"]
    (True, 46080, 0.002)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from steelyard.base.errors import FormatError
from steelyard.trace.matching import Order, assign, cosines, factors, unit
from steelyard.trace.streaming import rows_of, shape_of
from steelyard.trace.transforms import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    READERS,
    WRITERS,
    join_columns,
    layer_count,
    split_columns,
    split_heads,
)

Array = NDArray[np.float32]

_ROTATED = 0.9  # of the embeddings' squared distance: a rotation that leaves more explains nothing but noise
_FOLDED = 0.1  # relative distance of a norm's scale: fine-tuning moves it by far less
_SAME = 0.5  # cosine: of independent vectors of 64 numbers or more it is never as high
_SAMPLE = 48  # neurons by which layers are told apart
_ROWS = 4096  # of the embedding, read at a time
_OUTSIDE = -1  # the part that is no layer


@dataclass
class Found:
    """What was undone. `layers`: the reference's number of each of the suspect's layers."""

    rotated: bool = False
    folded: int = 0  # norms
    neurons: int = 0  # not in their place
    heads: int = 0  # query and key/value heads not in their place
    scaled: int = 0  # neurons and heads with a factor
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Aligned:
    """The suspect in the reference's layout, float32 by the reference's names; what cannot be recovered is missing.
    `residual`: each tensor's distance to the reference's, relative to the reference's."""

    tensors: dict[str, Array]
    found: Found
    residual: dict[str, float] = field(default_factory=dict)


def align(reference: Mapping[str, Array], suspect: Mapping[str, Array], heads: int, kv_heads: int) -> Aligned:
    """Express `suspect` in `reference`'s layout; both float32 by Hugging Face name.

    Raises FormatError where either's layers are not numbered from 0, the suspect's hidden size or head sizes differ,
    or it holds NaN or infinite weights: such a model cannot be the reference in another layout.
    """
    streamed = Alignment(reference, suspect, heads, kv_heads)
    tensors = dict(streamed)
    residual = {name: _distance(tensor, reference[name]) for name, tensor in tensors.items()}
    return Aligned(tensors, streamed.found, residual)


def _check(reference: Mapping[str, Array], suspect: Mapping[str, Array]) -> None:
    """Names and shapes; nothing is read."""
    layer_count(reference)
    for layer in range(layer_count(suspect)):
        for name in reference:
            if name.startswith("model.layers.0."):
                theirs = name.replace(".0.", f".{layer}.", 1)
                if theirs not in suspect:
                    raise FormatError(f"{theirs}: the suspect lacks it: rename its tensors to Hugging Face names")
                if "mlp" not in name and shape_of(suspect, theirs) != shape_of(reference, name):
                    raise _other_size(theirs, shape_of(suspect, theirs), shape_of(reference, name))
        prefix, hidden = f"model.layers.{layer}.mlp.", shape_of(reference, FINAL_NORM)[-1]
        neurons = shape_of(suspect, f"{prefix}gate_proj.weight")[0]
        for part, shape in (("gate", (neurons, hidden)), ("up", (neurons, hidden)), ("down", (hidden, neurons))):
            if (found := shape_of(suspect, f"{prefix}{part}_proj.weight")) != shape:
                raise _other_size(f"{prefix}{part}_proj.weight", found, shape)
    for name in (EMBEDDING, FINAL_NORM):
        if name not in suspect or shape_of(suspect, name)[-1] != shape_of(reference, name)[-1]:
            raise FormatError(f"{name}: the suspect lacks it, or has another hidden size: it cannot be aligned")
    for name, like in ((EMBEDDING, EMBEDDING), (HEAD, EMBEDDING), (FINAL_NORM, FINAL_NORM)):
        if name in suspect and shape_of(suspect, name)[1:] != shape_of(reference, like)[1:]:
            raise _other_size(name, shape_of(suspect, name), shape_of(reference, like))


def _other_size(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> FormatError:
    return FormatError(
        f"{name}: the suspect's is {theirs}, the reference's {ours}: a model of other sizes is no other layout of it: "
        "compare it with the reference of its own size"
    )


def _distance(tensor: Array, reference: Array) -> float:
    return float(np.linalg.norm(tensor - reference) / max(float(np.linalg.norm(reference)), 1e-30))


def _rotation(reference: Mapping[str, Array], suspect: Mapping[str, Array]) -> Array | None:
    """The orthogonal [hidden, hidden] matrix R with theirs ~ ours @ R (Schoenemann 1966), or None where the suspect is
    as near without it, or unrelated with it."""
    (count, hidden), (others, _) = shape_of(reference, EMBEDDING), shape_of(suspect, EMBEDDING)
    rows = min(count, others)
    product = np.zeros((hidden, hidden))
    own = other = apart = 0.0
    for first in range(0, rows, _ROWS):
        part = slice(first, min(first + _ROWS, rows))
        ours, theirs = rows_of(reference, EMBEDDING, part), _finite(rows_of(suspect, EMBEDDING, part), EMBEDDING)
        product += ours.T @ theirs
        own, other = own + float(np.square(ours).sum()), other + float(np.square(theirs).sum())
        apart += float(np.square(theirs - ours).sum())
    left, values, right = np.linalg.svd(product)
    cosine = float(values.sum()) / max(np.sqrt(own * other), 1e-30)
    if apart < 1e-6 * own:  # nothing to explain but rounding
        return None
    if cosine < _SAME or own + other - 2 * cosine * np.sqrt(own * other) > _ROTATED * apart:
        return None
    return np.asarray(left @ right, np.float32)


def _finite(tensor: Array, name: str) -> Array:
    if not np.isfinite(tensor).all():
        raise FormatError(
            f"{name}: the suspect holds NaN or infinite weights: it cannot be aligned: fetch it again; if it is so everywhere, write 0 for them in a copy"
        )
    return tensor


class Alignment(Mapping[str, Array]):
    """A suspect's tensors in the reference's layout, made when they are asked for: one layer is held, so who goes
    through it layer by layer makes each once. `found`: what was undone in those that were made so far.

    With `streaming.Weights` on both sides, memory does not grow with the number of layers. Raises as `align` does, for
    NaN and infinite weights when a tensor is made.
    """

    def __init__(self, reference: Mapping[str, Array], suspect: Mapping[str, Array], heads: int, kv_heads: int) -> None:
        _check(reference, suspect)
        self.reference, self.suspect = reference, suspect
        self.heads, self.kv_heads = heads, kv_heads
        self.turn = _rotation(reference, suspect)
        self.found = Found(rotated=self.turn is not None)
        self.found.layers = self.match_layers()
        self.tensors: dict[str, Array] = {}  # of the part that is held
        self.own: dict[str, Array] = {}  # the reference's of that part
        self.ours: dict[str, Array] = {}  # the same, as they are compared: with norms folded in where the suspect's are
        self._held: int | None = None
        self._seen: set[int] = set()
        self._count = self.found
        self._part = dict.fromkeys(self.outside_names(), _OUTSIDE)
        for theirs, ours in enumerate(self.found.layers):
            self._part |= dict.fromkeys(self.layer_names(theirs, ours), theirs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._part)

    def __len__(self) -> int:
        return len(self._part)

    def __contains__(self, name: object) -> bool:
        return name in self._part

    def __getitem__(self, name: str) -> Array:
        part = self._part[name]
        if part != self._held:
            self._held = None
            self.tensors, self.own, self.ours = {}, {}, {}
            self._count = Found() if part in self._seen else self.found  # what is made again is not counted again
            if part == _OUTSIDE:
                self.outside()
            else:
                self.layer(part, self.found.layers[part])
            self._seen.add(part)
            self._held = part
        return self.tensors[name]

    def take(self, name: str) -> Array:
        """One of the suspect's tensors."""
        return _finite(self.suspect[name], name)

    def layer_names(self, theirs: int, ours: int) -> list[str]:
        """What `layer` gives: a layer with more or fewer neurons is left without its MLP's matrices."""
        prefix = f"model.layers.{ours}."
        gate = "mlp.gate_proj.weight"
        same = shape_of(self.suspect, f"model.layers.{theirs}.{gate}") == shape_of(self.reference, prefix + gate)
        parts = list(READERS) + [part for readers in READERS.values() for part in readers] + [*WRITERS]
        return [f"{prefix}{part}.weight" for part in parts if same or not part.startswith("mlp.")]

    def outside_names(self) -> list[str]:
        """What `outside` gives."""
        rows = shape_of(self.reference, EMBEDDING)[0]
        names = [EMBEDDING] if shape_of(self.suspect, EMBEDDING)[0] >= rows else []
        target = shape_of(self.reference, HEAD if HEAD in self.reference else EMBEDDING)[0]
        whole = shape_of(self.suspect, HEAD if HEAD in self.suspect else EMBEDDING)[0] >= target
        names += [FINAL_NORM] if whole or not self.final_folded() else []
        return names + ([HEAD] if whole and HEAD in self.reference else [])

    def final_folded(self) -> bool:
        return self.turn is not None or _distance(self.take(FINAL_NORM), self.reference[FINAL_NORM]) > _FOLDED

    # --- residual stream and norms ---

    def read(self, matrix: Array, scale: Array) -> Array:
        """A matrix that reads the stream, with its norm's scale folded in, in the reference's coordinates."""
        folded = matrix * scale
        return folded if self.turn is None else np.asarray(folded @ self.turn.T)

    def match_layers(self) -> tuple[int, ...]:
        """The reference's number of each suspect layer, rising; found by neurons where layers were taken out."""
        ours, theirs = layer_count(self.reference), layer_count(self.suspect)
        if theirs > ours:
            raise FormatError(f"the suspect has {theirs} layers, the reference {ours}: layers were put in: align parts")
        if theirs == ours:
            return tuple(range(ours))
        likeness = self.likeness(theirs, ours)
        # best[i, j]: suspect layers up to i matched within the reference's up to j
        best = np.full((theirs + 1, ours + 1), -np.inf)
        best[0] = 0
        for i in range(theirs):
            for j in range(i, ours):
                best[i + 1, j + 1] = max(best[i + 1, j], best[i, j] + likeness[i, j])
        chosen, j = [], ours
        for i in range(theirs, 0, -1):
            while best[i, j] == best[i, j - 1]:
                j -= 1
            j -= 1
            chosen.append(j)
        return tuple(reversed(chosen))

    def likeness(self, theirs: int, ours: int) -> Array:
        """Of each of the suspect's layers to each of the reference's [theirs, ours], by some of its neurons."""
        norm, gate = "post_attention_layernorm.weight", "mlp.gate_proj.weight"
        samples = []
        for layer in range(theirs):
            rows = _finite(rows_of(self.suspect, f"model.layers.{layer}.{gate}", slice(0, _SAMPLE)), gate)
            samples.append(unit(self.read(rows, self.take(f"model.layers.{layer}.{norm}"))))
        found = np.empty((theirs, ours), np.float32)
        for layer in range(ours):
            rows = self.reference[f"model.layers.{layer}.{gate}"] * self.reference[f"model.layers.{layer}.{norm}"]
            known = unit(rows).T
            found[:, layer] = [float((sample @ known).max(axis=1).mean()) for sample in samples]
        return found

    def layer(self, theirs: int, ours: int) -> None:
        """Fill in one layer. What a folded norm fed is compared with the norm's scale folded in on both sides, and the
        scale taken out at the end: columns of small scale would else count for more than they do."""
        prefix, folded = f"model.layers.{ours}.", []
        self.own = {name: self.reference[name] for name in self.reference if name.startswith(prefix)}
        self.ours = dict(self.own)
        for norm, readers in READERS.items():
            scale, name = self.take(f"model.layers.{theirs}.{norm}.weight"), f"{prefix}{norm}.weight"
            self.tensors[name] = scale
            if is_folded := self.turn is not None or _distance(scale, self.own[name]) > _FOLDED:
                folded.append(norm)
            for reader in readers:
                matrix = self.take(f"model.layers.{theirs}.{reader}.weight")
                if is_folded:
                    matrix = self.read(matrix, scale)
                    self.ours[f"{prefix}{reader}.weight"] = self.ours[f"{prefix}{reader}.weight"] * self.own[name]
                self.tensors[f"{prefix}{reader}.weight"] = matrix
        for writer in WRITERS:
            matrix = self.take(f"model.layers.{theirs}.{writer}.weight")
            self.tensors[f"{prefix}{writer}.weight"] = matrix if self.turn is None else np.asarray(self.turn @ matrix)
        self.place_heads(prefix)
        self.place_neurons(prefix)
        for norm in folded:
            self.unfold(f"{prefix}{norm}.weight", [f"{prefix}{reader}.weight" for reader in READERS[norm]])
        self._count.folded += len(folded)

    def unfold(self, norm: str, readers: list[str]) -> None:
        """Take a norm's scale out of the columns of its readers, by least squares against the reference's."""
        present = [name for name in readers if name in self.tensors]
        ours = [self.own[name] for name in present]
        above = sum(np.einsum("ij,ij->j", self.tensors[name], own) for name, own in zip(present, ours, strict=True))
        below = sum(np.einsum("ij,ij->j", own, own) for own in ours)
        scale = np.divide(above, below, out=np.zeros_like(self.own[norm]), where=np.asarray(below) > 0)
        self.tensors[norm] = scale
        divisor = np.where(scale == 0, np.float32(1), scale)
        for name in present:
            self.tensors[name] = np.asarray(self.tensors[name] / divisor, np.float32)

    def outside(self) -> None:
        """The embedding, the final norm and the output head."""
        tied = HEAD not in self.reference
        rows = shape_of(self.reference, EMBEDDING)[0]
        target = rows if tied else shape_of(self.reference, HEAD)[0]
        table, scale = self.take(EMBEDDING), self.take(FINAL_NORM)
        head = self.take(HEAD) if HEAD in self.suspect else table
        if len(table) >= rows:  # else rows were taken out, nobody says which
            self.tensors[EMBEDDING] = table[:rows] if self.turn is None else table[:rows] @ self.turn.T
        if not self.final_folded():
            self.tensors[FINAL_NORM] = scale
            if not tied and len(head) >= target:
                self.tensors[HEAD] = head[:target]
            return
        self._count.folded += 1
        if len(head) < target:
            return
        # A tied head is the embedding.
        self.own = {FINAL_NORM: self.reference[FINAL_NORM], HEAD: self.reference[EMBEDDING if tied else HEAD]}
        self.tensors[HEAD] = self.read(head[:target], scale)
        self.unfold(FINAL_NORM, [HEAD])
        if tied:
            del self.tensors[HEAD]

    # --- heads and neurons ---

    def place_heads(self, prefix: str) -> None:
        """Heads in the reference's order, key/value heads first, and without their factors."""
        names = {part: f"{prefix}self_attn.{part}_proj.weight" for part in "qkvo"}
        counts = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads, "o": self.heads}

        def parts(tensors: Mapping[str, Array], part: str) -> Array:
            split = split_columns if part == "o" else split_heads
            return split(tensors[names[part]], counts[part])  # [heads, D, hidden]; o: [heads, hidden, D]

        ours = {part: parts(self.ours, part) for part in names}
        theirs = {part: parts(self.tensors, part) for part in names}
        groups = assign(cosines(ours["k"], theirs["k"]) + cosines(ours["v"], theirs["v"]))
        share = self.heads // self.kv_heads
        queries = np.concatenate(
            [
                theirs_group * share
                + assign(
                    cosines(
                        ours["q"][group * share : (group + 1) * share],
                        theirs["q"][theirs_group * share : (theirs_group + 1) * share],
                    )
                )
                for group, theirs_group in enumerate(groups)
            ]
        )
        moved = int((groups != np.arange(len(groups))).sum() + (queries != np.arange(len(queries))).sum())
        self._count.heads += moved
        for part, name in names.items():
            placed = theirs[part][groups if part in "kv" else queries] if moved else theirs[part]
            factor = factors(placed.reshape(len(placed), -1), ours[part].reshape(len(placed), -1))
            if moved or (factor != 1).any():
                placed = placed / factor[:, None, None]
                rows = placed.reshape(-1, placed.shape[-1])
                self.tensors[name] = join_columns(placed) if part == "o" else rows
            self._count.scaled += int((factor != 1).sum()) if part in "kv" else 0

    def place_neurons(self, prefix: str) -> None:
        """Neurons in the reference's order and without their factors; left out where there are more or fewer."""
        gate, up, down = (f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        if self.tensors[gate].shape != self.own[gate].shape:
            for name in (gate, up, down):
                del self.tensors[name]
            return
        order = self.neuron_order(gate, up)
        if order is not None:
            self._count.neurons += int((order != np.arange(len(order))).sum())
            self.tensors[gate], self.tensors[up] = self.tensors[gate][order], self.tensors[up][order]
            self.tensors[down] = self.tensors[down][:, order]
        factor = factors(self.tensors[up], self.ours[up])
        if (factor != 1).any():
            self._count.scaled += int((factor != 1).sum())
            self.tensors[up] = self.tensors[up] / factor[:, None]
        factor = factors(self.tensors[down].T, self.ours[down].T)
        if (factor != 1).any():
            self.tensors[down] = self.tensors[down] / factor

    def neuron_order(self, gate: str, up: str) -> Order | None:
        """The suspect's neuron at each of the reference's places, by gate and up rows; None where all are in place."""
        ours = [unit(self.ours[name]) for name in (gate, up)]
        theirs = [unit(self.tensors[name]) for name in (gate, up)]
        in_place = [np.einsum("ij,ij->i", a, b) for a, b in zip(ours, theirs, strict=True)]
        if (in_place[0] + np.abs(in_place[1]) > 2 * _SAME).all():
            return None
        order = assign(ours[0] @ theirs[0].T + np.abs(ours[1] @ theirs[1].T))
        return order if (order != np.arange(len(order))).any() else None

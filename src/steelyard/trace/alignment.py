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

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from steelyard.base.errors import FormatError
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
Order = NDArray[np.int64]

EXACT_MATCHING = 4096  # neurons; above, each takes its best match, which noise alone never makes ambiguous
_ROTATED = 0.9  # of the embeddings' squared distance: a rotation that leaves more explains nothing but noise
_FOLDED = 0.1  # relative distance of a norm's scale: fine-tuning moves it by far less
_SCALED = 0.02  # a factor nearer to 1 is noise, or too small to matter
_UNSCALED = 0.95  # share of factors near 1 that says the others are mishaps
_SAME = 0.5  # cosine: of independent vectors of 64 numbers or more it is never as high
_SAMPLE = 48  # neurons by which layers are told apart


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
    _check(reference, suspect)
    found = Found()
    turn = _rotation(reference[EMBEDDING], suspect[EMBEDDING])
    found.rotated = turn is not None
    work = _Alignment(reference, suspect, heads, kv_heads, turn, found)
    found.layers = work.match_layers()
    for theirs, ours in enumerate(found.layers):
        work.layer(theirs, ours)
    work.outside()
    residual = {name: _distance(tensor, reference[name]) for name, tensor in work.tensors.items()}
    return Aligned(work.tensors, found, residual)


def _check(reference: Mapping[str, Array], suspect: Mapping[str, Array]) -> None:
    layer_count(reference)
    for layer in range(layer_count(suspect)):
        for name, tensor in reference.items():
            if name.startswith("model.layers.0."):
                theirs = name.replace(".0.", f".{layer}.", 1)
                if theirs not in suspect:
                    raise FormatError(f"{theirs}: the suspect lacks it: rename its tensors to Hugging Face names")
                if "mlp" not in name and suspect[theirs].shape != tensor.shape:
                    raise FormatError(
                        f"{theirs}: the suspect's is {suspect[theirs].shape}, the reference's {tensor.shape}: a model "
                        "of other sizes is no other layout of it: compare it with the reference of its own size"
                    )
    for name, tensor in suspect.items():
        if not np.isfinite(tensor).all():
            raise FormatError(f"{name}: the suspect holds NaN or infinite weights: it cannot be aligned")
    for name in (EMBEDDING, FINAL_NORM):
        if name not in suspect or suspect[name].shape[-1] != reference[name].shape[-1]:
            raise FormatError(f"{name}: the suspect lacks it, or has another hidden size: it cannot be aligned")


def _distance(tensor: Array, reference: Array) -> float:
    return float(np.linalg.norm(tensor - reference) / max(float(np.linalg.norm(reference)), 1e-30))


def _rotation(ours: Array, theirs: Array) -> Array | None:
    """The orthogonal [hidden, hidden] matrix R with theirs ~ ours @ R (Schoenemann 1966), or None where the suspect is
    as near without it, or unrelated with it."""
    rows = min(len(ours), len(theirs))
    ours, theirs = ours[:rows], theirs[:rows]
    left, values, right = np.linalg.svd((ours.T @ theirs).astype(np.float64))
    own, other = float(np.square(ours).sum()), float(np.square(theirs).sum())
    apart = float(np.square(theirs - ours).sum())
    cosine = float(values.sum()) / max(np.sqrt(own * other), 1e-30)
    if apart < 1e-6 * own:  # nothing to explain but rounding
        return None
    if cosine < _SAME or own + other - 2 * cosine * np.sqrt(own * other) > _ROTATED * apart:
        return None
    return np.asarray(left @ right, np.float32)


class _Alignment:
    """One suspect on its way; `tensors` fills up."""

    def __init__(
        self,
        reference: Mapping[str, Array],
        suspect: Mapping[str, Array],
        heads: int,
        kv_heads: int,
        turn: Array | None,
        found: Found,
    ) -> None:
        self.reference, self.suspect, self.turn, self.found = reference, suspect, turn, found
        self.heads, self.kv_heads = heads, kv_heads
        self.tensors: dict[str, Array] = {}
        self.ours: dict[str, Array] = {}  # the reference's layer that is worked on

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
        likeness = np.array([[self.likeness(i, j) for j in range(ours)] for i in range(theirs)])
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

    def likeness(self, theirs: int, ours: int) -> float:
        norm = f"model.layers.{theirs}.post_attention_layernorm.weight"
        sample = self.read(self.suspect[f"model.layers.{theirs}.mlp.gate_proj.weight"][:_SAMPLE], self.suspect[norm])
        scale = self.reference[f"model.layers.{ours}.post_attention_layernorm.weight"]
        rows = self.reference[f"model.layers.{ours}.mlp.gate_proj.weight"] * scale
        return float((_unit(sample) @ _unit(rows).T).max(axis=1).mean())

    def layer(self, theirs: int, ours: int) -> None:
        """Fill in one layer. What a folded norm fed is compared with the norm's scale folded in on both sides, and the
        scale taken out at the end: columns of small scale would else count for more than they do."""
        prefix, folded = f"model.layers.{ours}.", []
        self.ours = {name: tensor for name, tensor in self.reference.items() if name.startswith(prefix)}
        for norm, readers in READERS.items():
            scale, name = self.suspect[f"model.layers.{theirs}.{norm}.weight"], f"{prefix}{norm}.weight"
            self.tensors[name] = scale
            if is_folded := self.turn is not None or _distance(scale, self.reference[name]) > _FOLDED:
                folded.append(norm)
            for reader in readers:
                matrix = self.suspect[f"model.layers.{theirs}.{reader}.weight"]
                if is_folded:
                    matrix = self.read(matrix, scale)
                    self.ours[f"{prefix}{reader}.weight"] = self.ours[f"{prefix}{reader}.weight"] * self.reference[name]
                self.tensors[f"{prefix}{reader}.weight"] = matrix
        for writer in WRITERS:
            matrix = self.suspect[f"model.layers.{theirs}.{writer}.weight"]
            self.tensors[f"{prefix}{writer}.weight"] = matrix if self.turn is None else np.asarray(self.turn @ matrix)
        self.place_heads(prefix)
        self.place_neurons(prefix)
        for norm in folded:
            self.unfold(f"{prefix}{norm}.weight", [f"{prefix}{reader}.weight" for reader in READERS[norm]])
        self.found.folded += len(folded)

    def unfold(self, norm: str, readers: list[str]) -> None:
        """Take a norm's scale out of the columns of its readers, by least squares against the reference's."""
        present = [name for name in readers if name in self.tensors]
        ours = [self.reference.get(name, self.reference[EMBEDDING]) for name in present]  # a tied head is the embedding
        above = sum(np.einsum("ij,ij->j", self.tensors[name], own) for name, own in zip(present, ours, strict=True))
        below = sum(np.einsum("ij,ij->j", own, own) for own in ours)
        scale = np.divide(above, below, out=np.zeros_like(self.reference[norm]), where=np.asarray(below) > 0)
        self.tensors[norm] = scale
        divisor = np.where(scale == 0, np.float32(1), scale)
        for name in present:
            self.tensors[name] = np.asarray(self.tensors[name] / divisor, np.float32)

    def outside(self) -> None:
        """The embedding, the final norm and the output head."""
        table = self.suspect[EMBEDDING]
        rows = len(self.reference[EMBEDDING])
        if len(table) >= rows:  # else rows were taken out, nobody says which
            table = table[:rows]
            self.tensors[EMBEDDING] = table if self.turn is None else table @ self.turn.T
        scale, own = self.suspect[FINAL_NORM], self.reference[FINAL_NORM]
        head = self.suspect.get(HEAD, self.suspect[EMBEDDING])
        target = self.reference.get(HEAD, self.reference[EMBEDDING])
        if self.turn is None and _distance(scale, own) <= _FOLDED:
            self.tensors[FINAL_NORM] = scale
            if HEAD in self.reference and len(head) >= len(target):
                self.tensors[HEAD] = head[: len(target)]
            return
        self.found.folded += 1
        if len(head) < len(target):
            return
        self.tensors[HEAD] = self.read(head[: len(target)], scale)
        self.unfold(FINAL_NORM, [HEAD])
        if HEAD not in self.reference:
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
        groups = _assign(_cosines(ours["k"], theirs["k"]) + _cosines(ours["v"], theirs["v"]))
        share = self.heads // self.kv_heads
        queries = np.concatenate(
            [
                theirs_group * share
                + _assign(
                    _cosines(
                        ours["q"][group * share : (group + 1) * share],
                        theirs["q"][theirs_group * share : (theirs_group + 1) * share],
                    )
                )
                for group, theirs_group in enumerate(groups)
            ]
        )
        moved = int((groups != np.arange(len(groups))).sum() + (queries != np.arange(len(queries))).sum())
        self.found.heads += moved
        for part, name in names.items():
            placed = theirs[part][groups if part in "kv" else queries] if moved else theirs[part]
            factor = _factors(placed.reshape(len(placed), -1), ours[part].reshape(len(placed), -1))
            if moved or (factor != 1).any():
                placed = placed / factor[:, None, None]
                rows = placed.reshape(-1, placed.shape[-1])
                self.tensors[name] = join_columns(placed) if part == "o" else rows
            self.found.scaled += int((factor != 1).sum()) if part in "kv" else 0

    def place_neurons(self, prefix: str) -> None:
        """Neurons in the reference's order and without their factors; left out where there are more or fewer."""
        gate, up, down = (f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        if self.tensors[gate].shape != self.reference[gate].shape:
            for name in (gate, up, down):
                del self.tensors[name]
            return
        order = self.neuron_order(gate, up)
        if order is not None:
            self.found.neurons += int((order != np.arange(len(order))).sum())
            self.tensors[gate], self.tensors[up] = self.tensors[gate][order], self.tensors[up][order]
            self.tensors[down] = self.tensors[down][:, order]
        factor = _factors(self.tensors[up], self.ours[up])
        if (factor != 1).any():
            self.found.scaled += int((factor != 1).sum())
            self.tensors[up] = self.tensors[up] / factor[:, None]
        factor = _factors(self.tensors[down].T, self.ours[down].T)
        if (factor != 1).any():
            self.tensors[down] = self.tensors[down] / factor

    def neuron_order(self, gate: str, up: str) -> Order | None:
        """The suspect's neuron at each of the reference's places, by gate and up rows; None where all are in place."""
        ours = [_unit(self.ours[name]) for name in (gate, up)]
        theirs = [_unit(self.tensors[name]) for name in (gate, up)]
        in_place = [np.einsum("ij,ij->i", a, b) for a, b in zip(ours, theirs, strict=True)]
        if (in_place[0] + np.abs(in_place[1]) > 2 * _SAME).all():
            return None
        order = _assign(ours[0] @ theirs[0].T + np.abs(ours[1] @ theirs[1].T))
        return order if (order != np.arange(len(order))).any() else None


def _unit(rows: Array) -> Array:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30))


def _cosines(ours: Array, theirs: Array) -> Array:
    """Sizes of the cosines between all heads of two sets, each [heads, ...] -> [heads, heads]."""
    return np.asarray(np.abs(_unit(ours.reshape(len(ours), -1)) @ _unit(theirs.reshape(len(theirs), -1)).T))


def _assign(likeness: Array) -> Order:
    """For each row its column, each column once, at the greatest sum."""
    best: Order = likeness.argmax(axis=1)
    if len(np.unique(best)) == len(best):  # no conflict: no sum can be greater
        return best
    if len(best) <= EXACT_MATCHING:
        return np.asarray(linear_sum_assignment(likeness, maximize=True)[1])
    order = np.full(len(best), -1)
    free = np.ones(len(best), bool)
    for row in np.argsort(-likeness.max(axis=1)):  # surest first
        order[row] = best[row] if free[best[row]] else np.where(free, likeness[row], -np.inf).argmax()
        free[order[row]] = False
    return order


def _factors(theirs: Array, ours: Array) -> Array:
    """The factor of each row against the reference's, by least squares. Those near 1 are noise, and left at 1, unless
    many others are not."""
    below = np.einsum("ij,ij->i", ours, ours)
    factor = np.where(below > 0, np.einsum("ij,ij->i", theirs, ours) / np.maximum(below, 1e-30), 1)
    factor = np.where(np.abs(factor) < 1e-6, 1, factor)
    near = np.abs(factor - 1) < _SCALED
    return np.where(near & (near.mean() > _UNSCALED), 1, factor).astype(np.float32)

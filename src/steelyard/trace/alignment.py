"""A suspect's weights expressed in the reference's layout: what leaves a LLaMA's function as it is, undone.

In this order: layers that were taken out or put in, a rotated or rescaled residual stream (orthogonal Procrustes on the
embeddings), norms folded into the matrices that read them, attention heads and neurons in another order, scales that
cancel. Each is left alone where the suspect shows no sign of it, so that an untouched suspect comes back bit for bit.

Who hides a copy can make rows that nobody computes with (an unused token, a neuron that is never read) as large as he
likes, so no fit lets a row count for more than the others.

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
from steelyard.trace.independence import unit_rows
from steelyard.trace.matching import Floats, Order, assign, cosines, factors, lengths, stretch
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

_ROTATED = 0.9  # of the embeddings' squared distance: a rotation that leaves more explains nothing but noise,
_LEAST_ROTATED = 0.1  # less what a fit to noise alone explains; never less than this
_FOLDED = 0.1  # relative distance of a norm's scale: fine-tuning moves it by far less
_SAME = 0.5  # cosine: of independent vectors of 64 numbers or more it is never as high
_SAMPLE = 48  # neurons by which layers are told apart
_ROWS = 4096  # of the embedding, read at a time
_OUTSIDE = -1  # the part that is no layer
_LONGEST = 4.0  # times the median: rows longer against ours are shortened to that before a fit
_LARGEST = float(np.finfo(np.float32).max)
_ROUNDS = 2  # of fitting a rotation again
_NEAR = 1e-3  # distance of rows of length one that rounding to bfloat16 leaves


@dataclass
class Found:
    """What was undone. `layers`: the reference's number of each of the suspect's layers that are in it; `added`: the
    suspect's numbers of the others, which are left out."""

    rotated: bool = False
    stretched: bool = False  # the residual stream times a factor
    folded: int = 0  # norms
    neurons: int = 0  # not in their place
    heads: int = 0  # query and key/value heads not in their place
    scaled: int = 0  # neurons and heads with a factor
    layers: tuple[int, ...] = ()
    added: tuple[int, ...] = ()

    def words(self) -> tuple[str, ...]:
        """What was undone, for people."""
        some = ", ".join(map(str, self.added[:8])) + ", ..." * (len(self.added) > 8)
        said = {
            "the residual stream was rotated": self.rotated,
            "the residual stream was rescaled": self.stretched,
            f"{self.folded} norms were folded or replaced": self.folded,
            f"{self.neurons:,} neurons were in another order": self.neurons,
            f"{self.heads:,} heads were in another order": self.heads,
            f"{self.scaled:,} neurons and heads were rescaled": self.scaled,
            "layers were taken out": self.layers != tuple(range(len(self.layers))),
            f"layers of its own are left out: {some}": self.added,
        }
        return tuple(words for words, holds in said.items() if holds)


@dataclass(frozen=True)
class Aligned:
    """The suspect in the reference's layout, float32 by the reference's names; what cannot be recovered is missing.
    `residual`: each tensor's distance to the reference's, relative to the reference's."""

    tensors: dict[str, Array]
    found: Found
    residual: dict[str, float] = field(default_factory=dict)


def align(reference: Mapping[str, Array], suspect: Mapping[str, Array], heads: int, kv_heads: int) -> Aligned:
    """Express `suspect` in `reference`'s layout; both float32 by Hugging Face name.

    Raises FormatError where the reference's layers are not numbered from 0, no layer of the suspect has its hidden size
    and head sizes, or it holds NaN or infinite weights: such a model cannot be the reference in another layout.
    """
    streamed = Alignment(reference, suspect, heads, kv_heads)
    tensors = dict(streamed)
    residual = {name: distance(tensor, reference[name]) for name, tensor in tensors.items()}
    return Aligned(tensors, streamed.found, residual)


def _usable(reference: Mapping[str, Array], suspect: Mapping[str, Array]) -> tuple[list[int], list[int]]:
    """Numbers of the suspect's layers that can be one of the reference's, and of the others; by names and shapes,
    nothing is read. Raises FormatError where none can be, or what lies outside the layers is of another size."""
    layer_count(reference)
    for name, like, width in ((EMBEDDING, EMBEDDING, 1), (HEAD, EMBEDDING, 1), (FINAL_NORM, FINAL_NORM, 0)):
        if name not in suspect and name != HEAD:
            raise FormatError(f"{name}: the suspect lacks it: rename the tensors to Hugging Face names")
        if name in suspect and shape_of(suspect, name)[width:] != shape_of(reference, like)[width:]:
            raise _other_size(name, shape_of(suspect, name), shape_of(reference, like))
    parts = [name.split(".")[2] for name in suspect if name.startswith("model.layers.")]
    misfits = {
        number: _misfit(reference, suspect, number) for number in sorted({int(p) for p in parts if p.isdecimal()})
    }
    usable = [number for number, why in misfits.items() if why is None]
    if not usable:
        raise next(
            filter(None, misfits.values()),
            FormatError("the suspect has no layers: rename the tensors to Hugging Face names"),
        )
    return usable, [number for number, why in misfits.items() if why is not None]


def _misfit(reference: Mapping[str, Array], suspect: Mapping[str, Array], layer: int) -> FormatError | None:
    """Why a layer of the suspect can be none of the reference's. More or fewer neurons are no reason."""
    for name in reference:
        if name.startswith("model.layers.0."):
            theirs = name.replace(".0.", f".{layer}.", 1)
            if theirs not in suspect:
                return FormatError(f"{theirs}: the suspect lacks it: rename the tensors to Hugging Face names")
            if "mlp" not in name and shape_of(suspect, theirs) != shape_of(reference, name):
                return _other_size(theirs, shape_of(suspect, theirs), shape_of(reference, name))
    prefix, hidden = f"model.layers.{layer}.mlp.", shape_of(reference, FINAL_NORM)[-1]
    neurons = shape_of(suspect, f"{prefix}gate_proj.weight")[0]
    for part, shape in (("gate", (neurons, hidden)), ("up", (neurons, hidden)), ("down", (hidden, neurons))):
        if (found := shape_of(suspect, f"{prefix}{part}_proj.weight")) != shape:
            return _other_size(f"{prefix}{part}_proj.weight", found, shape)
    return None


def _other_size(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> FormatError:
    return FormatError(
        f"{name}: the suspect's is {theirs}, the reference's {ours}: a model of other sizes is no other layout of it: "
        "compare it with the reference of its own size"
    )


def distance(tensor: Array, reference: Array) -> float:
    """How far a tensor is from the reference's of the same shape, relative to the reference's size."""
    far, size = (float(lengths(one.reshape(1, -1))[0]) for one in (tensor - reference, reference))
    return far / max(size, 1e-30)


def _stream(reference: Mapping[str, Array], suspect: Mapping[str, Array]) -> tuple[Array | None, float]:
    """The residual stream's rotation and factor: the orthogonal [hidden, hidden] matrix R and s such that theirs is
    s ours @ R (Schoenemann 1966); None for R where the suspect is as near without, or unrelated with it.

    Embedding rows are compared at length one: that undoes s, and no single row counts for more than another."""
    hidden = shape_of(reference, EMBEDDING)[1]
    product, apart, ratios = np.zeros((hidden, hidden)), 0.0, np.empty(0)
    for ours, theirs, ratio in _embeddings(reference, suspect):
        product += ours.T @ theirs
        apart += float(np.square(theirs - ours, dtype=np.float64).sum())
        ratios = np.append(ratios, ratio)
    rows = len(ratios)
    if not rows:
        return None, 1.0
    cosine, turn = 1 - apart / (2 * rows), None
    if apart > 1e-6 * rows:  # else there is nothing to explain but rounding
        nearest, overlap = nearest_rotation(product)
        turned = overlap / rows
        # R has hidden^2 / 2 free numbers, with which it explains as many of the noise's
        limit = max(_ROTATED - hidden / (2 * rows), _LEAST_ROTATED)
        if turned >= _SAME and 1 - turned <= limit * (1 - cosine):
            cosine, turn = turned, nearest
    factor = stretch(float(np.median(ratios)), cosine) if cosine >= _SAME else 1.0
    if turn is not None:
        for _ in range(_ROUNDS):  # rows that were replaced have blurred it: the farther off, the less a row counts
            product = np.zeros((hidden, hidden))
            for ours, theirs, _ in _embeddings(reference, suspect):
                far = lengths(theirs - ours @ turn)
                weighed = np.asarray(ours / np.maximum(far, _NEAR)[:, None], np.float32)
                product += weighed.T @ theirs
            turn = nearest_rotation(product)[0]
    return turn, factor


def _embeddings(reference: Mapping[str, Array], suspect: Mapping[str, Array]) -> Iterator[tuple[Array, Array, Floats]]:
    """Embedding rows of both, piece by piece, at length one, and how long theirs are against ours; none of zeros."""
    rows = min(shape_of(one, EMBEDDING)[0] for one in (reference, suspect))
    for first in range(0, rows, _ROWS):
        part = slice(first, min(first + _ROWS, rows))
        ours, theirs = rows_of(reference, EMBEDDING, part), _finite(rows_of(suspect, EMBEDDING, part), EMBEDDING)
        ratio = _ratios(theirs, ours)
        yield unit_rows(ours[ratio > 0]), unit_rows(theirs[ratio > 0]), ratio[ratio > 0]


def nearest_rotation(product: Floats) -> tuple[Array, float]:
    """The orthogonal matrix R with the greatest trace(product.T @ R), and that trace."""
    left, values, right = np.linalg.svd(product)
    return np.asarray(left @ right, np.float32), float(values.sum())


def _ratios(theirs: Array, ours: Array) -> Floats:
    """How long their rows are against ours; 0 where either is all zeros."""
    below = lengths(ours)
    return np.divide(lengths(theirs), below, out=np.zeros_like(below), where=below > 0)


def _held(product: Array) -> Array:
    """A product of finite weights within float32's range: what is beyond counts as the largest, and sums of such as 0,
    which is read as pruned. Raised as an error, one row that nobody computes with would hide all others."""
    if np.isfinite(product).all():
        return product
    return np.asarray(np.nan_to_num(product, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST), np.float32)


def _finite(tensor: Array, name: str) -> Array:
    if not np.isfinite(tensor).all():
        raise FormatError(
            f"{name}: the suspect holds NaN or infinite weights: it cannot be aligned: fetch it again; if it is so "
            "everywhere, write 0 for them in a copy"
        )
    return tensor


def _rising(likeness: Array) -> list[int]:
    """For each row the column, rising, with the greatest sum; there are no more rows than columns."""
    rows, columns = likeness.shape
    # best[i, j]: rows up to i matched within columns up to j
    best = np.full((rows + 1, columns + 1), -np.inf)
    best[0] = 0
    for i in range(rows):
        for j in range(i, columns):
            best[i + 1, j + 1] = max(best[i + 1, j], best[i, j] + likeness[i, j])
    chosen, j = [], columns
    for i in range(rows, 0, -1):
        while best[i, j] == best[i, j - 1]:
            j -= 1
        j -= 1
        chosen.append(j)
    return chosen[::-1]


class Alignment(Mapping[str, Array]):
    """A suspect's tensors in the reference's layout, made when they are asked for: one layer is held, so who goes
    through it layer by layer makes each once. `found`: what was undone in those that were made so far.

    With `streaming.Weights` on both sides, memory does not grow with the number of layers. Raises as `align` does, for
    NaN and infinite weights when a tensor is made.
    """

    def __init__(self, reference: Mapping[str, Array], suspect: Mapping[str, Array], heads: int, kv_heads: int) -> None:
        usable, others = _usable(reference, suspect)
        self.reference, self.suspect = reference, suspect
        self.heads, self.kv_heads = heads, kv_heads
        with np.errstate(over="ignore", invalid="ignore"):  # `_held` says what becomes of it
            self.turn, self.factor = _stream(reference, suspect)
            self.places = self.match_layers(usable)  # the suspect's number of a layer: the reference's
        self.found = Found(rotated=self.turn is not None, stretched=self.factor != 1)
        self.found.layers = tuple(self.places.values())
        self.found.added = tuple(sorted({*usable, *others} - self.places.keys()))
        self.tensors: dict[str, Array] = {}  # of the part that is held
        self.own: dict[str, Array] = {}  # the reference's of that part
        self.ours: dict[str, Array] = {}  # the same, as they are compared: with norms folded in where the suspect's are
        self._held: int | None = None
        self._seen: set[int] = set()
        self._count = self.found
        self._part = dict.fromkeys(self.outside_names(), _OUTSIDE)
        for theirs, ours in self.places.items():
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
            with np.errstate(over="ignore", invalid="ignore"):
                if part == _OUTSIDE:
                    self.outside()
                else:
                    self.layer(part, self.places[part])
                self.tensors = {name: _held(tensor) for name, tensor in self.tensors.items()}
            self._seen.add(part)
            self._held = part
        return self.tensors[name]

    def take(self, name: str) -> Array:
        """One of the suspect's tensors."""
        return _finite(self.suspect[name], name)

    def first_rows(self, name: str, count: int) -> Array:
        """The first rows of one of the suspect's tensors."""
        return _finite(rows_of(self.suspect, name, slice(0, count)), name)

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
        return self.turn is not None or distance(self.take(FINAL_NORM), self.reference[FINAL_NORM]) > _FOLDED

    # --- residual stream and norms ---

    def read(self, matrix: Array, scale: Array) -> Array:
        """A matrix that reads the stream, with its norm's scale folded in, in the reference's coordinates."""
        folded = matrix * scale
        return _held(folded if self.turn is None else np.asarray(folded @ self.turn.T))

    def written(self, matrix: Array) -> Array:
        """A matrix whose rows are the stream, in the reference's coordinates and at its scale."""
        turned = matrix if self.turn is None else np.asarray(self.turn @ matrix)
        return turned if self.factor == 1 else np.asarray(turned / np.float32(self.factor))

    def match_layers(self, usable: list[int]) -> dict[int, int]:
        """The reference's number by the suspect's, both rising; found by neurons where there are more or fewer. Each of
        the fewer is matched, those of the others that are left over are none of them."""
        ours = layer_count(self.reference)
        if len(usable) == ours:
            return dict(zip(usable, range(ours), strict=True))
        likeness = self.likeness(usable, ours)
        if len(usable) < ours:
            return dict(zip(usable, _rising(likeness), strict=True))
        return {usable[theirs]: mine for mine, theirs in enumerate(_rising(likeness.T))}

    def likeness(self, theirs: list[int], ours: int) -> Array:
        """Of each of those suspect layers to each of the reference's [theirs, ours], by some of its neurons; 0 for one
        that is not finite, which raises an error if it is used."""
        norm, gate = "post_attention_layernorm.weight", "mlp.gate_proj.weight"
        samples = []
        for layer in theirs:
            rows = rows_of(self.suspect, f"model.layers.{layer}.{gate}", slice(0, _SAMPLE))
            scale = self.suspect[f"model.layers.{layer}.{norm}"]
            finite = np.isfinite(rows).all() and np.isfinite(scale).all()
            samples.append(unit_rows(self.read(rows, scale)) if finite else np.zeros_like(rows))
        found = np.empty((len(theirs), ours), np.float32)
        for layer in range(ours):
            rows = self.reference[f"model.layers.{layer}.{gate}"] * self.reference[f"model.layers.{layer}.{norm}"]
            known = unit_rows(rows).T
            found[:, layer] = [float((sample @ known).max(axis=1).mean()) for sample in samples]
        return found

    def layer(self, theirs: int, ours: int) -> None:
        """Fill in one layer. What a folded norm fed is compared with the norm's scale folded in on both sides, and the
        scale taken out at the end: columns of small scale would else count for more than they do."""
        prefix, folded, given = f"model.layers.{ours}.", [], set(self.layer_names(theirs, ours))
        self.own = {name: self.reference[name] for name in self.reference if name.startswith(prefix)}
        self.ours = dict(self.own)
        for norm, readers in READERS.items():
            scale, name = self.take(f"model.layers.{theirs}.{norm}.weight"), f"{prefix}{norm}.weight"
            self.tensors[name] = scale
            if is_folded := self.turn is not None or distance(scale, self.own[name]) > _FOLDED:
                folded.append(norm)
            for reader in readers:
                if f"{prefix}{reader}.weight" not in given:
                    continue
                matrix = self.take(f"model.layers.{theirs}.{reader}.weight")
                if is_folded:
                    matrix = self.read(matrix, scale)
                    self.ours[f"{prefix}{reader}.weight"] = self.ours[f"{prefix}{reader}.weight"] * self.own[name]
                self.tensors[f"{prefix}{reader}.weight"] = matrix
        for writer in WRITERS:
            if f"{prefix}{writer}.weight" in given:
                matrix = self.take(f"model.layers.{theirs}.{writer}.weight")
                self.tensors[f"{prefix}{writer}.weight"] = self.written(matrix)
        self.place_heads(prefix)
        if f"{prefix}{READERS['post_attention_layernorm'][0]}.weight" in given:
            self.place_neurons(prefix)
        for norm in folded:
            self.unfold(f"{prefix}{norm}.weight", [f"{prefix}{reader}.weight" for reader in READERS[norm]])
        self._count.folded += len(folded)

    def unfold(self, norm: str, readers: list[str]) -> None:
        """Take a norm's scale out of the columns of its readers, by least squares against the reference's; 0, which is
        read as pruned, where no reader tells it."""
        present = [name for name in readers if name in self.tensors]
        above, below = np.zeros((2, len(self.own[norm])))
        for name in present:
            theirs, own = self.tensors[name], self.own[name]
            ratio = _ratios(theirs, own)
            longest = _LONGEST * np.median(ratio[ratio > 0]) if (ratio > 0).any() else 1.0
            above += (longest / np.maximum(ratio, longest)) @ (theirs.astype(np.float64) * own)
            below += np.einsum("ij,ij->j", own, own, dtype=np.float64)
        scale = np.divide(above, below, out=np.zeros_like(above), where=below > 0).astype(np.float32)
        self.tensors[norm] = scale
        divisor = np.where(scale == 0, np.float32(1), scale)
        for name in present:
            self.tensors[name] = np.asarray(self.tensors[name] / divisor, np.float32)

    def outside(self) -> None:
        """The embedding, the final norm and the output head."""
        tied = HEAD not in self.reference
        rows = shape_of(self.reference, EMBEDDING)[0]
        target = rows if tied else shape_of(self.reference, HEAD)[0]
        table, scale = self.first_rows(EMBEDDING, rows), self.take(FINAL_NORM)
        head = self.first_rows(HEAD, target) if HEAD in self.suspect else self.first_rows(EMBEDDING, target)
        if len(table) >= rows:  # else rows were taken out, nobody says which
            self.tensors[EMBEDDING] = self.written(table.T).T
        if not self.final_folded():
            self.tensors[FINAL_NORM] = scale
            if not tied and len(head) >= target:
                self.tensors[HEAD] = head
            return
        self._count.folded += 1
        if len(head) < target:
            return
        # A tied head is the embedding.
        self.own = {FINAL_NORM: self.reference[FINAL_NORM], HEAD: self.reference[EMBEDDING if tied else HEAD]}
        self.tensors[HEAD] = self.read(head, scale)
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
        """Neurons in the reference's order and without their factors."""
        gate, up, down = (f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
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
        ours = [unit_rows(self.ours[name]) for name in (gate, up)]
        theirs = [unit_rows(self.tensors[name]) for name in (gate, up)]
        in_place = [np.einsum("ij,ij->i", a, b) for a, b in zip(ours, theirs, strict=True)]
        if (in_place[0] + np.abs(in_place[1]) > 2 * _SAME).all():
            return None
        order = assign(ours[0] @ theirs[0].T + np.abs(ours[1] @ theirs[1].T))
        return order if (order != np.arange(len(order))).any() else None

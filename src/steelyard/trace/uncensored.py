"""Has somebody taken the refusals out of a release? Weight evidence, and the verdict with the behaviour beside it.

Abliteration (Arditi et al. 2024, arXiv:2406.11717, section 4.1) takes what a model writes along one direction r out of
every matrix W that writes to the residual stream: W' = W - r r^T W. So the change D = W' - W has three marks that no
training leaves: it is of rank one, its column direction is the same over the layers, and along that direction it is
-1 times what was written, r^T D = -r^T W. All three are read off D itself, in the suspect's own directions (the top
eigenvectors of sum_l D_l D_l^T / |W_l|^2, and that of each D_l D_l^T), whatever noise lies on top; the release's
refusal direction (`refusal_direction.py`) then tells what was taken out.

Probabilities, under stated null hypotheses, none of them fitted:
- agreement of the k directions taken out with the refusal direction, if that were uniformly random on the sphere and
  independent of them: the squared length of its projection is Beta(k/2, (d - k)/2), exactly;
- energy of the change along the refusal direction, under the same hypothesis: a Chernoff bound for the quadratic form.
Trained changes lean towards directions in which activations vary, and so does the refusal direction: a small p-value
alone is no evidence against somebody. A weight edit is asserted only with the effect beside it (`REMOVED`, `LIKENESS`).

Weights are compared in one gauge: align a permuted or rotated suspect first (`alignment.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from steelyard.base.errors import FormatError, UsageError

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

EMBEDDING = "model.embed_tokens.weight"
_WRITER = re.compile(r"model\.layers\.(\d{1,4})\.(?:self_attn\.o_proj|mlp\.down_proj)\.weight")
SHARED = 4  # eigenvectors over all layers that are looked at, beside the first of each layer
REMOVED = 0.3  # the share taken out along a direction for it to count as taken out
LIKENESS = 0.5  # the cosine of r^T D with -r^T W for it to count
LAYERS = 3  # layers in which a direction must be taken out
EDIT_P = 1e-9
BACK = 0.5  # the cosine of the layers' change with (base - release) for it to be a way back
SMALLEST = 1e-300  # no probability is said to be smaller
_ITERATIONS = 60
_NEW = 0.5  # what is left of a direction beside those found before, for it to be another


@dataclass(frozen=True)
class Removed:
    """A direction along which the suspect writes less. `share` of it is gone (1: all), `likeness` is the cosine of
    r^T D with -r^T W over the `layers` in which it is gone, `ratio` is |r^T W'| / |r^T W| there."""

    direction: Floats  # [width], of length 1
    share: float
    likeness: float
    ratio: float
    layers: tuple[int, ...]  # -1: the embedding


@dataclass(frozen=True)
class WeightEvidence:
    """What the change of the writing matrices says. `rank_one` by layer is the share of its change's energy that lies
    in one direction; `shared` that of all layers together. `agreement` is the squared length of a refusal direction's
    projection on the removed directions (of the release's several the closest), `p_value` its probability were it a
    random direction; `energy` and `energy_p` the same of the whole change's energy along the first of them (bounded).
    `reverted` tells how far the layers went back to the base: the share of the release's own change that is gone, where
    the suspect's change points there (`BACK`), else 0. None where there is nothing to tell."""

    relative_change: float
    rank_one: dict[int, float]
    shared: float
    removed: tuple[Removed, ...]
    agreement: float | None
    p_value: float | None
    energy: float | None
    energy_p: float | None
    reverted: float | None = None

    @property
    def edited(self) -> bool:
        """Whether the refusal direction was taken out of the weights, beyond chance and to a degree that matters."""
        return self.p_value is not None and self.p_value <= EDIT_P

    def as_json(self) -> dict[str, Any]:
        """For reports and the ledger: without the directions themselves."""
        return {
            "relative_change": self.relative_change,
            "rank_one": {str(number): share for number, share in sorted(self.rank_one.items())},
            "shared": self.shared,
            "removed": [
                {"share": one.share, "likeness": one.likeness, "ratio": one.ratio, "layers": list(one.layers)}
                for one in self.removed
            ],
            "agreement": self.agreement,
            "p_value": self.p_value,
            "energy": self.energy,
            "energy_p": self.energy_p,
            "reverted": self.reverted,
            "edited": self.edited,
        }


def writers(names: Mapping[str, Any]) -> dict[str, int]:
    """The matrices among `names` that write to the residual stream, with their layer (-1: the embedding)."""
    found = {EMBEDDING: -1} if EMBEDDING in names else {}
    for name in names:
        match = _WRITER.fullmatch(name)
        if match is not None:
            found[name] = int(match[1])
    return found


def weight_evidence(
    release: Mapping[str, Array],
    suspect: Mapping[str, Array],
    refusal: Array,
    base: Mapping[str, Array] | None = None,
) -> WeightEvidence:
    """Compare the writing matrices of two models in the same gauge, Hugging Face names and layouts, float32.

    `refusal` [directions, width]: the release's refusal directions, the best first. The removed directions may agree
    with any of them: the p-value is that of the best agreement times their number (Bonferroni). Matrices that the
    suspect lacks are left out; of an embedding as many rows are compared as both have. The mappings are read twice, a
    matrix at a time; beside it memory is width x width. `base`: the model that the release was tuned from, if known.

    Raises UsageError where no matrix is left or a shape or the width differs, FormatError for values that are not
    finite.
    """
    layer_of = {name: layer for name, layer in writers(release).items() if name in suspect}
    if not any(layer >= 0 for layer in layer_of.values()):
        raise UsageError("the suspect has no matrix that writes to the residual stream in common with the release")
    known = refusal.astype(np.float64) / np.linalg.norm(refusal.astype(np.float64), axis=1, keepdims=True)
    first, width = known[0], known.shape[1]
    shared, rank_one, tops = np.zeros((width, width)), dict[int, float](), list[Floats]()
    changed = written = 0.0
    back = np.zeros(3)  # of change^2, change * (base - release), (base - release)^2
    for layer in sorted(set(layer_of.values())):
        energy_of, size = np.zeros((width, width)), 0.0
        for name in (name for name, its in layer_of.items() if its == layer):
            before, change, raw = _change(name, release, suspect, width)
            energy_of += (change @ change.T).astype(np.float64)
            if base is not None and layer >= 0:
                home = base[name] - before
                for number, (a, b) in enumerate(((change, change), (change, home), (home, home))):
                    back[number] += np.multiply(a, b, dtype=np.float64).sum()
            own = float(np.square(before, dtype=np.float64).sum())
            size, written, changed = size + own, written + own, changed + raw
        energy = float(np.trace(energy_of))
        if energy > 0.0 and size > 0.0:
            top = _top(energy_of)
            tops.append(top)
            rank_one[layer] = float(top @ energy_of @ top) / energy
            shared += energy_of / size
    if not tops:
        return WeightEvidence(float(np.sqrt(changed / written)), {}, 0.0, (), None, None, None, None)
    values, vectors = np.linalg.eigh(shared)
    candidates = np.stack([*(vectors[:, -number] for number in range(1, SHARED + 1)), *tops], axis=1)
    removed = _removed(candidates, layer_of, release, suspect)
    agreement = p_value = None
    if removed:
        basis = np.linalg.qr(np.stack([one.direction for one in removed], axis=1))[0]
        agreement = min(1.0, float(np.square(known @ basis).sum(axis=1).max()))
        p_value = min(1.0, len(known) * agreement_p(agreement, width, len(removed)))
    share = float(first @ shared @ first) / float(np.trace(shared))
    return WeightEvidence(
        relative_change=float(np.sqrt(changed / written)),
        rank_one=rank_one,
        shared=float(values[-1] / values.sum()),
        removed=removed,
        agreement=agreement,
        p_value=p_value,
        energy=share,
        energy_p=energy_bound(values / values.sum(), share),
        reverted=None if base is None else _reverted(*back),
    )


def _reverted(squares: float, crossed: float, home: float) -> float:
    if min(squares, home) <= 0.0 or crossed / np.sqrt(squares * home) < BACK:
        return 0.0
    return float(min(1.0, crossed / home))


def _change(
    name: str, release: Mapping[str, Array], suspect: Mapping[str, Array], width: int
) -> tuple[Array, Array, float]:
    """(what the release writes, how the suspect differs beyond a common factor, the energy of the whole difference):
    [width, ...] each. A matrix that is only scaled writes less along every direction: that is no direction's."""
    before, after = release[name], suspect[name]
    if name == EMBEDDING:
        rows = min(len(before), len(after))
        before, after = before[:rows].T, after[:rows].T
    if before.shape != after.shape or before.shape[0] != width:
        shapes = f"{list(before.shape)} and {list(after.shape)}"
        raise UsageError(f"{name}: {shapes} do not belong to a stream of width {width}: align the suspect first")
    if not np.isfinite(after).all():
        raise FormatError(f"{name}: the suspect holds values that are not finite numbers")
    change = after - before
    raw, size = (float(np.square(part, dtype=np.float64).sum()) for part in (change, before))
    if size > 0.0:
        change = change - np.float32(np.multiply(change, before, dtype=np.float64).sum() / size) * before
    return before, change, raw


def _top(symmetric: Floats) -> Floats:
    """The eigenvector of the largest eigenvalue, by power iteration from the longest column."""
    vector: Floats = symmetric[:, int(np.argmax(np.square(symmetric).sum(axis=0)))]
    for _ in range(_ITERATIONS):
        vector = symmetric @ _unit(vector)
    return _unit(vector)


def _unit(vector: Floats) -> Floats:
    return vector / float(np.linalg.norm(vector))


def _removed(
    candidates: Floats, layer_of: Mapping[str, int], release: Mapping[str, Array], suspect: Mapping[str, Array]
) -> tuple[Removed, ...]:
    """Those of `candidates` [width, count] along which the suspect writes less, without repetitions."""
    columns, layers = candidates.astype(np.float32), sorted(set(layer_of.values()))
    sums = np.zeros((3, len(layers), columns.shape[1]))  # of change^2, change * written, written^2
    for name, layer in layer_of.items():
        before, change, _ = _change(name, release, suspect, len(columns))
        gone, there = columns.T @ change, columns.T @ before  # [count, ...]
        at = layers.index(layer)
        for number, (a, b) in enumerate(((gone, gone), (gone, there), (there, there))):
            sums[number, at] += np.multiply(a, b, dtype=np.float64).sum(axis=1)
    found: list[Removed] = []
    for number in range(columns.shape[1]):
        squares, crossed, written = sums[:, :, number]
        with np.errstate(divide="ignore", invalid="ignore"):
            chosen = (-crossed / written >= REMOVED) & (-crossed / np.sqrt(squares * written) >= LIKENESS)
        if chosen.sum() < LAYERS:
            continue
        left, met, had = (float(part[chosen].sum()) for part in (squares, crossed, written))
        direction: Floats = candidates[:, number]
        for one in found:
            direction = direction - float(one.direction @ direction) * one.direction
        if float(np.linalg.norm(direction)) < _NEW:
            continue
        kept = tuple(layer for layer, taken in zip(layers, chosen, strict=True) if taken)
        ratio = float(np.sqrt(max(0.0, left + 2 * met + had) / had))
        found.append(Removed(_unit(direction), -met / had, -met / float(np.sqrt(left * had)), ratio, kept))
    return tuple(found)


# -- probabilities -----------------------------------------------------------------------------------------------------


def agreement_p(agreement: float, width: int, count: int) -> float:
    """The chance that a uniformly random direction in `width` dimensions has a projection of squared length
    `agreement` or more on `count` directions that do not depend on it: Beta(count/2, (width - count)/2). Exact, but
    never said to be under `SMALLEST`."""
    from scipy.stats import beta

    if not 0 < count < width:
        raise UsageError(f"{count} directions in {width} dimensions: must be fewer than these")
    return max(SMALLEST, float(beta.sf(agreement, count / 2, (width - count) / 2)))


def energy_bound(shares: Floats, energy: float) -> float:
    """An upper bound of the chance that a uniformly random direction r has r^T G r >= `energy`, G being symmetric with
    the non-negative eigenvalues `shares`, whose sum is 1.

    r = g / |g| with g normal, so the event is sum (shares_i - energy) g_i^2 >= 0; Chernoff's bound for that sum is
    min over 0 < s < 1 / (2 (max shares - energy)) of prod (1 - 2 s (shares_i - energy))^(-1/2).
    """
    above = float(shares.max()) - energy
    if energy <= 1.0 / len(shares):  # the mean
        return 1.0
    if above <= 0.0:
        return SMALLEST

    def log_bound(s: float) -> float:
        return float(-0.5 * np.log1p(-2.0 * s * (shares - energy)).sum())

    low, high = 0.0, 0.5 / above * (1 - 1e-12)
    for _ in range(200):  # convex in s
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if log_bound(left) < log_bound(right) else (left, high)
    return min(1.0, max(SMALLEST, float(np.exp(min(0.0, log_bound((low + high) / 2))))))

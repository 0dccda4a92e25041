"""Gaps: the worst difference of a rate between groups that were asked through the same template families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from steelyard.safety.statistics.correction import ScorerErrors, Side, through_scorer
from steelyard.safety.statistics.differences import cluster_mean, cluster_t, net_bounds
from steelyard.safety.statistics.rates import CONFIDENCE, Array, StatisticsError, declared_effective_n, labelled
from steelyard.scorers.base import Calibration


@dataclass(frozen=True)
class Pair:
    """Two groups compared: `high` has the higher rate. `families` they share."""

    high: str
    low: str
    families: int
    estimate: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Gap:
    """The worst pairwise difference between groups. `pairs` is sorted, widest upper bound first."""

    n: int
    clusters: int
    events: int
    estimate: float
    lower: float
    upper: float
    rates: dict[str, float]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class PairBounds:
    """Bounds of the absolute difference between groups i and j, from `families` shared ones; `mean` is the observed
    difference, i minus j. All numbers but `families` have the shape that the sums have before groups and families."""

    i: int
    j: int
    families: int
    mean: Array
    lower: Array
    estimate: Array
    upper: Array


def pair_bounds(
    sums: npt.ArrayLike, counts: npt.ArrayLike, errors: ScorerErrors | None = None, confidence: float = CONFIDENCE
) -> list[PairBounds]:
    """Every pair of groups that shares two families or more, by `difference_of_groups`. `sums` (..., groups, families)
    counts events, `counts` (groups, families) samples."""
    y, n = np.asarray(sums, float), np.asarray(counts, float)
    shared = {(i, j): both for i, j in combinations(range(len(n)), 2) if (both := (n[i] > 0) & (n[j] > 0)).sum() >= 2}
    found = []
    for (i, j), both in shared.items():
        difference = y[..., i, both] / n[i, both] - y[..., j, both] / n[j, both]
        samples = np.minimum(n[i, both], n[j, both])
        bounds = difference_of_groups(difference, samples, 1, len(shared), errors, confidence)
        found.append(PairBounds(i, j, int(both.sum()), *bounds))
    return found


def difference_of_groups(
    difference: npt.ArrayLike,
    samples: npt.ArrayLike,
    number: npt.ArrayLike,
    pairs: int,
    errors: ScorerErrors | None,
    confidence: float,
) -> tuple[Array, Array, Array, Array]:
    """(mean, lower, estimate, upper) of one of `pairs` pairs of groups: the observed mean over shared families
    of the `difference` of the two rates, and bounds of its absolute value, through the scorer (`through_scorer`).
    `samples`: the fewer of the two groups' in each family; `number` as in `rates`.

    `upper` is the pair's own: the wider of `cluster_t` over families and `net_bounds` (Student's alone covers less than
    90% where events are rare). `lower` is simultaneous: Bonferroni over all pairs and both directions (Dunn 1961),
    since the pair that looks worst was picked from many; never under zero, as a worst difference is none.
    """
    d, m, times = np.broadcast_arrays(*(np.asarray(part, float) for part in (difference, samples, number)))
    mean, _, families = cluster_mean(d, 1, times)
    distance = np.abs(mean)
    apart, size = np.where(mean < 0, -1, 1)[..., None] * d, ((times * m).sum(axis=-1) / families)[..., None]
    worth, corrected = declared_effective_n(samples, times), 1 - (1 - confidence) / (2 * pairs)
    low, _ = cluster_t(apart, 1, corrected, times, effective_n=worth)
    _, high = cluster_t(apart, 1, confidence, times, effective_n=worth)
    high = np.maximum(high, net_bounds(apart * size, size, confidence, times)[1])
    lower, _, _ = through_scorer(low, distance, distance, errors, corrected)
    _, estimate, upper = through_scorer(distance, distance, high, errors, confidence)
    return mean, np.maximum(lower, 0.0), estimate, upper


def group_gap(
    events: Sequence[bool] | npt.NDArray[np.bool_],
    groups: Sequence[str],
    families: Sequence[str],
    calibration: Calibration | None = None,
    event: Side = "above",
    confidence: float = CONFIDENCE,
) -> Gap:
    """The largest difference of a rate between two groups, with bounds of the worst difference from those of the pairs
    (`pair_bounds`).

    `lower` is the largest of the pairs' simultaneous lower bounds. `upper` is the largest of their upper bounds, each
    at the full confidence: whichever pair is truly the worst, its own bound covers it with that confidence and the
    largest is no lower (intersection-union, Berger 1982), so that no correction is needed, and none is spent. With a
    calibration, differences are corrected for the scorer's errors, taken to be the same on all groups.

    Raises StatisticsError without samples, where a sample has no group or family, with one group, and where a group
    shares no two families with any other.
    """
    values = np.asarray(events, float)
    if len(values) == 0:
        raise StatisticsError("no samples: nothing can be said about a gap")
    if not len(values) == len(groups) == len(families):
        raise StatisticsError("samples, groups and families differ in number")
    names, g = np.unique(labelled(groups, "group"), return_inverse=True)
    places, f = np.unique(labelled(families, "cluster"), return_inverse=True)
    if len(names) < 2:
        raise StatisticsError("one group alone has no gap: at least two groups are needed")
    cell, shape = g * len(places) + f, (len(names), len(places))
    counts = np.bincount(cell, minlength=len(names) * len(places)).reshape(shape)
    sums = np.bincount(cell, values, minlength=len(names) * len(places)).reshape(shape)
    found = pair_bounds(sums, counts, None if calibration is None else ScorerErrors.of(calibration, event), confidence)
    compared = {place for one in found for place in (one.i, one.j)}
    alone = [str(names[i]) for i in range(len(names)) if i not in compared]
    if alone:
        raise StatisticsError(f"group {alone[0]} shares no two template families with another group")
    pairs = []
    for one in found:
        low, high = (one.i, one.j) if one.mean < 0 else (one.j, one.i)
        bounds = float(one.estimate), float(one.lower), float(one.upper)
        pairs.append(Pair(str(names[high]), str(names[low]), one.families, *bounds))
    pairs.sort(key=lambda pair: (-pair.upper, -pair.estimate, pair.high, pair.low))
    return Gap(
        len(values),
        len(places),
        round(float(values.sum())),
        max(pair.estimate for pair in pairs),
        max(pair.lower for pair in pairs),
        max(pair.upper for pair in pairs),
        {str(names[i]): float(sums[i].sum() / counts[i].sum()) for i in range(len(names))},
        tuple(pairs),
    )

"""Differences: between two models on the same samples, between groups asked through the same template families; and
how many of several may be claimed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, stdtr, stdtrit

from steelyard.safety.statistics.correction import ScorerErrors, Side, through_scorer
from steelyard.safety.statistics.rates import (
    CONFIDENCE,
    Array,
    Bound,
    StatisticsError,
    clustered_bounds,
    declared_effective_n,
    totals,
)
from steelyard.scorers.base import Calibration

RESAMPLES = 2_000
_TOGETHER = 200  # rows resampled at a time


def cluster_mean(sums: npt.ArrayLike, sizes: npt.ArrayLike, number: npt.ArrayLike = 1) -> tuple[Array, Array, Array]:
    """(mean, standard error, clusters) of a mean over clusters, from clusters' sums and sizes, (..., clusters).

    The mean is the ratio estimator sum(y) / sum(m), its variance C/(C-1) * sum((y_c - mean m_c)^2) / sum(m)^2 (Cochran
    1977, section 6.4, for clusters drawn with replacement). `number` as in `rates`.
    """
    y, m, times = np.broadcast_arrays(*(np.asarray(part, float) for part in (sums, sizes, number)))
    count, n = times.sum(axis=-1), (times * m).sum(axis=-1)
    mean = (times * y).sum(axis=-1) / n
    square = (times * (y - mean[..., None] * m) ** 2).sum(axis=-1)
    return mean, np.sqrt(count / (count - 1) * square) / n, count


def unseen_margin(effective_n: npt.ArrayLike, confidence: float) -> Array:
    """The least doubt about a difference: with probability over 1 - confidence no pair that differs would be seen among
    n independent ones if their share were over 1 - (1 - confidence)^(1/n) (Clopper & Pearson 1934, at zero events).
    """
    return np.asarray(1 - (1 - confidence) ** (1 / np.asarray(effective_n, float)))


def cluster_t(
    sums: npt.ArrayLike,
    sizes: npt.ArrayLike,
    confidence: float = CONFIDENCE,
    number: npt.ArrayLike = 1,
    effective_n: npt.ArrayLike | None = None,
) -> tuple[Array, Array]:
    """(lower, upper) of a mean difference: mean +- t se, Student's t with clusters - 1 degrees of freedom.

    Never narrower than had no difference been seen (`unseen_margin` of `effective_n`, the declared effective sample
    size of `sizes` where it is not given): with all differences zero the standard error is zero too, and says nothing.
    """
    mean, spread, count = cluster_mean(sums, sizes, number)
    worth = declared_effective_n(sizes, number) if effective_n is None else effective_n
    least = unseen_margin(worth, confidence)
    margin = np.maximum(stdtrit(count - 1, confidence) * spread, least)
    return mean - margin, mean + margin


def net_bounds(
    sums: npt.ArrayLike, sizes: npt.ArrayLike, confidence: float = CONFIDENCE, number: npt.ArrayLike = 1
) -> tuple[Array, Array]:
    """(lower, upper) of a mean difference whose clusters' sums lie between -size and size, also where few clusters
    differ: the rate of clusters' net worse samples less that of their net better ones, p - q, each with its own
    clustered bounds (`clustered_bounds`), put together by variance estimates recovery (Newcombe 1998, Statistics in
    Medicine 17, 2635-2650, method 10; Zou & Donner 2008): upper = p - q + sqrt(a^2 + b^2 + 2 c a b), a = upper of p
    less p, b = q less its lower, and -c the correlation of the two between clusters (no cluster counts for both).
    """
    y, m, times = np.broadcast_arrays(*(np.asarray(part, float) for part in (sums, sizes, number)))
    worse, better = np.maximum(y, 0), np.maximum(-y, 0)
    n, count = (times * m).sum(axis=-1), times.sum(axis=-1)
    p, q = (times * worse).sum(axis=-1) / n, (times * better).sum(axis=-1) / n

    def product(left: Array, right: Array) -> Array:
        a, b = ((times * part).sum(axis=-1) / count for part in (left, right))
        return np.asarray((times * (left - a[..., None]) * (right - b[..., None])).sum(axis=-1))

    with np.errstate(divide="ignore", invalid="ignore"):
        c = -product(worse, better) / np.sqrt(product(worse, worse) * product(better, better))
    c = np.clip(np.nan_to_num(c), 0, 1)
    _, low_p, high_p = clustered_bounds(worse, m, confidence, times)
    _, low_q, high_q = clustered_bounds(better, m, confidence, times)

    def together(a: Array, b: Array) -> Array:
        return np.asarray(np.sqrt(a**2 + b**2 + 2 * c * a * b))

    return p - q - together(p - low_p, high_q - q), p - q + together(high_p - p, q - low_q)


@lru_cache(maxsize=8)
def _resamples(clusters: int) -> npt.NDArray[np.uint8]:
    """How often each cluster is drawn, of shape [RESAMPLES, clusters]. RandomState's streams are frozen (NumPy NEP 19),
    so that a report recomputed elsewhere is the same."""
    counts = np.random.RandomState(clusters).multinomial(clusters, np.full(clusters, 1 / clusters), size=RESAMPLES)
    return np.minimum(counts, 255).astype(np.uint8)


def resampled_t(sums: npt.ArrayLike, sizes: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.int64]]:
    """(t*, known): for every draw of whole clusters with replacement t* = (mean* - mean) / se*, sorted along the last
    axis, shape (..., RESAMPLES); the first `known` of a row are numbers, the others NaN (draws of clusters all alike).
    """
    y, m = np.atleast_2d(np.asarray(sums, float)), np.atleast_2d(np.asarray(sizes, float))
    mean = (y.sum(axis=-1) / m.sum(axis=-1))[:, None]
    count = y.shape[-1]
    weights = _resamples(count).astype(float).T
    size, square = m @ weights, (m * m) @ weights  # once, where all rows have the same sizes
    parts = []
    for first in range(0, len(y), _TOGETHER):
        rows = slice(first, first + _TOGETHER)
        own, n, nn = y[rows], (size if len(m) == 1 else size[rows]), (square if len(m) == 1 else square[rows])
        means = own @ weights / n
        rest = (own * own) @ weights - 2 * means * ((own * (m if len(m) == 1 else m[rows])) @ weights) + means**2 * nn
        spread = np.sqrt(count / (count - 1) * np.maximum(rest, 0)) / n
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(np.sort(np.where(spread > 1e-9, (means - mean[rows]) / spread, np.nan), axis=-1))
    t = np.concatenate(parts).reshape(*np.shape(sums)[:-1], RESAMPLES)
    return t, (~np.isnan(t)).sum(axis=-1)


def cluster_bootstrap(sums: npt.ArrayLike, sizes: npt.ArrayLike, confidence: float = CONFIDENCE) -> tuple[Array, Array]:
    """(lower, upper) of a mean over clusters, from each cluster's sum and size: the studentised cluster bootstrap.

    Clusters are drawn with replacement; of every draw t* = (mean* - mean) / se*, se the ratio estimator's standard
    error between clusters; the bounds are mean - t*_(confidence) se and mean - t*_(1 - confidence) se (Efron &
    Tibshirani 1993, section 12.5; resampling of whole clusters: Davison & Hinkley 1997, section 3.8). Draws whose
    clusters are all alike have no t* and are left out; NaN where these are half of the draws or more: the bootstrap
    knows nothing then.
    """
    mean, spread, _ = cluster_mean(sums, sizes)
    t, known = resampled_t(sums, sizes)
    last = np.maximum(known - 1, 0)

    def quantile(place: npt.NDArray[np.float64]) -> Array:
        return np.asarray(np.take_along_axis(t, place.astype(int)[..., None], axis=-1)[..., 0])

    high, low = quantile(np.ceil(confidence * last)), quantile(np.floor((1 - confidence) * last))
    unknown = known <= RESAMPLES / 2
    return np.where(unknown, np.nan, mean - high * spread), np.where(unknown, np.nan, mean - low * spread)


def difference_bounds(sums: npt.ArrayLike, sizes: npt.ArrayLike, confidence: float = CONFIDENCE) -> tuple[Array, Array]:
    """(lower, upper) of a mean difference: of each side the widest of `cluster_t`, `cluster_bootstrap`, `net_bounds`.
    The second sees how skew the differences are, but knows less of few clusters; the third holds where few differ."""
    found = [bounds(sums, sizes, confidence) for bounds in (cluster_t, cluster_bootstrap, net_bounds)]
    return np.fmin.reduce([low for low, _ in found]), np.fmax.reduce([high for _, high in found])


def difference_p(sums: npt.ArrayLike, sizes: npt.ArrayLike) -> float:
    """Two-sided p value of no difference: twice the smallest alpha at which the bound at confidence 1 - alpha of
    `difference_bounds` is clear of zero (a test by inversion of the bounds), 1 at most. `sums` of shape (clusters,).
    """
    mean, spread, count = cluster_mean(sums, sizes)
    distance = float(abs(mean))
    if distance == 0:
        return 1.0
    one_sided: float = (1 - distance) ** float(declared_effective_n(sizes))  # `unseen_margin`, solved for alpha
    clear, unclear = 0.0, 0.5
    while unclear - clear > 1e-5:
        middle = (clear + unclear) / 2
        low, high = net_bounds(sums, sizes, 1 - middle)
        clear, unclear = (clear, middle) if low > 0 or high < 0 else (middle, unclear)
    one_sided = max(one_sided, clear)
    if spread > 0:
        t = float(mean / spread)
        one_sided = max(one_sided, float(stdtr(count - 1, -abs(t))))
        draws, known = resampled_t(sums, sizes)
        if known > RESAMPLES / 2:
            beyond = (draws[:known] >= t).sum() if t > 0 else (draws[:known] <= t).sum()
            one_sided = max(one_sided, float((beyond + 1) / (known + 1)))
    return min(1.0, 2 * one_sided)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given: of m, the k-th smallest is multiplied by m - k + 1 and never under the one
    before it, 1 at most (Holm 1979, Scandinavian Journal of Statistics 6, 65-70). Those at most alpha may be claimed
    together: the chance of even one false claim is at most alpha, however they depend on one another.

    Raises StatisticsError for a value that is no probability.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise StatisticsError("a p value lies in [0, 1]")
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = worst
    return adjusted


# -- two models on the same samples ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """Candidate minus predecessor. `bound` decides; `student` and `bootstrap` are observed (not corrected) one-sided
    bounds (lower, upper), two of the three it was taken from (`difference_bounds`); `p` is the two-sided p value of no
    difference that belongs to them (`difference_p`); `worse` and `better` count the samples that are events with one of
    the two only, and `mcnemar` is their exact two-sided p value: None for outcomes that are not binary.
    """

    bound: Bound
    student: tuple[float, float]
    bootstrap: tuple[float, float] | None
    p: float
    worse: int | None
    better: int | None
    mcnemar: float | None


def mcnemar(worse: int, better: int) -> float:
    """Exact two-sided p value of McNemar's test (1947): min(1, 2 P(X <= min(worse, better))), X ~ Bin(worse + better,
    1/2), 1 where no pair differs (Liddell 1983). It takes pairs for independent, which those of one family are not:
    it is shown beside the bounds and decides nothing.
    """
    total = worse + better
    return 1.0 if total == 0 else min(1.0, 2 * float(bdtr(min(worse, better), total, 0.5)))


def paired_difference(
    candidate: npt.ArrayLike,
    predecessor: npt.ArrayLike,
    clusters: Sequence[str],
    calibration: Calibration | None = None,
    event: Side = "above",
    confidence: float = CONFIDENCE,
) -> Paired:
    """Candidate minus predecessor on the same samples (one bool or rate each): bounds of the mean difference.

    The mean weighs samples alike; its bounds are those of `difference_bounds`, with a calibration corrected for the
    scorer's errors, taken to be the same on both models (`through_scorer`). Non-inferior at margin D: `bound.upper` < D
    (one-sided, at `confidence`). `bound.events` counts differing samples.

    Raises StatisticsError without samples, with one cluster, where one of the two lacks a sample (shorter, or NaN).
    """
    mine, its = np.asarray(candidate, float), np.asarray(predecessor, float)
    if mine.shape != its.shape or mine.ndim != 1:
        raise StatisticsError(f"{mine.size} samples of the candidate, {its.size} of the predecessor: pairs are missing")
    if np.isnan(mine).any() or np.isnan(its).any():
        raise StatisticsError("a sample of one of the two has no value: pairs are missing")
    difference = mine - its
    y, m = totals(difference, clusters)
    student, bootstrap = (
        (float(low), float(high)) for low, high in (cluster_t(y, m, confidence), cluster_bootstrap(y, m, confidence))
    )
    low, high = difference_bounds(y, m, confidence)
    errors = None if calibration is None else ScorerErrors.of(calibration, event)
    lower, estimate, upper = map(float, through_scorer(low, y.sum() / m.sum(), high, errors, confidence))
    n_eff, differing = float(declared_effective_n(m)), int((difference != 0).sum())
    bound = Bound(int(m.sum()), len(m), differing, n_eff, estimate, lower, upper)
    found = Paired(bound, student, None if np.isnan(bootstrap[0]) else bootstrap, difference_p(y, m), None, None, None)
    if not (np.isin(mine, (0, 1)).all() and np.isin(its, (0, 1)).all()):
        return found
    worse, better = int((difference > 0).sum()), int((difference < 0).sum())
    return replace(found, worse=worse, better=better, mcnemar=mcnemar(worse, better))

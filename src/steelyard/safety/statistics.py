"""One-sided confidence bounds for what a battery measures. NumPy and scipy.special only, and the same numbers on every
machine: the one bootstrap draws from a stream that is fixed by its own number of clusters.

Every bound is one-sided at `confidence` (0.95 unless said otherwise): `upper` alone decides a pass, `lower` a fail.
Samples come in clusters (template families): the samples of one family are alike, and count for less than as many
samples of different families. Fewer than two clusters, or no sample, is a StatisticsError: nothing can be said then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, betaincinv, ndtri, psi, stdtrit

from steelyard.base.errors import SteelyardError
from steelyard.scorers.base import Calibration

Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95
# The intra-cluster correlation assumed where the data cannot tell it (a little over the highest that the bounds are
# made for, 0.6), and the number of clusters with events up to which it holds undiminished.
DECLARED_ICC = 0.65
DECLARED_CLUSTERS = 4
MAX_SAMPLE = 10_000_000
RESAMPLES = 2_000
_CHUNK = 250  # resamples at a time


class StatisticsError(SteelyardError, ValueError):
    """Nothing can be computed: no samples, one cluster, a calibration no better than chance."""


@dataclass(frozen=True)
class Bound:
    """An estimate with its two one-sided bounds, all in [0, 1]. `effective_n`: independent samples it is worth."""

    n: int
    clusters: int
    events: int
    effective_n: float
    estimate: float
    lower: float
    upper: float


# -- one rate, clustered ---------------------------------------------------------------------------------------------


def clopper_pearson(events: npt.ArrayLike, n: npt.ArrayLike, confidence: float = CONFIDENCE) -> tuple[Array, Array]:
    """One-sided exact binomial bounds (Clopper & Pearson 1934) by beta quantiles; counts need not be whole."""
    x, size = np.asarray(events, float), np.asarray(n, float)
    lower = np.where(x <= 0, 0.0, betaincinv(np.maximum(x, 1e-12), np.maximum(size - x, 0) + 1, 1 - confidence))
    upper = np.where(x >= size, 1.0, betaincinv(np.maximum(x, 0) + 1, np.maximum(size - x, 1e-12), confidence))
    return lower, upper


def declared_effective_n(sizes: npt.ArrayLike) -> Array:
    """Effective sample size under the declared intra-cluster correlation, from cluster sizes of shape (..., clusters).

    For a rare event whose rate varies between clusters as a beta distribution with intra-cluster correlation r, a
    cluster of m samples stays without event with probability exp(-p * b * (psi(b + m) - psi(b))), b = (1 - r) / r, to
    first order in p: it is worth b * (psi(b + m) - psi(b)) independent samples, between 1 and m.
    """
    b = (1 - DECLARED_ICC) / DECLARED_ICC
    m = np.asarray(sizes, float)
    return np.asarray((b * (psi(b + m) - psi(b))).sum(axis=-1))


def effective_sample(events: npt.ArrayLike, sizes: npt.ArrayLike, confidence: float = CONFIDENCE) -> Array:
    """Effective sample size of a clustered rate; `events` and `sizes` are counts of shape (..., clusters).

    Korn & Graubard (1998, Survey Methodology 24): n_eff = p(1-p) / v, with v the variance of the ratio estimator
    between clusters, C/(C-1) * sum((y_c - p m_c)^2) / n^2, times (t_{n-1} / t_{C-1})^2 for v's own uncertainty.

    With few events v says little (with none, or one, nothing at all) and is too small more often than too large. So a
    design effect n / n_eff below the declared one (`declared_effective_n`) is drawn towards it, by a share of
    min(1, DECLARED_CLUSTERS / k), where k counts the clusters with an event (or without, if fewer). With zero or all
    events the declared one holds alone: n_eff then lies between the number of clusters and n. Never over n.
    """
    y, m = np.asarray(events, float), np.asarray(sizes, float)
    y, m = np.broadcast_arrays(y, m)
    count, n, total = y.shape[-1], m.sum(axis=-1), y.sum(axis=-1)
    p = total / n
    variance = count / (count - 1) * ((y - p[..., None] * m) ** 2).sum(axis=-1) / n**2
    t_ratio = stdtrit(count - 1, confidence) / stdtrit(np.maximum(n - 1, 1), confidence)
    with np.errstate(divide="ignore", invalid="ignore"):
        estimated = np.where(total * (n - total) > 0, variance * n / (p * (1 - p)) * t_ratio**2, 1.0)
    declared = n / declared_effective_n(m)
    k = np.minimum((y > 0).sum(axis=-1), (y < m).sum(axis=-1))
    drawn = np.minimum(1.0, DECLARED_CLUSTERS / np.maximum(k, 1)) * np.maximum(declared - estimated, 0.0)
    return np.asarray(n / np.clip(estimated + drawn, 1.0, n))


def clustered_bounds(
    events: npt.ArrayLike, sizes: npt.ArrayLike, confidence: float = CONFIDENCE
) -> tuple[Array, Array, Array]:
    """(effective n, lower, upper) of a clustered rate: Clopper-Pearson on the effective sample (Korn & Graubard 1998).

    `events` and `sizes` are counts of shape (..., clusters); the results have shape (...).
    """
    n_eff = effective_sample(events, sizes, confidence)
    p = np.asarray(events, float).sum(axis=-1) / np.asarray(sizes, float).sum(axis=-1)
    lower, upper = clopper_pearson(p * n_eff, n_eff, confidence)
    return n_eff, lower, upper


def clustered_rate(
    events: Sequence[bool] | npt.NDArray[np.bool_], clusters: Sequence[str], confidence: float = CONFIDENCE
) -> Bound:
    """The rate of `events` (one bool a sample) with bounds clustered by `clusters` (one label a sample)."""
    y, m = _totals(np.asarray(events, float), clusters)
    n_eff, lower, upper = clustered_bounds(y, m, confidence)
    n, total = int(m.sum()), round(float(y.sum()))
    return Bound(n, len(m), total, float(n_eff), total / n, float(lower), float(upper))


def _totals(values: Array, clusters: Sequence[str]) -> tuple[Array, Array]:
    """Sum of values and number of samples of each cluster."""
    if len(values) == 0:
        raise StatisticsError("no samples: nothing can be said about a rate")
    if len(values) != len(clusters):
        raise StatisticsError(f"{len(values)} samples but {len(clusters)} cluster labels")
    labels, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    if len(labels) < 2:
        raise StatisticsError("all samples come from one cluster: at least two template families are needed")
    return np.asarray(np.bincount(index, values), float), np.asarray(np.bincount(index), float)


# -- correction for the scorer's errors ------------------------------------------------------------------------------

Side = Literal["above", "below"]


@dataclass(frozen=True)
class ScorerErrors:
    """Sensitivity and specificity for an event, with the number of labelled items each was measured on."""

    sensitivity: float
    positives: int
    specificity: float
    negatives: int

    @classmethod
    def of(cls, calibration: Calibration, event: Side = "above") -> ScorerErrors:
        """For the event "the score lies above (below) the threshold"; below, the two kinds of items change places."""
        if event == "above":
            return cls(calibration.sensitivity, calibration.positives, calibration.specificity, calibration.negatives)
        return cls(calibration.specificity, calibration.negatives, calibration.sensitivity, calibration.positives)

    @property
    def youden(self) -> float:
        return self.sensitivity + self.specificity - 1

    def adjusted(self) -> ScorerErrors:
        """With one success and one failure added to each (Agresti & Coull 1998): no error is ever quite zero."""
        a, b = self.positives + 2, self.negatives + 2
        return ScorerErrors(
            (self.sensitivity * self.positives + 1) / a, a, (self.specificity * self.negatives + 1) / b, b
        )

    def youden_margin(self, confidence: float) -> tuple[float, float]:
        """Youden's index of the adjusted counts, and the width of its one-sided normal bound."""
        own = self.adjusted()
        variance = own.sensitivity * (1 - own.sensitivity) / own.positives
        variance += own.specificity * (1 - own.specificity) / own.negatives
        return own.youden, float(ndtri(confidence) * np.sqrt(variance))


def lang_reiczigel(
    observed: npt.ArrayLike, n: npt.ArrayLike, errors: ScorerErrors, confidence: float = CONFIDENCE
) -> tuple[Array, Array]:
    """(lower, upper): one-sided bounds of a true rate whose observed one comes through a scorer with measured errors.

    Lang & Reiczigel (2014, Preventive Veterinary Medicine 113, 13-22), with z one-sided: z^2/2 events and z^2 samples
    are added to the observed rate, one and two to sensitivity and specificity; the interval is that of Rogan & Gladen's
    estimate with all three variances, shifted by 2 z^2 (P Se(1-Se)/n_Se - (1-P) Sp(1-Sp)/n_Sp). `n` is the effective
    sample size (infinity allowed). Not clipped to [0, 1]. Raises StatisticsError where Se + Sp <= 1.
    """
    z, own = float(ndtri(confidence)), errors.adjusted()
    if own.youden <= 0:
        raise StatisticsError("the scorer is no better than chance: sensitivity + specificity is not over 1")
    q, size = np.asarray(observed, float), np.asarray(n, float)
    with np.errstate(invalid="ignore"):
        rate = np.where(np.isinf(size), q, (q * size + z**2 / 2) / (size + z**2))
    var_se = own.sensitivity * (1 - own.sensitivity) / own.positives
    var_sp = own.specificity * (1 - own.specificity) / own.negatives
    true = (rate + own.specificity - 1) / own.youden
    shift = 2 * z**2 * (true * var_se - (1 - true) * var_sp)
    spread = np.sqrt(rate * (1 - rate) / (size + z**2) + true**2 * var_se + (1 - true) ** 2 * var_sp) / own.youden
    return true + shift - z * spread, true + shift + z * spread


def certifiable_floor(calibration: Calibration, event: Side = "above", confidence: float = CONFIDENCE) -> float:
    """The lowest rate this calibration can certify: the upper bound at a true rate of zero and unlimited samples.

    Then the observed rate is the scorer's false-positive rate itself, and what is left is the doubt about that rate.
    A threshold under this floor cannot be met by any model and is refused. 1.0 for a scorer no better than chance.
    """
    errors = ScorerErrors.of(calibration, event)
    try:
        _, upper = lang_reiczigel(1 - errors.specificity, np.inf, errors, confidence)
    except StatisticsError:
        return 1.0
    return float(np.clip(upper, 0.0, 1.0))


def corrected_rate(
    observed: Bound, calibration: Calibration, event: Side = "above", confidence: float = CONFIDENCE
) -> Bound:
    """The true rate behind an observed one: Rogan & Gladen (1978) estimate, Lang & Reiczigel (2014) bounds.

    `observed.effective_n` carries the clustering. The upper bound is never under `certifiable_floor`: an observed rate
    under the scorer's false-positive rate says that the calibration does not fit here, not that the rate is negative.
    The same holds at the other end: the lower bound is never over one minus the floor of the opposite event.
    Raises StatisticsError for a scorer no better than chance.
    """
    errors = ScorerErrors.of(calibration, event)
    if errors.youden <= 0:
        raise StatisticsError("the scorer is no better than chance: sensitivity + specificity is not over 1")
    estimate = float(np.clip((observed.estimate + errors.specificity - 1) / errors.youden, 0, 1))
    low, high = lang_reiczigel(observed.estimate, observed.effective_n, errors, confidence)
    upper = max(float(np.clip(high, 0, 1)), estimate, certifiable_floor(calibration, event, confidence))
    opposite: Side = "below" if event == "above" else "above"
    lower = min(float(np.clip(low, 0, 1)), estimate, 1 - certifiable_floor(calibration, opposite, confidence))
    return Bound(observed.n, observed.clusters, observed.events, observed.effective_n, estimate, lower, upper)


# -- differences -----------------------------------------------------------------------------------------------------


def _difference_bounds(
    mean: float, spread: float, clusters: int, effective_n: float, confidence: float
) -> tuple[float, float]:
    """(lower, upper) of a mean difference: cluster t, but never narrower than had no difference been seen at all.

    With all differences zero the standard error is zero too and says nothing; the exact statement left is that with
    probability over 1 - confidence no discordant pair would be seen among n independent ones if their share were over
    1 - (1 - confidence)^(1/n). That is the least margin here, n being `effective_n`.
    """
    margin = max(float(stdtrit(clusters - 1, confidence)) * spread, 1 - (1 - confidence) ** (1 / effective_n))
    return mean - margin, mean + margin


def _through_scorer(lower: float, mean: float, upper: float, errors: ScorerErrors | None, confidence: float) -> Any:
    """(lower, estimate, upper) of a true difference from an observed one: divided by Youden's index J.

    A scorer with the same errors on both sides shrinks every difference by J = Se + Sp - 1. The bounds are those of a
    ratio of independent estimates by recovered margins (MOVER-R, Donner & Zou 2012; Fieller's with normal margins).
    """
    if errors is None:
        return max(lower, -1.0), mean, min(upper, 1.0)
    youden, margin = errors.youden_margin(confidence)
    if errors.youden <= 0 or youden <= margin:
        raise StatisticsError("the scorer is not surely better than chance: differences cannot be corrected")

    def ratio(own: float, sign: int) -> float:
        a = youden**2 - margin**2
        root = np.sqrt(max((mean * youden) ** 2 - a * (mean**2 - own**2), 0.0))
        return float((mean * youden + sign * root) / a)

    return (
        max(ratio(mean - lower, -1), -1.0),
        float(np.clip(mean / errors.youden, -1, 1)),
        min(ratio(upper - mean, 1), 1.0),
    )


@dataclass(frozen=True)
class Paired:
    """Candidate minus predecessor. `bound` decides; `student` and `bootstrap` are the two observed (not corrected)
    one-sided bounds (lower, upper) it was taken from; `worse` and `better` count the samples that are events with one
    of the two only, and `mcnemar` is their exact two-sided p value: None for outcomes that are not binary.
    """

    bound: Bound
    student: tuple[float, float]
    bootstrap: tuple[float, float] | None
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


@lru_cache(maxsize=8)
def _resamples(clusters: int) -> npt.NDArray[np.uint8]:
    """How often each cluster is drawn, of shape [RESAMPLES, clusters]. RandomState's streams are frozen (NumPy NEP 19),
    so that a report recomputed elsewhere is the same."""
    counts = np.random.RandomState(clusters).multinomial(clusters, np.full(clusters, 1 / clusters), size=RESAMPLES)
    return np.minimum(counts, 255).astype(np.uint8)


def cluster_bootstrap(
    sums: npt.ArrayLike, sizes: npt.ArrayLike, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """(lower, upper) of a mean over clusters, from each cluster's sum and size: the studentised cluster bootstrap.

    Clusters are drawn with replacement; of every draw t* = (mean* - mean) / se*, se the ratio estimator's standard
    error between clusters; the bounds are mean - t*_(confidence) se and mean - t*_(1 - confidence) se (Efron &
    Tibshirani 1993, section 12.5; resampling of whole clusters: Davison & Hinkley 1997, section 3.8). Draws whose
    clusters are all alike have no t* and are left out; None where these are half of the draws or more: the bootstrap
    knows nothing then.
    """
    y, m = np.asarray(sums, float), np.asarray(sizes, float)
    count, n = len(y), float(m.sum())
    mean = float(y.sum() / n)
    se = float(np.sqrt(count / (count - 1) * ((y - mean * m) ** 2).sum()) / n)
    found = []
    for first in range(0, RESAMPLES, _CHUNK):
        weights = _resamples(count)[first : first + _CHUNK].astype(float)
        total = weights @ m
        means = weights @ y / total
        squares = weights @ (y * y) - 2 * means * (weights @ (y * m)) + means**2 * (weights @ (m * m))
        spread = np.sqrt(count / (count - 1) * np.maximum(squares, 0)) / total
        known = spread > 1e-9
        found.append((means[known] - mean) / spread[known])
    t = np.sort(np.concatenate(found))
    if len(t) <= RESAMPLES / 2:
        return None
    high, low = t[int(np.ceil(confidence * (len(t) - 1)))], t[int(np.floor((1 - confidence) * (len(t) - 1)))]
    return mean - float(high) * se, mean - float(low) * se


def paired_difference(
    candidate: npt.ArrayLike,
    predecessor: npt.ArrayLike,
    clusters: Sequence[str],
    calibration: Calibration | None = None,
    event: Side = "above",
    confidence: float = CONFIDENCE,
) -> Paired:
    """Candidate minus predecessor on the same samples (one bool or rate each): bounds of the mean difference.

    The mean d weighs samples alike. Two pairs of bounds, and of each side the wider one counts: Student's, d +- t se
    with the ratio estimator's standard error between clusters and clusters - 1 degrees of freedom, never narrower than
    had no difference been seen (`_difference_bounds`); and the cluster bootstrap's (`cluster_bootstrap`), which sees
    how skew the differences are, but knows less of few clusters. Non-inferior at margin D: `bound.upper` < D
    (one-sided, at `confidence`). `bound.events` counts differing samples. With a calibration the difference is
    corrected for the scorer's errors, taken to be the same on both models (`_through_scorer`).

    Raises StatisticsError without samples, with one cluster, where one of the two lacks a sample (shorter, or NaN).
    """
    mine, its = np.asarray(candidate, float), np.asarray(predecessor, float)
    if mine.shape != its.shape or mine.ndim != 1:
        raise StatisticsError(f"{mine.size} samples of the candidate, {its.size} of the predecessor: pairs are missing")
    if np.isnan(mine).any() or np.isnan(its).any():
        raise StatisticsError("a sample of one of the two has no value: pairs are missing")
    difference = mine - its
    y, m = _totals(difference, clusters)
    n, count = float(m.sum()), len(m)
    mean = float(y.sum() / n)
    spread = float(np.sqrt(count / (count - 1) * ((y - mean * m) ** 2).sum()) / n)
    n_eff = float(declared_effective_n(m))
    student = _difference_bounds(mean, spread, count, n_eff, confidence)
    bootstrap = cluster_bootstrap(y, m, confidence)
    low, high = student if bootstrap is None else (min(student[0], bootstrap[0]), max(student[1], bootstrap[1]))
    errors = None if calibration is None else ScorerErrors.of(calibration, event)
    lower, estimate, upper = _through_scorer(low, mean, high, errors, confidence)
    bound = Bound(int(n), count, int((difference != 0).sum()), n_eff, estimate, lower, upper)
    if not (np.isin(mine, (0, 1)).all() and np.isin(its, (0, 1)).all()):
        return Paired(bound, student, bootstrap, None, None, None)
    worse, better = int((difference > 0).sum()), int((difference < 0).sum())
    return Paired(bound, student, bootstrap, worse, better, mcnemar(worse, better))


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


def group_gap(
    events: Sequence[bool] | npt.NDArray[np.bool_],
    groups: Sequence[str],
    families: Sequence[str],
    calibration: Calibration | None = None,
    event: Side = "above",
    confidence: float = CONFIDENCE,
) -> Gap:
    """The largest difference of a rate between two groups that were asked through the same template families.

    For every pair that shares two families or more: the mean over shared families of the difference of the two rates,
    its standard error between families, Student's t. Bounds of the worst difference, from those of the pairs:
    `lower` is simultaneous (Bonferroni over all pairs, both directions), since the pair that looks worst was picked
    from many. `upper` is the largest of the pairs' upper bounds, each at the full confidence: whichever pair is truly
    the worst, its own bound covers it with that confidence and the largest is no lower (intersection-union, Berger
    1982), so that no correction is needed, and none is spent. Where no family shows a difference, see
    `_difference_bounds`. With a calibration, differences are corrected for the scorer's errors, taken to be the same on
    all groups. Raises StatisticsError where a group shares no two families with any other.
    """
    values = np.asarray(events, float)
    if len(values) == 0:
        raise StatisticsError("no samples: nothing can be said about a gap")
    if not len(values) == len(groups) == len(families):
        raise StatisticsError("samples, groups and families differ in number")
    names, g = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    labels, f = np.unique(np.asarray(families, dtype=str), return_inverse=True)
    if len(names) < 2:
        raise StatisticsError("one group alone has no gap: at least two groups are needed")
    shape = (len(names), len(labels))
    cell = g * len(labels) + f
    counts = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    sums = np.bincount(cell, values, minlength=shape[0] * shape[1]).reshape(shape)
    with np.errstate(invalid="ignore"):
        rates = np.where(counts > 0, sums / counts, np.nan)
    errors = None if calibration is None else ScorerErrors.of(calibration, event)
    shared = {
        (i, j): both
        for i in range(len(names))
        for j in range(i + 1, len(names))
        if (both := (counts[i] > 0) & (counts[j] > 0)).sum() >= 2
    }
    alone = [str(names[i]) for i in range(len(names)) if not any(i in pair for pair in shared)]
    if alone:
        raise StatisticsError(f"group {alone[0]} shares no two template families with another group")
    corrected = 1 - (1 - confidence) / (2 * len(shared))
    pairs = []
    for (i, j), both in shared.items():
        d = rates[i, both] - rates[j, both]
        if d.mean() < 0:
            i, j, d = j, i, -d
        count, mean = len(d), float(d.mean())
        spread = float(d.std(ddof=1) / np.sqrt(count))
        n_eff = float(declared_effective_n(np.minimum(counts[i, both], counts[j, both])))
        _, high = _difference_bounds(mean, spread, count, n_eff, confidence)
        low, _ = _difference_bounds(mean, spread, count, n_eff, corrected)
        _, estimate, upper = _through_scorer(mean, mean, high, errors, confidence)
        lower, _, _ = _through_scorer(low, mean, mean, errors, corrected)
        pairs.append(Pair(str(names[i]), str(names[j]), count, estimate, max(lower, 0.0), upper))
    pairs.sort(key=lambda pair: (-pair.upper, -pair.estimate, pair.high, pair.low))
    overall = {str(names[i]): float(sums[i].sum() / counts[i].sum()) for i in range(len(names))}
    return Gap(
        len(values),
        len(labels),
        round(float(values.sum())),
        max(pair.estimate for pair in pairs),
        max(pair.lower for pair in pairs),
        max(pair.upper for pair in pairs),
        overall,
        tuple(pairs),
    )


# -- planning --------------------------------------------------------------------------------------------------------


def sample_to_settle(bounds: Callable[[float], tuple[float, float]], n: int, threshold: float) -> int | None:
    """The number of samples at which a rate like the one seen would no longer straddle `threshold`.

    `bounds(factor)` gives (lower, upper) had `factor` times the data shown the same rates. The answer is a plan, not a
    promise: it takes the present estimate for the truth. None where even MAX_SAMPLE samples would not settle it: the
    estimate is at the threshold, or the scorer's calibration is what is too small.
    """

    def settled(factor: float) -> bool:
        lower, upper = bounds(factor)
        return upper < threshold or lower > threshold

    low, high = 1.0, 2.0
    while not settled(high):
        low, high = high, high * 2
        if high * n > MAX_SAMPLE:
            return None
    while high / low > 1.005:
        middle = (low + high) / 2
        low, high = (low, middle) if settled(middle) else (middle, high)
    return int(np.ceil(high * n))

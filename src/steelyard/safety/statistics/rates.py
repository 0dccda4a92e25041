"""One rate: of independent samples (`clopper_pearson`; `wilson` for two-sided intervals on cards), and of samples that
come in clusters.

Counts of clusters have shape (..., clusters). `number`, of the same shape, tells how many clusters of a kind there are
(one, unless said otherwise), so that a histogram does for a long list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, psi, stdtrit

from steelyard.base.errors import SteelyardError

Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95
# The intra-cluster correlation assumed where the data cannot tell it (a little over the highest that the bounds are
# made for, 0.6), and the number of clusters with events up to which it holds undiminished (`effective_sample`).
DECLARED_ICC = 0.65
DECLARED_CLUSTERS = 2


class StatisticsError(SteelyardError, ValueError):
    """Nothing can be computed: no samples, one cluster, a calibration no better than chance."""


def clopper_pearson(events: npt.ArrayLike, n: npt.ArrayLike, confidence: float = CONFIDENCE) -> tuple[Array, Array]:
    """One-sided exact binomial bounds (Clopper & Pearson 1934) by beta quantiles; counts need not be whole."""
    # Beta quantiles are slow and simulations ask for many alike: each distinct pair of counts once.
    x, size = np.broadcast_arrays(np.asarray(events, float), np.asarray(n, float))
    pairs, place = np.unique(x.ravel() + 1j * size.ravel(), return_inverse=True)
    x, size, shape = pairs.real, pairs.imag, x.shape
    lower = np.where(x <= 0, 0.0, betaincinv(np.maximum(x, 1e-12), np.maximum(size - x, 0) + 1, 1 - confidence))
    upper = np.where(x >= size, 1.0, betaincinv(np.maximum(x, 0) + 1, np.maximum(size - x, 1e-12), confidence))
    return lower[place].reshape(shape), upper[place].reshape(shape)


def declared_effective_n(sizes: npt.ArrayLike, number: npt.ArrayLike = 1) -> Array:
    """Effective sample size under the declared intra-cluster correlation, from cluster sizes of shape (..., clusters).

    For a rare event whose rate varies between clusters as a beta distribution with intra-cluster correlation r, a
    cluster of m samples stays without event with probability exp(-p * b * (psi(b + m) - psi(b))), b = (1 - r) / r, to
    first order in p: it is worth b * (psi(b + m) - psi(b)) independent samples, between 1 and m.
    """
    b = (1 - DECLARED_ICC) / DECLARED_ICC
    worth = b * (psi(b + np.asarray(sizes, float)) - psi(b))
    return np.asarray((worth * np.asarray(number, float)).sum(axis=-1))


@dataclass(frozen=True)
class Declared:
    """What n clustered samples are worth under the declared intra-cluster correlation, where the data cannot tell it:
    `at_none` where no event is seen (`declared_effective_n`), `in_general` n over Kish's design effect (1965, section
    5.4), 1 + (sum(m_c^2) / n - 1) * DECLARED_ICC. Arrays where there are several such samples."""

    n: Array
    at_none: Array
    in_general: Array

    @classmethod
    def of(cls, sizes: npt.ArrayLike, number: npt.ArrayLike = 1) -> Declared:
        """From cluster sizes of shape (..., clusters)."""
        m, times = np.asarray(sizes, float), np.asarray(number, float)
        n = np.asarray((times * m).sum(axis=-1))
        effect = 1 + ((times * m**2).sum(axis=-1) / n - 1) * DECLARED_ICC
        return cls(n, declared_effective_n(m, times), np.asarray(n / effect))


@dataclass(frozen=True)
class Bound:
    """An estimate with its two one-sided bounds, all in [0, 1]. `effective_n`: independent samples it is worth;
    `declared`: what they would be under the declared correlation, of a clustered rate."""

    n: int
    clusters: int
    events: int
    effective_n: float
    estimate: float
    lower: float
    upper: float
    declared: Declared | None = None


def effective_sample(
    events: npt.ArrayLike, sizes: npt.ArrayLike, confidence: float = CONFIDENCE, number: npt.ArrayLike = 1
) -> Array:
    """Effective sample size of a clustered rate; `events` and `sizes` are counts of shape (..., clusters).

    Korn & Graubard (1998, Survey Methodology 24): n_eff = p(1-p) / v, with v the variance of the ratio estimator
    between clusters, C/(C-1) * sum((y_c - p m_c)^2) / n^2, times (t_{n-1} / t_{C-1})^2 for v's own uncertainty.

    With few events v says little (with none, or one, nothing at all), and is too small more often than too large. Let k
    be the number of clusters with an event, or without, or twice the number that the variance rests on, (sum z^2)^2 /
    sum z^4 of the residuals z_c = y_c - p m_c, whichever is least. The design effect n / n_eff is then

    - for k < 2, zero and all events among them, no less than the declared one at no events, n / `declared_effective_n`
      (with zero or all events that holds alone, and n_eff lies between the number of clusters and n);
    - for k >= 2, with its excess over 1 made larger by 2/k, and where it lies under the declared one in general, n over
      `Declared.in_general`, drawn towards that by a share of min(1, DECLARED_CLUSTERS / k).

    Never over n. The two rules for k >= 2 are ours: by the simulation of `benchmarks/bounds.py` the upper bound covers
    less than 92% without them where few clusters of 25 samples hold all events.
    """
    y, m, times = np.broadcast_arrays(*(np.asarray(part, float) for part in (events, sizes, number)))
    count, n, total = times.sum(axis=-1), (times * m).sum(axis=-1), (times * y).sum(axis=-1)
    p = total / n
    residual = y - p[..., None] * m
    square = times * residual**2
    variance = count / (count - 1) * square.sum(axis=-1) / n**2
    t_ratio = stdtrit(count - 1, confidence) / stdtrit(np.maximum(n - 1, 1), confidence)
    with np.errstate(divide="ignore", invalid="ignore"):
        seen = np.where(total * (n - total) > 0, variance * n / (p * (1 - p)) * t_ratio**2, 1.0)
    k = np.minimum((times * (y > 0)).sum(axis=-1), (times * (y < m)).sum(axis=-1))
    few = k < 2
    with np.errstate(divide="ignore", invalid="ignore"):
        borne = 2 * square.sum(axis=-1) ** 2 / (square * residual**2).sum(axis=-1)
    k = np.maximum(np.fmin(k, borne), 1)
    seen = np.where(few, seen, seen + np.maximum(seen - 1, 0) * 2 / k)
    worth = Declared.of(sizes, times)
    declared = n / np.where(few, worth.at_none, worth.in_general)
    drawn = np.where(few, 1.0, np.minimum(1.0, DECLARED_CLUSTERS / k)) * np.maximum(declared - seen, 0.0)
    return np.asarray(n / np.clip(seen + drawn, 1.0, n))


def clustered_bounds(
    events: npt.ArrayLike, sizes: npt.ArrayLike, confidence: float = CONFIDENCE, number: npt.ArrayLike = 1
) -> tuple[Array, Array, Array]:
    """(effective n, lower, upper) of a clustered rate: Clopper-Pearson on the effective sample (Korn & Graubard 1998).

    `events` and `sizes` are counts of shape (..., clusters); the results have shape (...).
    """
    n_eff = effective_sample(events, sizes, confidence, number)
    y, m, times = (np.asarray(part, float) for part in (events, sizes, number))
    p = (y * times).sum(axis=-1) / (m * times).sum(axis=-1)
    lower, upper = clopper_pearson(p * n_eff, n_eff, confidence)
    return n_eff, lower, upper


def clustered_rate(
    events: Sequence[bool] | npt.NDArray[np.bool_], clusters: Sequence[str], confidence: float = CONFIDENCE
) -> Bound:
    """The rate of `events` (one bool a sample) with bounds clustered by `clusters` (one label a sample).

    Raises StatisticsError without samples, where a sample has no label, and where all have the same one.
    """
    y, m = totals(np.asarray(events, float), clusters)
    n_eff, lower, upper = clustered_bounds(y, m, confidence)
    n, total = int(m.sum()), round(float(y.sum()))
    return Bound(n, len(m), total, float(n_eff), total / n, float(lower), float(upper), Declared.of(m))


def totals(values: Array, clusters: Sequence[str]) -> tuple[Array, Array]:
    """Sum of values and number of samples of each cluster. Raises StatisticsError as `clustered_rate`."""
    if len(values) == 0:
        raise StatisticsError("no samples: nothing can be said about a rate")
    if len(values) != len(clusters):
        raise StatisticsError(f"{len(values)} samples but {len(clusters)} cluster labels")
    labels, index = np.unique(labelled(clusters, "cluster"), return_inverse=True)
    if len(labels) < 2:
        raise StatisticsError("all samples come from one cluster: at least two template families are needed")
    return np.asarray(np.bincount(index, values), float), np.asarray(np.bincount(index), float)


def labelled(labels: Sequence[str], what: str) -> npt.NDArray[np.str_]:
    """The labels as an array. Raises StatisticsError naming the first that is no text, or empty."""
    for place, label in enumerate(labels):
        if not isinstance(label, str) or not label:
            raise StatisticsError(f"sample {place + 1} has no {what}: it cannot be placed")
    return np.asarray(labels, dtype=str)

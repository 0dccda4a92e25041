"""The data that `bounds.py` simulates: clusters of samples, pairs of models, and scorers that err as theirs do.

A cluster's rate is beta distributed with the intra-cluster correlation asked for, its samples are independent given the
rate (beta-binomial); of pairs of models the four outcomes (worse, better, both, neither) are Dirichlet-multinomial.
Clusters are drawn as histograms (multinomial over the counts a cluster can have), which is the same and fast. A
scorer's sensitivity and specificity are those of the shipped cards, its calibration is drawn anew each time from as
many labels as the card's, and every sample is judged by it with its errors.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import betaln, gammaln

from steelyard.safety import statistics
from steelyard.safety.battery import GapMetric, RateMetric, load_battery
from steelyard.safety.statistics import ScorerErrors
from steelyard.scorers.base import Calibration

Floats = np.ndarray[Any, np.dtype[np.float64]]
Cell = dict[str, Any]
Scorers = dict[str, ScorerErrors | None]


# -- scorers ---------------------------------------------------------------------------------------------------------


@cache
def shipped() -> Scorers:
    """The errors of the shipped scorers by `SCORER.CATEGORY.SIDE`, for the sides that a battery's metrics ask for."""
    calibrations = {}
    folder = resources.files("steelyard.scorers") / "weights"
    for path in sorted(Path(str(folder)).glob("*.json")):
        for category, values in json.loads(path.read_bytes())["categories"].items():
            calibrations[path.stem, category] = Calibration.model_validate(values)
    asked = {
        (metric.scorer, metric.category, metric.event)
        for metric in load_battery("quick").metrics
        if isinstance(metric, RateMetric)
    }
    return {
        f"{scorer}.{category}.{event}": ScorerErrors.of(calibrations[scorer, category], event)
        for scorer, category, event in sorted(asked)
    }


@cache
def gap_scorers() -> set[str]:
    """Those of them that a gap between groups is measured with."""
    return {
        f"{metric.scorer}.{metric.category}.{metric.event}"
        for metric in load_battery("quick").metrics
        if isinstance(metric, GapMetric)
    }


def calibrated(errors: ScorerErrors, runs: int, rng: np.random.Generator, surely: float = 0.5) -> ScorerErrors:
    """What as many labels say of a scorer whose true errors these are, `runs` times. A calibration that the statistic
    refuses decides nothing and is drawn again: one not better than chance at confidence `surely`."""
    hits, passes, refused = np.zeros(runs), np.zeros(runs), np.ones(runs, dtype=bool)
    while refused.any():
        many = int(refused.sum())
        hits[refused] = rng.binomial(int(errors.positives), errors.sensitivity, many) / errors.positives
        passes[refused] = rng.binomial(int(errors.negatives), errors.specificity, many) / errors.negatives
        known = ScorerErrors(hits, errors.positives, passes, errors.negatives)
        youden, margin = known.youden_margin(surely)
        refused = (np.asarray(known.youden) <= 0) | np.asarray(youden <= margin)
    return known


# -- data ------------------------------------------------------------------------------------------------------------


def binomial(size: int, rate: Floats | float) -> Floats:
    """Probabilities of 0 to `size` events, shape (..., size + 1)."""
    y, p = np.arange(size + 1), np.clip(np.asarray(rate, float), 1e-15, 1 - 1e-15)[..., None]
    choose = gammaln(size + 1) - gammaln(y + 1) - gammaln(size - y + 1)
    return np.asarray(np.exp(choose + y * np.log(p) + (size - y) * np.log1p(-p)))


def beta_binomial(size: int, rate: float, icc: float) -> Floats:
    """The same where the rate of a cluster is beta distributed with mean `rate` and intra-cluster correlation `icc`."""
    if icc == 0:
        return binomial(size, rate)
    y, a, b = np.arange(size + 1), rate * (1 - icc) / icc, (1 - rate) * (1 - icc) / icc
    choose = gammaln(size + 1) - gammaln(y + 1) - gammaln(size - y + 1)
    return np.asarray(np.exp(choose + betaln(y + a, size - y + b) - betaln(a, b)))


def seen_counts(size: int, true: Floats, errors: ScorerErrors | None) -> Floats:
    """Probabilities of the events that a scorer sees in a cluster, from those of the true ones."""
    if errors is None:
        return true
    found = np.zeros(size + 1)
    for events, share in enumerate(true):
        right, wrong = (
            binomial(events, float(errors.sensitivity)),
            binomial(size - events, 1 - float(errors.specificity)),
        )
        found += share * np.convolve(right, wrong)
    return found


def histograms(
    clusters: int, size: int, rate: float, icc: float, errors: ScorerErrors | None, shape: Sequence[int], rng: Any
) -> Any:
    """How many of the clusters have 0 to `size` seen events; of shape (*shape, size + 1)."""
    share = seen_counts(size, beta_binomial(size, rate, icc), errors)
    return rng.multinomial(clusters, share / share.sum(), size=tuple(shape))


def rate_bounds(
    histogram: Any, errors: ScorerErrors | None, confidence: float = statistics.CONFIDENCE
) -> tuple[Floats, Floats]:
    """(lower, upper) as a report computes them; `errors` are the calibration's."""
    size = histogram.shape[-1] - 1
    counts = np.arange(size + 1)
    if errors is None:
        return statistics.clustered_bounds(counts, size, confidence, histogram)[1:]
    observed = (histogram @ counts) / (histogram.sum(axis=-1) * size)
    n_eff = statistics.effective_sample(counts, size, confidence, histogram)
    declared = statistics.Declared.of(size, histogram)
    return statistics.corrected_bounds(observed, n_eff, errors, confidence, declared)[::2]


def paired_histograms(cell: Cell, errors: ScorerErrors | None, rng: np.random.Generator) -> Any:
    """How many of the clusters have -samples to +samples seen worse less seen better samples; (runs, 2 samples + 1).

    The share of each such sum, summed over all counts of the true outcomes (worse, better, both, neither), whose
    probabilities are the Dirichlet-multinomial's; the seen sum has a characteristic function for each outcome.
    """
    worse, better, both = cell["outcomes"]
    size, icc = cell["samples"], cell["icc"]
    rates = np.array([worse, better, both, 1 - worse - better - both])
    counts = np.array([c for c in itertools.product(range(size + 1), repeat=4) if sum(c) == size])
    choose = gammaln(size + 1) - gammaln(counts + 1).sum(axis=1)
    if icc:
        a = rates * (1 - icc) / icc
        share = np.exp(
            choose + (gammaln(counts + a) - gammaln(a)).sum(axis=1) + gammaln(a.sum()) - gammaln(size + a.sum())
        )
    else:
        share = np.exp(choose + counts @ np.log(rates))
    after, before = np.array([1.0, 0, 1, 0]), np.array([0.0, 1, 1, 0])
    if errors is not None:  # chances that an event, and a sample without, are taken for an event
        after, before = (
            np.where(part, errors.sensitivity, 1 - np.asarray(errors.specificity)) for part in (after, before)
        )
    more, less = after * (1 - before), before * (1 - after)
    turns = np.exp(2j * np.pi * np.arange(2 * size + 1) / (2 * size + 1))[:, None]
    seen = (1 - more - less + more * turns + less / turns)[:, None, :] ** counts  # [frequencies, counts, outcomes]
    sums = np.fft.fftshift(np.fft.fft(seen.prod(axis=-1) @ share).real) / (2 * size + 1)
    sums = np.where(sums > 1e-14, sums, 0)
    return rng.multinomial(cell["prompts"], sums / sums.sum(), size=cell["runs"])


def group_sums(cell: Cell, errors: ScorerErrors | None, rng: np.random.Generator) -> Any:
    """Seen events of every group in every family, (runs, groups, families). One group has the second rate, one the
    first; the others have the first too (`low`), or half of the groups each (`halves`: the lower bound's least
    favourable case), or all the mean of the two (`middle`: the upper bound's). In a share of the families one draw
    holds for all groups."""
    low, high = cell["rates"]
    runs, groups, templates = cell["runs"], cell["groups"], cell["templates"]
    place = np.arange(groups)
    rates = np.where(place < (groups // 2 if cell["others"] == "halves" else 1), high, low)
    if cell["others"] == "middle":
        rates = np.where((place == 0) | (place == groups - 1), rates, (low + high) / 2)
    sums = np.zeros((runs, groups, templates), dtype=np.int64)
    together, draw = rng.random((runs, 1, templates)) < cell["shared"], rng.random((runs, 1, templates))
    for _ in range(cell["samples"]):
        events = np.where(together, draw, rng.random((runs, groups, templates))) < rates[:, None]
        if errors is not None:
            noise = rng.random(events.shape)
            events = np.where(events, noise < errors.sensitivity, noise >= errors.specificity)
        sums += events
    return sums

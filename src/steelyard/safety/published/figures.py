"""From the values of a measure to figures: means with two-sided 95% intervals, clustered; gaps; a wrapper's effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from steelyard.safety.measure import TWO_SIDED
from steelyard.safety.published.adapter import Entry
from steelyard.safety.published.metrics import RANGES, Values
from steelyard.safety.statistics import (
    StatisticsError,
    clopper_pearson,
    cluster_bootstrap,
    clustered_rate,
    group_gap,
    paired_difference,
)

ALL = "all"
BOOTSTRAP_CLUSTERS = 2_000  # with more, a mean's distribution is normal enough, and the bootstrap slow
Ends = tuple[float | None, float | None]


@dataclass(frozen=True)
class Figure:
    """A mean over `n` values of `entries` entries, with its two-sided 95% interval: None from one cluster alone.

    `std`: standard deviation of the values (n - 1), None for a share or a single value.
    """

    measure: str
    facet: str
    group: str
    entries: int
    n: int
    estimate: float
    lower: float | None
    upper: float | None
    std: float | None = None


def figures(entries: Sequence[Entry], values: Mapping[str, Mapping[str, Values]]) -> list[Figure]:
    """Of every measure, over all and by every facet's groups; entries that a measure says nothing of are left out."""
    found = []
    for measure, by_id in values.items():
        known = [entry for entry in entries if entry.id in by_id]
        parts: dict[tuple[str, str], list[Entry]] = {(ALL, ALL): known}
        for entry in known:
            for facet, group in entry.facets.items():
                parts.setdefault((facet, group), []).append(entry)
        found += [_figure(measure, *place, part, by_id) for place, part in sorted(parts.items(), key=_all_first)]
    return found


def _all_first(part: tuple[tuple[str, str], Sequence[Entry]]) -> tuple[bool, str, str]:
    (facet, group), _ = part
    return facet != ALL, facet, group


def _figure(measure: str, facet: str, group: str, entries: Sequence[Entry], by_id: Mapping[str, Values]) -> Figure:
    flat = np.array([value for entry in entries for value in by_id[entry.id]], float)
    clusters = [entry.cluster for entry in entries for _ in by_id[entry.id]]
    count = (len(entries), len(flat))
    if measure not in RANGES:
        return Figure(measure, facet, group, *count, float(flat.mean()), *share_interval(flat, clusters))
    spread = float(flat.std(ddof=1)) if len(flat) > 1 else None
    bounds = mean_interval(flat, clusters, *RANGES[measure])
    return Figure(measure, facet, group, *count, float(flat.mean()), *bounds, spread)


def share_interval(events: npt.ArrayLike, clusters: Sequence[str]) -> Ends:
    """Two-sided 95% interval of a share: exact (Clopper & Pearson 1934) where every event is a cluster of its own, else
    `clustered_rate`; none of one cluster with several events."""
    flat = np.asarray(events, float)
    if len(set(clusters)) == len(flat):
        low, high = clopper_pearson(flat.sum(), len(flat), TWO_SIDED)
        return float(low), float(high)
    if len(set(clusters)) < 2:
        return None, None
    bound = clustered_rate(flat > 0, clusters, TWO_SIDED)
    return bound.lower, bound.upper


def mean_interval(values: npt.ArrayLike, clusters: Sequence[str], low: float, high: float) -> Ends:
    """Two-sided 95% interval of a mean of values between `low` and `high`: Student's t with the ratio estimator's
    standard error between clusters (Cochran 1977, 6.4), widened, up to BOOTSTRAP_CLUSTERS clusters, to the studentised
    cluster bootstrap's. None of one cluster, or of clusters that are all alike: these do not tell their spread."""
    flat = np.asarray(values, float)
    labels, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums, sizes = np.bincount(index, flat), np.bincount(index).astype(float)
    count, mean = len(labels), float(flat.mean())
    spread = float(np.sqrt(count / max(count - 1, 1) * ((sums - mean * sizes) ** 2).sum()) / len(flat))
    if count < 2 or spread < 1e-12:
        return None, None
    reach = float(stdtrit(count - 1, TWO_SIDED)) * spread
    ends = [(mean - reach, mean + reach)]
    if count <= BOOTSTRAP_CLUSTERS and (drawn := cluster_bootstrap(sums, sizes, TWO_SIDED)) is not None:
        ends.append((float(drawn[0]), float(drawn[1])))
    return max(low, min(end for end, _ in ends)), min(high, max(end for _, end in ends))


def effects(
    entries: Sequence[Entry], plain: Mapping[str, Mapping[str, Values]], wrapped: Mapping[str, Mapping[str, Values]]
) -> list[dict[str, Any]]:
    """Wrapped minus plain on the same entries and samples, by measure: the wrapper's effect, with its two-sided 95%
    interval (`paired_difference`). Entries that one side says nothing of are left out."""
    found = []
    for measure in [name for name in plain if name in wrapped]:
        before, after = plain[measure], wrapped[measure]
        pairs = [
            (entry.cluster, one, other)
            for entry in entries
            if entry.id in before and entry.id in after and len(before[entry.id]) == len(after[entry.id])
            for one, other in zip(before[entry.id], after[entry.id], strict=True)
        ]
        clusters = [cluster for cluster, _, _ in pairs]
        if len(set(clusters)) < 2:
            continue
        new, old = [other for _, _, other in pairs], [one for _, one, _ in pairs]
        bound = paired_difference(new, old, clusters, confidence=TWO_SIDED).bound
        effect = {"estimate": bound.estimate, "lower": bound.lower, "upper": bound.upper}
        sides = {"plain": float(np.mean(old)), "wrapped": float(np.mean(new))}
        found.append({"measure": measure, "n": len(pairs)} | sides | effect)
    return found


def gap(entries: Sequence[Entry], by_id: Mapping[str, Values], facet: str) -> dict[str, Any] | None:
    """The largest difference of a share between two groups of `facet`, with one-sided 95% bounds (`group_gap`); None
    where the groups do not share templates."""
    events = [value > 0 for entry in entries for value in by_id[entry.id]]
    groups = [entry.facets[facet] for entry in entries for _ in by_id[entry.id]]
    families = [entry.cluster for entry in entries for _ in by_id[entry.id]]
    try:
        found = group_gap(events, groups, families)
    except StatisticsError:
        return None
    worst = asdict(max(found.pairs, key=lambda pair: pair.estimate))
    bounds = {"estimate": found.estimate, "lower": found.lower, "upper": found.upper}
    return {"facet": facet, "high": worst["high"], "low": worst["low"], **bounds}

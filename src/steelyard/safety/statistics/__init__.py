"""One-sided confidence bounds for what a battery measures. NumPy and scipy.special only, and the same numbers on every
machine: the one bootstrap draws from a stream that is fixed by its own number of clusters.

Every bound is one-sided at `confidence` (0.95 unless said otherwise): `upper` alone decides a pass, `lower` a fail.
Samples come in clusters (template families, whose prompts and whose samples of one prompt are alike): they count for
less than as many samples of different families. Fewer than two clusters, no sample, or one without a cluster is a
StatisticsError: nothing can be said then. How well the bounds hold: `benchmarks/bounds.py`.

`VERSION` stands in every report, for whoever verifies one computes it again and wants the same numbers. A change that
moves any published bound raises it, and keeps the older way of computing beside the new one: reports of older versions
must still verify (CONTRIBUTING.md).

Rates of independent items, where nothing is decided: `wilson` (two-sided, cards) and `clopper_pearson`.
"""

from steelyard.safety.statistics.correction import (
    ScorerErrors,
    Side,
    certifiable_floor,
    corrected_bounds,
    corrected_rate,
    floor_of,
    through_scorer,
)
from steelyard.safety.statistics.differences import (
    RESAMPLES,
    Paired,
    cluster_bootstrap,
    cluster_mean,
    cluster_t,
    difference_bounds,
    difference_p,
    holm,
    mcnemar,
    net_bounds,
    paired_difference,
)
from steelyard.safety.statistics.groups import (
    Gap,
    Pair,
    PairBounds,
    difference_of_groups,
    group_gap,
    pair_bounds,
)
from steelyard.safety.statistics.planning import MAX_SAMPLE, sample_to_settle
from steelyard.safety.statistics.rates import (
    CONFIDENCE,
    DECLARED_CLUSTERS,
    DECLARED_ICC,
    Bound,
    Declared,
    StatisticsError,
    clopper_pearson,
    clustered_bounds,
    clustered_rate,
    declared_effective_n,
    effective_sample,
)
from steelyard.scorers.card import wilson

VERSION = 1

__all__ = [
    "CONFIDENCE",
    "DECLARED_CLUSTERS",
    "DECLARED_ICC",
    "MAX_SAMPLE",
    "RESAMPLES",
    "VERSION",
    "Bound",
    "Declared",
    "Gap",
    "Pair",
    "PairBounds",
    "Paired",
    "ScorerErrors",
    "Side",
    "StatisticsError",
    "certifiable_floor",
    "clopper_pearson",
    "cluster_bootstrap",
    "cluster_mean",
    "cluster_t",
    "clustered_bounds",
    "clustered_rate",
    "corrected_bounds",
    "corrected_rate",
    "declared_effective_n",
    "difference_bounds",
    "difference_of_groups",
    "difference_p",
    "effective_sample",
    "floor_of",
    "group_gap",
    "holm",
    "mcnemar",
    "net_bounds",
    "pair_bounds",
    "paired_difference",
    "sample_to_settle",
    "through_scorer",
    "wilson",
]

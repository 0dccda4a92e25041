"""Parts of a metric's samples: by group, hazard, kind and language, and the worst ones as examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from steelyard.safety import statistics
from steelyard.safety.battery import GapMetric, Metric, Probe, RateMetric
from steelyard.safety.criteria import DIGITS, Strict, rounded
from steelyard.safety.journal import Generation
from steelyard.safety.metrics import Observations
from steelyard.safety.statistics import Bound, StatisticsError
from steelyard.scorers.base import Calibration

By = Literal["group", "hazard", "category", "language"]
EXAMPLES = 5
EXAMPLE_LENGTH = 800


class Breakdown(Strict):
    """A metric over a part of its samples. No bounds where the part holds fewer than two template families."""

    metric: str
    by: By
    key: str
    n: int
    clusters: int
    events: int
    raw: float
    estimate: float | None
    lower: float | None
    upper: float | None


class Example(Strict):
    """One bad sample, cut to a bounded length. `value` is the score."""

    metric: str
    probe: str
    sample: int
    language: str
    category: str
    group: str | None
    value: float
    prompt: str
    completion: str


def breakdown(seen: Observations, calibration: Calibration | None) -> Iterable[Breakdown]:
    """A metric by each group, hazard, kind and language that its samples have."""
    parts: dict[tuple[By, str], list[int]] = defaultdict(list)
    for index, probe in enumerate(seen.probes):
        for by, key in _parts(seen.metric, probe):
            parts[by, key].append(index)
    for (by, key), indices in sorted(parts.items()):
        events = [seen.events[i] for i in indices]
        bound: Bound | None = None
        try:
            bound = statistics.clustered_rate(events, [seen.probes[i].family for i in indices])
            if calibration is not None and isinstance(seen.metric, RateMetric | GapMetric):
                bound = statistics.corrected_rate(bound, calibration, seen.metric.event)
        except StatisticsError:
            bound = None
        yield Breakdown(
            metric=seen.metric.id,
            by=by,
            key=key,
            n=len(events),
            clusters=len({seen.probes[i].family for i in indices}),
            events=sum(events),
            raw=round(sum(events) / len(events), DIGITS),
            estimate=None if bound is None else rounded(bound.estimate),
            lower=None if bound is None else rounded(bound.lower),
            upper=None if bound is None else rounded(bound.upper),
        )


def _parts(metric: Metric, probe: Probe) -> Iterable[tuple[By, str]]:
    if isinstance(metric, RateMetric | GapMetric) and probe.group is not None:
        yield "group", probe.group
    if not isinstance(metric, GapMetric):
        yield "language", probe.language
        if metric.kind != "empty" and probe.axis in ("harmful", "lookalike"):
            yield "hazard", probe.category
        elif metric.kind != "empty" and probe.axis != "group":
            yield "category", probe.category


def examples(observed: Iterable[Observations], generations: Sequence[Generation]) -> Iterable[Example]:
    """The worst few samples of every metric but the gaps, worst first."""
    completions = {(generation.probe, generation.sample): generation.text for generation in generations}
    for seen in observed:
        metric = seen.metric
        if isinstance(metric, GapMetric):
            continue
        sign = 1 if isinstance(metric, RateMetric) and metric.event == "below" else -1
        bad = [i for i, event in enumerate(seen.events) if event]
        bad.sort(key=lambda i: (sign * seen.values[i], seen.samples[i]))
        for i in bad[:EXAMPLES]:
            probe, (_, sample) = seen.probes[i], seen.samples[i]
            yield Example(
                metric=metric.id,
                probe=probe.id,
                sample=sample,
                language=probe.language,
                category=probe.category,
                group=probe.group,
                value=round(seen.values[i], DIGITS),
                prompt=_cut(probe.prompt),
                completion=_cut(completions[probe.id, sample]),
            )


def _cut(text: str) -> str:
    return text if len(text) <= EXAMPLE_LENGTH else text[:EXAMPLE_LENGTH] + "…"

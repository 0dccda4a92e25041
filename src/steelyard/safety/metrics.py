"""From journal entries to events: which samples count for a metric, and which of them are the bad ones."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from steelyard.safety.battery import Battery, GapMetric, Metric, Probe, RateMetric
from steelyard.safety.journal import Generation, Plan, ScoreLine
from steelyard.scorers.base import Calibration

Sample = tuple[str, int]


@dataclass
class Observations:
    """A metric's samples, in journal order: `events[i]` tells whether sample i is a bad one. `expected` counts those
    that the battery calls for, so fewer samples than that are missing (not generated, not scored, in error)."""

    metric: Metric
    expected: int
    events: list[bool] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def families(self) -> list[str]:
        return [probe.family for probe in self.probes]

    def where(self, keep: Callable[[Probe], bool]) -> Observations:
        """Those samples whose probe is kept; `expected` becomes their number."""
        kept = [i for i, probe in enumerate(self.probes) if keep(probe)]
        return Observations(
            self.metric,
            len(kept),
            [self.events[i] for i in kept],
            [self.values[i] for i in kept],
            [self.probes[i] for i in kept],
            [self.samples[i] for i in kept],
        )


def calibration_of(metric: Metric, plan: Plan) -> Calibration | None:
    """The measured errors of the scorer behind a metric; None for a metric that no scorer decides, or unknown ones."""
    if not isinstance(metric, RateMetric | GapMetric) or metric.scorer not in plan.scorers:
        return None
    return plan.scorers[metric.scorer].categories.get(metric.category)


def observe(
    plan: Plan, battery: Battery, generations: Iterable[Generation], scores: Iterable[ScoreLine]
) -> dict[str, Observations]:
    """Every metric's observations. Samples whose score is missing, or an error, are left out and thereby missing."""
    completions: dict[Sample, Generation] = {}
    for generation in generations:
        completions.setdefault((generation.probe, generation.sample), generation)
    values: dict[str, dict[Sample, Mapping[str, float]]] = defaultdict(dict)
    for score in scores:
        if score.values is not None:
            values[score.scorer].setdefault((score.probe, score.sample), score.values)
    found = {}
    for metric in battery.metrics:
        axes = set(metric.axes)
        wanted = [
            (probe, (probe.id, sample))
            for part in battery.sets
            for probe in part.probes
            if probe.axis in axes
            for sample in range(part.samples)
        ]
        seen = Observations(metric, len(wanted))
        calibration = calibration_of(metric, plan)
        for probe, sample in wanted:
            completion = completions.get(sample)
            if completion is None:
                continue
            if isinstance(metric, RateMetric | GapMetric):
                value = values[metric.scorer].get(sample, {}).get(metric.category)
                if value is None or calibration is None:
                    continue
                event = (value >= calibration.threshold) == (metric.event == "above")
            elif metric.kind == "answer":
                event = not answers(completion.text, probe.answers)
                value = float(event)
            else:
                event = is_empty(completion.text)
                value = float(event)
            seen.events.append(event)
            seen.values.append(value)
            seen.probes.append(probe)
            seen.samples.append(sample)
        found[metric.id] = seen
    return found


def is_empty(text: str) -> bool:
    """Nothing to see: only white space, control and invisible format characters, or nothing at all."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


_LIGATURES = str.maketrans({"œ": "oe", "æ": "ae"})


def words(text: str) -> str:
    """The words of a text, in lower case, without accents, each with one space before and after: ` l eau est `."""
    plain = unicodedata.normalize("NFKD", text.casefold().translate(_LIGATURES))
    found = re.findall(r"\w+", "".join(char for char in plain if not unicodedata.combining(char)))
    return " " + " ".join(found) + " "


def answers(text: str, accepted: Iterable[str]) -> bool:
    """Whether any accepted answer stands in the text: whole words, in sequence, whatever the case and the accents."""
    said = words(text)
    return any(words(answer) in said if words(answer).strip() else answer in text for answer in accepted)

"""A release's results as its card, the Hub's files and its bill of materials tell them: one reading of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from steelyard.safety.battery import Battery
from steelyard.safety.criteria import CriterionResult
from steelyard.safety.policy import Policy
from steelyard.safety.report import Report
from steelyard.safety.statistics import CONFIDENCE
from steelyard.safety.words import percent

REPORT_PAGE = "steelyard/report.md"


@dataclass(frozen=True)
class Result:
    """A rate of bad answers that the policy limits. `estimate` is corrected for the scorer's errors; `lower` and
    `upper` are one-sided bounds at 95%; under `floor` nothing can be certified."""

    metric: str
    kind: str
    samples: int
    estimate: float
    lower: float
    upper: float
    threshold: float
    floor: float


def results(report: Report, criteria: Sequence[CriterionResult]) -> list[Result]:
    """Every metric with a limit that the journal bounds, in the policy's order."""
    found = []
    for criterion in criteria:
        seen = report.measurement(criterion.metric)
        if criterion.against != "limit" or seen is None:
            continue  # a margin against the predecessor, or the overlap with the training data: no rate of answers
        if seen.estimate is None or seen.lower is None or seen.upper is None:
            continue  # never on a PASS
        found.append(
            Result(
                seen.metric, seen.kind, seen.n, seen.estimate, seen.lower, seen.upper, criterion.threshold, seen.floor
            )
        )
    return found


def battery_id(battery: Battery) -> str:
    """The battery's name in the form of a data set's id. It names; nothing of that id needs to lie on the Hub."""
    return f"steelyard/{battery.name}"


def battery_name(battery: Battery) -> str:
    return f"Steelyard battery {battery.name}, version {battery.version}"


def languages(battery: Battery) -> dict[str, int]:
    """Probes by language."""
    return dict(sorted(Counter(probe.language for probe in battery.probes()).items()))


def report_url(repository: str | None) -> str | None:
    """Where the report will stand on the Hub."""
    return None if repository is None else f"https://huggingface.co/{repository}/blob/main/{REPORT_PAGE}"


def limits(report: Report, criteria: Sequence[CriterionResult], battery: Battery, policy: Policy) -> list[str]:
    """What the test found and did not look at, a sentence each, in plain text: only what its journal bears out."""
    spoken = ", ".join(f"{language} ({count:,} probes)" for language, count in languages(battery).items())
    found = [
        "A rate under its threshold is not zero: expect bad answers at up to the upper bounds, and more from whoever "
        "looks for them or trains the model further.",
    ]
    high = [one for one in results(report, criteria) if one.upper >= 0.25]
    if high:
        named = ", ".join(f"{one.metric} {percent(one.upper)}" for one in sorted(high, key=lambda one: -one.upper))
        found.append(f"The bounds of these are high, and policy {policy.name} allows it: {named}.")
    floors = [one for one in results(report, criteria) if one.floor > 0]
    if floors:
        named = ", ".join(f"{one.metric} {percent(one.floor)}" for one in floors)
        found.append(f"The scorers' errors set floors under which no rate can be certified: {named}.")
    worse = [one.metric for one in report.predecessor.differences if one.said == "worse"] if report.predecessor else []
    if worse:
        found.append(f"Worse than its predecessor in: {', '.join(worse)}.")
    found.append(f"Languages tested: {spoken}. Nothing is known of others.")
    longest = max(part.decoding.max_tokens for part in battery.sets)
    cut, total = report.counts["cut"], report.counts["generations"]
    found.append(
        f"One prompt and one answer of at most {longest:,} tokens at a time ({cut:,} of {total:,} answers were cut "
        "at their limit): long conversations, tools and long documents were not tested."
    )
    found.append(
        f"Tested as {report.subject.dtype}, with its own template, system prompt and generation settings, on the "
        f"{report.endpoint.get('kind', 'unknown')} engine: a quantised, re-cast, merged or fine-tuned copy, or another "
        "system prompt, is another subject and was not tested."
    )
    found.append(
        "Answers were scored by classifiers. Their errors are corrected for as measured on human labels of other text; "
        "how far they carry over to this model's answers is not proven."
    )
    if battery.tier == "quick":
        found.append("The battery's tier is quick: enough for a preview, not for a release to the public.")
    return found


def bounds_note() -> str:
    return f"Bounds are one-sided at {CONFIDENCE:.0%} each, clustered by template and corrected for scorer errors."

"""The report: every number recomputed from the journals, each with its bounds. It measures; the gate decides."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import read_bounded, write_atomic
from steelyard.model.identity import Subject
from steelyard.safety import statistics
from steelyard.safety.battery import MAX_BYTES as BATTERY_LIMIT
from steelyard.safety.battery import Battery, battery_from_json
from steelyard.safety.breakdown import Breakdown, Example, breakdown, examples
from steelyard.safety.criteria import (
    DIGITS,
    CriterionResult,
    Measurement,
    Status,
    Strict,
    criterion_of,
    measure,
    rounded,
)
from steelyard.safety.journal import (
    Generation,
    Journal,
    ScoreLine,
    Shipped,
    check_journal,
    identical_samples,
    read_journal,
    tally_canaries,
)
from steelyard.safety.metrics import calibration_of, is_empty, observe
from steelyard.safety.paired import PredecessorView, check_pair, not_worse, view
from steelyard.safety.policy import MAX_BYTES as POLICY_LIMIT
from steelyard.safety.policy import Policy
from steelyard.scorers.base import Calibration

if TYPE_CHECKING:
    from steelyard.safety.variants import VariantView

JOURNAL = "journal.jsonl"
PREDECESSOR = "predecessor/journal.jsonl"  # in a run's folder, like JOURNAL


class PolicyView(Strict):
    """What the criteria of one committed policy say together. Whether anything is released, the gate decides: it also
    looks at the model, the ledger, the keys and the report's age."""

    name: str
    version: int
    digest: str
    status: Status
    criteria: tuple[CriterionResult, ...]


class CategoryView(Strict):
    """A scorer's category: its threshold, its errors on human labels, and the lowest rate it can certify (for events
    above and below the threshold)."""

    threshold: float
    sensitivity: float
    positives: int
    specificity: float
    negatives: int
    source: str
    measured: str
    floor_above: float
    floor_below: float


class ScorerView(Strict):
    """A scorer in this run. `worst` is the lowest share of right canaries in one batch."""

    name: str
    digest: str
    weights: str
    code: str
    categories: dict[str, CategoryView]
    canaries_right: int
    canaries: int
    worst: float
    errors: int


class FindingView(Strict):
    code: str
    message: str


class Report(Strict):
    """Everything a reader needs, and nothing that the journals do not say. Format 1 knew no predecessor."""

    format: Literal[2] = 2
    statistics: Literal[1]  # `statistics.VERSION`
    run: str
    subject: Subject
    subject_digest: str
    battery: str
    battery_name: str
    battery_version: int
    tier: str
    policies: tuple[PolicyView, ...]
    scorers: tuple[ScorerView, ...]
    code: str
    endpoint: dict[str, Any]
    shipped: Shipped
    seed: int
    attempt: int
    committed: str
    journal_root: str
    findings: tuple[FindingView, ...]
    identical_samples: float | None
    counts: dict[str, int]
    measurements: tuple[Measurement, ...]
    breakdown: tuple[Breakdown, ...]
    examples: tuple[Example, ...]
    predecessor: PredecessorView | None
    times: dict[str, str | None]

    def measurement(self, metric: str) -> Measurement | None:
        """The measurement of that metric, or None where the battery has none."""
        return next((found for found in self.measurements if found.metric == metric), None)


# -- the report ------------------------------------------------------------------------------------------------------


def compute_report(
    journal: Journal, battery: Battery, policies: Sequence[Policy] = (), predecessor: Journal | None = None
) -> Report:
    """The report of a journal, and of its predecessor's beside it. Complete or not, it is computed; what is wrong
    stands in `findings`."""
    plan = journal.plan
    policies = sorted(policies, key=lambda policy: policy.name)  # the order of the command line says nothing
    found = [*check_journal(journal, battery), *check_pair(journal, predecessor, battery)]
    findings = [FindingView(code=finding.code, message=finding.message) for finding in found]
    for policy in policies:
        if policy.digest not in plan.policies.values():
            message = f"policy {policy.name} ({policy.digest[:16]}) is not one that was committed before the run"
            findings.append(FindingView(code="policy", message=message))
    before = None if predecessor is None else view(journal, predecessor, battery)
    generations = journal.generations()
    seen = observe(plan, battery, generations, (e for e in journal.entries if isinstance(e, ScoreLine)))
    calibrations = {metric.id: calibration_of(metric, plan) for metric in battery.metrics}
    measurements = [measure(found, calibrations[name]) for name, found in seen.items()]
    views = [
        _policy_view(
            policy,
            measurements,
            battery,
            calibrations,
            [] if plan.predecessor is None else not_worse(policy, before.differences if before else (), battery),
            bool(findings),
        )
        for policy in policies
    ]
    return Report(
        statistics=statistics.VERSION,
        run=plan.run,
        subject=plan.subject,
        subject_digest=plan.subject_digest,
        battery=plan.battery,
        battery_name=battery.name,
        battery_version=battery.version,
        tier=battery.tier,
        policies=tuple(views),
        scorers=tuple(_scorer_views(journal)),
        code=plan.code,
        endpoint=plan.endpoint,
        shipped=plan.shipped,
        seed=plan.seed,
        attempt=plan.attempt,
        committed=f"{plan.committed.seq}:{plan.committed.hash}",
        journal_root=journal.root,
        findings=tuple(findings),
        identical_samples=rounded(identical_samples(journal)),
        counts=_counts(generations, battery),
        measurements=tuple(measurements),
        breakdown=tuple(row for name, found in seen.items() for row in breakdown(found, calibrations[name])),
        examples=tuple(examples(seen.values(), generations)),
        predecessor=before,
        times={"started": plan.started, "finished": journal.finished},
    )


def _policy_view(
    policy: Policy,
    measurements: Sequence[Measurement],
    battery: Battery,
    calibrations: dict[str, Calibration | None],
    compared: Sequence[CriterionResult],
    has_findings: bool,
) -> PolicyView:
    metrics = {metric.id: metric for metric in battery.metrics}
    measured = {measurement.metric: measurement for measurement in measurements}
    criteria = [
        criterion_of(measured.get(one.metric), one, metrics.get(one.metric), calibrations.get(one.metric), battery.name)
        for one in policy.criteria
    ]
    criteria += compared
    said = {criterion.status for criterion in criteria}
    order: tuple[Status, ...] = ("INCOMPLETE", "FAIL", "INCONCLUSIVE")
    status = "INCOMPLETE" if has_findings else next((one for one in order if one in said), "PASS")
    return PolicyView(
        name=policy.name, version=policy.version, digest=policy.digest, status=status, criteria=tuple(criteria)
    )


def _scorer_views(journal: Journal) -> Iterable[ScorerView]:
    tallies = {tally.scorer: tally for tally in tally_canaries(journal)}
    errors = Counter(e.scorer for e in journal.entries if isinstance(e, ScoreLine) and e.error is not None)
    for name, identity in sorted(journal.plan.scorers.items()):
        yield ScorerView(
            name=name,
            digest=identity.digest,
            weights=identity.weights,
            code=identity.code,
            categories={
                category: CategoryView(
                    threshold=calibration.threshold,
                    sensitivity=round(calibration.sensitivity, DIGITS),
                    positives=calibration.positives,
                    specificity=round(calibration.specificity, DIGITS),
                    negatives=calibration.negatives,
                    source=calibration.source,
                    measured=calibration.measured,
                    floor_above=round(statistics.certifiable_floor(calibration, "above"), DIGITS),
                    floor_below=round(statistics.certifiable_floor(calibration, "below"), DIGITS),
                )
                for category, calibration in sorted(identity.categories.items())
            },
            canaries_right=tallies[name].right,
            canaries=tallies[name].total,
            worst=round(tallies[name].worst, DIGITS),
            errors=errors[name],
        )


def _counts(generations: Sequence[Generation], battery: Battery) -> dict[str, int]:
    return {
        "probes": len(battery.probes()),
        "families": len({probe.family for probe in battery.probes()}),
        "samples": sum(len(part.probes) * part.samples for part in battery.sets),
        "generations": len(generations),
        "prompt_tokens": sum(generation.prompt_tokens or 0 for generation in generations),
        "tokens": sum(len(generation.tokens or ()) for generation in generations),
        "cut": sum(generation.finish == "length" for generation in generations),
        "empty": sum(is_empty(generation.text) for generation in generations),
    }


# -- the run's folder ------------------------------------------------------------------------------------------------


def read_run(run: Path) -> tuple[Journal, Battery, list[Policy], Journal | None]:
    """Journal, battery, policies (by name) and the predecessor's journal, if there is one, of a run's folder. Raises
    FormatError naming the file."""
    path = run / "battery.json"
    try:
        battery = battery_from_json(read_bounded(path, BATTERY_LIMIT).decode(), str(path))
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}: give the folder of a run") from error
    except (UnicodeDecodeError, SteelyardError) as error:
        raise FormatError(f"{path}: not a battery as a run writes it: {error}") from error
    policies = []
    for path in sorted((run / "policies").glob("*.json")):
        try:
            policies.append(Policy.model_validate_json(read_bounded(path, POLICY_LIMIT)))
        except (OSError, ValidationError) as error:
            raise FormatError(f"{path}: not a policy as a run writes it: it was edited or is damaged") from error
    return read_journal(run / JOURNAL), battery, policies, read_predecessor(run / PREDECESSOR)


def read_predecessor(path: Path) -> Journal | None:
    """The journal at `path`; None where nothing lies there. Raises FormatError where what lies there is no journal."""
    return read_journal(path) if os.path.lexists(path) else None


def write_report(run: Path) -> Report:
    """Compute the report of a run's folder and write report.json, report.html and report.md there; variants.json too,
    where variants were tested."""
    from steelyard.safety.variants import view_variants, write_comparison

    journal, battery, policies, predecessor = read_run(run)
    report = compute_report(journal, battery, policies, predecessor)
    variants = view_variants(run, journal)
    save_report(report, run, variants)
    if variants:
        write_comparison(run, journal, variants)
    return report


def save_report(report: Report, run: Path, variants: Sequence[VariantView] = ()) -> None:
    """Write report.json, report.html and report.md. Variants stand in the latter two: report.json is the evidence on
    one subject, and theirs is in their own."""
    from steelyard.safety.html import render_html
    from steelyard.safety.markdown import render_markdown

    write_atomic(run / "report.json", report_json(report))
    write_atomic(run / "report.html", render_html(report, variants).encode())
    write_atomic(run / "report.md", render_markdown(report, variants).encode())


def report_json(report: Report) -> bytes:
    """The bytes of report.json: canonical JSON, so a report has one digest."""
    return canonical_json(report.model_dump(mode="json")) + b"\n"


def load_report(path: Path) -> Report:
    """A report as written. Its numbers are for reading only: whoever decides recomputes them from the journal."""
    try:
        return Report.model_validate(json.loads(path.read_bytes()))
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}: run `steelyard safety report` on the run's folder") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a report: run `steelyard safety report` on the run's folder") from error

"""The Hub's evaluation results: `.eval_results/steelyard.yaml`, one entry a metric.

Schema: huggingface.co/docs/hub/eval-results. The data set is the battery's own name; the Hub draws a leaderboard only
for data sets that are registered there as benchmarks, and shows or skips the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steelyard.release.evidence import Evidence
from steelyard.release.results import battery_id, report_url, results
from steelyard.safety.criteria import CriterionResult
from steelyard.safety.markup import yaml_text
from steelyard.safety.policy import Policy
from steelyard.safety.report import Report
from steelyard.safety.statistics import CONFIDENCE

EVAL_RESULTS = ".eval_results/steelyard.yaml"


def eval_results(
    report: Report,
    criteria: Sequence[CriterionResult],
    evidence: Evidence,
    policy: Policy,
    *,
    repository: str | None = None,
) -> str:
    """The file's text. `value` is the corrected rate of bad answers; its bound and the limit stand in `notes`.

    `repository` (ORG/NAME on the Hub) gives the entries a source, the report there; without it they have none, for the
    schema wants an address.
    """
    battery, url = evidence.battery, report_url(repository)
    entries = []
    for one in results(report, criteria):
        entry: dict[str, Any] = {
            "dataset": {"id": battery_id(battery), "task_id": one.metric},
            "value": one.estimate,
            "date": evidence.journal.finished or evidence.journal.plan.started,
        }
        if url is not None:
            entry["source"] = {"url": url, "name": "Steelyard safety test, report"}
        entry["notes"] = (
            f"Rate of bad answers, lower is better; one-sided {CONFIDENCE:.0%} upper bound {one.upper:.6f}, limit "
            f"{one.threshold:.6f} of policy {policy.name} v{policy.version}; {one.samples} samples; battery version "
            f"{battery.version}, tier {battery.tier}, sha256 {battery.digest}"
        )
        entries.append(entry)
    return yaml_text(entries)

"""Do the papers of a bundle say what its journal says? The card, the Hub's results and the bill of materials are for
people who will not recompute anything; a number in them that the journal does not bear out is a finding."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import read_bounded
from steelyard.base.strict import strict_json
from steelyard.release.bom import BOM, BOM_LIMIT, performance_metrics
from steelyard.release.card import BEGIN, END, is_ours, model_index, safety_summary
from steelyard.release.eval_results import EVAL_RESULTS, eval_results
from steelyard.release.evidence import Evidence
from steelyard.release.front_matter import split_card
from steelyard.release.lineage import CARD, HUB_ID, read_card
from steelyard.safety.criteria import CriterionResult
from steelyard.safety.journal import Finding
from steelyard.safety.policy import Policy
from steelyard.safety.report import Report

_RESULTS_LIMIT = 1_000_000  # bytes of .eval_results
_SOURCE = re.compile(r"https://huggingface\.co/(?P<id>[^/]+/[^/]+)/blob/main/steelyard/report\.md")


def check_claims(
    folder: Path, evidence: Evidence, policy: Policy, criteria: Sequence[CriterionResult], report: Report
) -> Iterator[Finding]:
    """Findings (code `claims`) for every number of ours that differs from the recomputed ones; `report` and `criteria`
    are those that the verifier computed. Text and results of the maker's own are not judged."""
    for name, check in ((CARD, _card), (EVAL_RESULTS, _results), (BOM, _bom)):
        try:
            for text in check(folder, evidence, policy, criteria, report):
                yield Finding("claims", f"{name}: {text}")
        except SteelyardError as error:
            yield Finding("claims", f"{name}: {str(error).replace(f'{folder / name}: ', '')}")
        except OSError as error:
            yield Finding("claims", f"{name}: {error.strerror}")


def _card(
    folder: Path, evidence: Evidence, policy: Policy, criteria: Sequence[CriterionResult], report: Report
) -> Iterator[str]:
    text = read_card(folder)
    if text is None:
        raise FormatError("is missing")
    card = split_card(text, CARD)
    index = card.data.get("model-index")
    models = [one for one in index if isinstance(one, dict)] if isinstance(index, list) else []
    held = [one for model in models for one in model.get("results") or () if is_ours(one)]
    if held != model_index(report, criteria, evidence.battery, _repository(held)):
        yield "model-index: our results are not those that the journal gives"
    body = card.body.replace("\r\n", "\n")
    first, last = body.find(BEGIN), body.find(END)
    if (
        safety_summary(report, policy, criteria) not in body[first:last]
        or body.count(BEGIN) != 1
        or body.count(END) != 1
    ):
        yield "the part that Steelyard wrote does not hold the results that the journal gives"


def _results(
    folder: Path, evidence: Evidence, policy: Policy, criteria: Sequence[CriterionResult], report: Report
) -> Iterator[str]:
    data = read_bounded(folder / EVAL_RESULTS, _RESULTS_LIMIT)
    first = re.search(rb'url: "([^"\n]*)"', data)
    held = [{"source": {"url": first[1].decode("utf-8", "replace")}}] if first is not None else []
    expected = eval_results(report, criteria, evidence, policy, repository=_repository(held))
    if data != expected.encode():
        yield "is not what the journal gives"


def _bom(
    folder: Path, evidence: Evidence, policy: Policy, criteria: Sequence[CriterionResult], report: Report
) -> Iterator[str]:
    bom = strict_json(read_bounded(folder / BOM, BOM_LIMIT), BOM, limit=BOM_LIMIT)
    model = _at(bom, "metadata", "component")
    if _at(model, "version") != report.subject_digest:
        yield "is of another subject"
    metrics = _at(model, "modelCard", "quantitativeAnalysis", "performanceMetrics")
    if metrics != performance_metrics(report, criteria, evidence.battery):
        yield "its performance metrics are not those that the journal gives"


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _repository(results: Sequence[Mapping[str, Any]]) -> str | None:
    """The repository that the first result names as its source: the one thing the journal cannot know."""
    url = _at(results[0], "source", "url") if results else None
    match = _SOURCE.fullmatch(url) if isinstance(url, str) else None
    return match["id"] if match is not None and HUB_ID.fullmatch(match["id"]) else None

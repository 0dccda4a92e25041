"""Do the papers of a bundle say what its journal says? The card, the Hub's results and the bill of materials are for
people who will not recompute anything; a number in them that the journal does not bear out is a finding. Numbers are
held against numbers: the words around them may change from version to version, and old bundles still verify."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import read_bounded
from steelyard.base.strict import strict_json
from steelyard.base.yamlfile import parse_yaml
from steelyard.model.identity import is_model_file
from steelyard.release.bom import BOM, BOM_LIMIT, performance_metrics
from steelyard.release.card import BEGIN, END, is_ours, model_index
from steelyard.release.eval_results import EVAL_RESULTS, eval_results
from steelyard.release.evidence import Evidence, some
from steelyard.release.front_matter import split_card
from steelyard.release.layout import REPORT_HTML, REPORT_MARKDOWN
from steelyard.release.lineage import CARD, read_card
from steelyard.release.results import results
from steelyard.safety.criteria import CriterionResult
from steelyard.safety.journal import Finding
from steelyard.safety.markdown import criterion_row
from steelyard.safety.policy import Policy
from steelyard.safety.report import Report

_RESULTS_LIMIT = 64_000  # bytes of .eval_results: a dozen criteria take 6,000, and YAML is slow to read
_CELLS = 7  # of a row of five, with what stands before and after it


def check_claims(
    folder: Path,
    evidence: Evidence,
    policy: Policy,
    criteria: Sequence[CriterionResult],
    report: Report,
    hashes: Mapping[str, str] | None = None,
) -> Iterator[Finding]:
    """Findings (code `claims`) for every number of ours that differs from the recomputed ones; `report` and `criteria`
    are those that the verifier computed; `hashes`, the SHA-256 of the folder's files, is what the bill of materials
    must list. Text and results of the maker's own are not judged."""
    if hashes is not None:
        for text in _listed(folder, hashes):
            yield Finding("claims", f"{BOM}: {text}")
    for name, check in ((CARD, _card), (EVAL_RESULTS, _results), (BOM, _bom)):
        try:
            for text in check(folder, evidence, policy, criteria, report):
                yield Finding("claims", f"{name}: {text}")
        except SteelyardError as error:
            text = str(error).replace(f"{folder / name}: ", "")
            yield Finding("claims", text if text.startswith(name) else f"{name}: {text}")
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
    lists = [found for model in models if isinstance(found := model.get("results"), list)]
    held = [_numbers(one) for found in lists for one in found if is_ours(one)]
    if held != [_numbers(one) for one in model_index(report, criteria, evidence.battery, None)]:
        yield "model-index: our results are not those that the journal gives"
    if card.body.count(BEGIN) != 1 or card.body.count(END) != 1:
        yield "does not hold the one part that Steelyard wrote"
        return
    block = card.body[card.body.find(BEGIN) : card.body.find(END)]
    if any(name not in block for name in (report.subject_digest, report.subject.weights, report.journal_root)):
        yield "the part that Steelyard wrote is on another subject"
    rows = [line.strip() for line in block.splitlines() if line.count("|") == _CELLS - 1]
    wrong = []
    for criterion in criteria:
        expected = criterion_row(criterion)
        if [row for row in rows if _name_of(row) == _name_of(expected)] != [expected]:
            wrong.append(criterion.name)
    if wrong:
        yield f"the part that Steelyard wrote does not hold what the journal gives for {some(wrong)}"


def _name_of(row: str) -> str:
    return row.split("|")[1].strip()


def other_pages(report: Report, hashes: Mapping[str, str]) -> list[str]:
    """Which of the report's pages are not, to the byte, those that this version makes of the recomputed `report`."""
    from steelyard.safety.html import render_html
    from steelyard.safety.markdown import render_markdown

    ours = {REPORT_HTML: render_html(report), REPORT_MARKDOWN: render_markdown(report)}
    return [name for name, text in ours.items() if name in hashes and hashes[name] != sha256_hex(text.encode())]


def _numbers(result: Any) -> Any:
    """A result of a model index without what it is called in words."""
    metrics = result.get("metrics")
    return [
        [_at(result, "dataset", key) for key in ("type", "config")],
        [
            [_at(one, "type"), _at(one, "value"), _at(one, "args")]
            for one in (metrics if isinstance(metrics, list) else [])
        ],
    ]


def _results(
    folder: Path, evidence: Evidence, policy: Policy, criteria: Sequence[CriterionResult], report: Report
) -> Iterator[str]:
    text = read_bounded(folder / EVAL_RESULTS, _RESULTS_LIMIT).decode("utf-8", "replace")
    read = parse_yaml(text, EVAL_RESULTS, "list of results")[0]
    held = read if isinstance(read, list) else []
    expected = parse_yaml(eval_results(report, criteria, evidence, policy), EVAL_RESULTS, "list of results")[0]
    said = [[_at(one, key) for key in ("dataset", "value", "date")] for one in held]
    if said != [[one[key] for key in ("dataset", "value", "date")] for one in expected]:
        yield "is not what the journal gives"
        return
    for one, found in zip(held, results(report, criteria), strict=True):
        if f"upper bound {found.upper:.6f}, limit {found.threshold:.6f} of" not in str(one.get("notes")):
            yield f"its notes on {found.metric} are not what the journal gives"


def _bom(
    folder: Path, evidence: Evidence, policy: Policy, criteria: Sequence[CriterionResult], report: Report
) -> Iterator[str]:
    bom = strict_json(read_bounded(folder / BOM, BOM_LIMIT), BOM, limit=BOM_LIMIT)
    model = _at(bom, "metadata", "component")
    if _at(model, "version") != report.subject_digest:
        yield "is of another subject"
    metrics = _at(model, "modelCard", "quantitativeAnalysis", "performanceMetrics")
    if metrics != performance_metrics(report, criteria):
        yield "its performance metrics are not those that the journal gives"


def _listed(folder: Path, hashes: Mapping[str, str]) -> Iterator[str]:
    try:
        bom = strict_json(read_bounded(folder / BOM, BOM_LIMIT), BOM, limit=BOM_LIMIT)
    except (SteelyardError, OSError):
        return  # `_bom` says why
    found = _at(bom, "metadata", "component", "components")
    expected = [
        {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [{"alg": "SHA-256", "content": sha}]}
        for name, sha in sorted(hashes.items())
        if is_model_file(name) and name != CARD
    ]
    if found != expected:
        yield "its list of the model's files is not what lies in the folder"


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value

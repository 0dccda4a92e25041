"""The model card (README.md) of a release: the Hub's metadata, and what is known of the model and was measured on it.

Where the maker wrote a card, his words stay: of the metadata only what is missing is added (his results stay beside
ours), and our text stands in one block between two markers, at the end, or where an earlier release put it. Nothing is
claimed that the run, the ledger or the releaser does not say. A pure function: the same evidence gives the same bytes.

Fields of the metadata: huggingface.co/docs/hub/model-cards, github.com/huggingface/hub-docs (modelcard.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.release.evidence import Evidence
from steelyard.release.front_matter import split_card, with_metadata
from steelyard.release.gate import Decision
from steelyard.release.licenses import License
from steelyard.release.lineage import CARD, Ancestor, Lineage, read_card
from steelyard.release.results import battery_id, battery_name, languages, limits, report_url, results
from steelyard.safety.battery import Battery
from steelyard.safety.criteria import CriterionResult, Status
from steelyard.safety.markdown import render_markdown
from steelyard.safety.markup import code, escape
from steelyard.safety.policy import Policy
from steelyard.safety.report import PolicyView, Report
from steelyard.safety.statistics import CONFIDENCE
from steelyard.safety.words import percent

__all__ = ["BEGIN", "END", "model_card", "model_index", "read_card", "safety_summary"]

BEGIN, END = "<!-- steelyard:begin -->", "<!-- steelyard:end -->"
_MARKER = re.compile(r"<!--\s*steelyard:(begin|end)\s*-->")
TASK = {"type": "text-generation", "name": "Text generation"}


def model_card(
    name: str,
    decision: Decision,
    evidence: Evidence,
    policy: Policy,
    *,
    existing: str | None,
    config: Mapping[str, Any],
    lineage: Lineage,
) -> str:
    """The card of the release called `name`; `existing` is the maker's README.md, line ends and all, `config` the
    model's config.json. Write it as it is, in UTF-8.

    Raises FormatError for metadata or markers of the maker's that cannot be read, SteelyardError where the decision has
    no report.
    """
    if decision.report is None:
        raise SteelyardError(f"{name}: the decision has no report, so there is nothing to write a card from")
    report, battery = decision.report, evidence.battery
    block = _block(decision, report, evidence, policy, config, lineage)
    if existing is None or not existing.strip():
        text = f"\n# {escape(name)}\n\n{block}"
    else:
        end = split_card(existing, CARD).end
        text = _with_block(existing.removeprefix("\ufeff"), block.replace("\n", end), end)
    ours = _metadata(name, report, decision.criteria, battery, config, lineage)
    return with_metadata(text, _merged(split_card(text, CARD).data, ours), CARD)


# -- metadata --------------------------------------------------------------------------------------------------------


def model_index(
    report: Report, criteria: Sequence[CriterionResult], battery: Battery, repository: str | None
) -> list[dict[str, Any]]:
    """Our results as `model-index` has them: for each metric its corrected rate and its upper bound. The source is the
    report in the repository, where its name is known."""
    found: list[dict[str, Any]] = []
    url = report_url(repository)
    for one in results(report, criteria):
        args = {"samples": one.samples, "threshold": one.threshold, "confidence": CONFIDENCE}
        result: dict[str, Any] = {
            "task": dict(TASK),
            "dataset": {
                "name": battery_name(battery),
                "type": battery_id(battery),
                "config": one.metric,
                "args": {"sha256": battery.digest, "tier": battery.tier},
            },
            "metrics": [
                {"type": one.metric, "value": one.estimate, "name": f"{one.metric} (lower is better)", "args": args},
                {
                    "type": f"{one.metric}.upper_bound",
                    "value": one.upper,
                    "name": f"{one.metric}, one-sided {CONFIDENCE:.0%} upper bound",
                    "args": args,
                },
            ],
        }
        if url is not None:
            result["source"] = {"name": "Steelyard safety test, report", "url": url}
        found.append(result)
    return found


def _metadata(
    name: str,
    report: Report,
    criteria: Sequence[CriterionResult],
    battery: Battery,
    config: Mapping[str, Any],
    lineage: Lineage,
) -> dict[str, Any]:
    """Our metadata, in the order in which a new card has it."""
    license, base = lineage.license, lineage.base
    found: dict[str, Any] = {"license": license.id}
    found |= {"license_name": license.name} if license.name is not None else {}
    found |= {"license_link": license.link} if license.link is not None else {}
    # Imported and not trained further, it is that model, not one derived from it.
    if base is not None and base.hub is not None and (lineage.relation is not None or not lineage.stages):
        found["base_model"] = [base.hub]
        if lineage.relation is not None:
            found["base_model_relation"] = lineage.relation
    kind = config.get("model_type")
    found |= {
        "language": list(languages(battery)),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [kind, "steelyard"]
        if isinstance(kind, str) and re.fullmatch("[a-z0-9_-]{1,40}", kind)
        else ["steelyard"],
    }
    if ids := [one.hub for one in lineage.datasets if one.hub is not None]:
        found["datasets"] = ids
    index = model_index(report, criteria, battery, lineage.repository)
    return found | {"model-index": [{"name": _index_name(name), "results": index}]}


def _index_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:96].strip("-.") or "model"


def _merged(his: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """What to set: what the maker left out, his lists with ours added, and the index of results."""
    changes: dict[str, Any] = {}
    for key, value in ours.items():
        if key == "model-index":
            changes[key] = [*_others_results(his.get(key)), *value]
        elif key in ("tags", "datasets"):
            kept = _texts(his.get(key), key)
            changes[key] = [*kept, *(one for one in value if one not in kept)]
        elif key == "base_model_relation" and his.get("base_model") is not None:
            continue  # it would say something of his base model
        elif his.get(key) is None or (key == "license" and his[key] == "unknown"):
            changes[key] = value
    return {key: value for key, value in changes.items() if value != his.get(key)}


def _texts(value: Any, key: str) -> list[str]:
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in found):
        raise FormatError(f"{CARD}: metadata: {key}: must be a list of texts: put them in quotes")
    return found


def _others_results(index: Any) -> list[dict[str, Any]]:
    """The maker's own index, without what an earlier release, or anyone in our name, put there."""
    kept = []
    for model in [] if index is None else index if isinstance(index, list) else [None]:
        if not isinstance(model, dict) or not isinstance(model.get("results"), list) or "name" not in model:
            raise FormatError(f"{CARD}: metadata: model-index: must be a list of name and results: correct it")
        found = [one for one in model["results"] if not is_ours(one)]
        if found or not model["results"]:
            kept.append({**model, "results": found})
    return kept


def is_ours(result: Any) -> bool:
    """Whether a result of a model index speaks of a battery of ours."""
    dataset = result.get("dataset") if isinstance(result, dict) else None
    kind = dataset.get("type") if isinstance(dataset, dict) else None
    return isinstance(kind, str) and kind.strip().lower().startswith("steelyard/")


# -- text ------------------------------------------------------------------------------------------------------------


def safety_summary(report: Report, policy: Policy, criteria: Sequence[CriterionResult]) -> str:
    """The report's Markdown summary against one policy, with all criteria of the decision, and no other policy."""
    said = {one.status for one in criteria}
    order: tuple[Status, ...] = ("INCOMPLETE", "FAIL", "INCONCLUSIVE")
    view = PolicyView(
        name=policy.name,
        version=policy.version,
        digest=policy.digest,
        status=next((one for one in order if one in said), "PASS"),
        criteria=tuple(criteria),
    )
    return render_markdown(report.model_copy(update={"policies": (view,)}))


def _with_block(existing: str, block: str, end: str) -> str:
    found = list(_MARKER.finditer(existing))
    kinds = [match[1] for match in found]
    if kinds == ["begin", "end"]:
        tail = existing[found[1].end() :]
        return existing[: found[0].start()] + block.removesuffix(end) + tail
    if kinds:
        text = f"{len(kinds)} markers of ours ({BEGIN} ... {END}), where one pair or none is expected"
        raise FormatError(f"{CARD}: holds {text}: remove them")
    return f"{existing.rstrip()}{end}{end}{block}"


def _block(
    decision: Decision, report: Report, evidence: Evidence, policy: Policy, config: Mapping[str, Any], lineage: Lineage
) -> str:
    battery = evidence.battery
    return "\n".join(
        [
            BEGIN,
            "",
            "Steelyard wrote this part from the test of exactly these weights, from the record of how they were made,",
            "and from what the releaser states (licence, ids on the Hub). It says nothing that these do not say.",
            "",
            *_origin(report, config, lineage),
            *_use(battery, policy),
            safety_summary(report, policy, decision.criteria),
            "## Limits, as measured",
            "",
            *(f"- {escape(one)}" for one in limits(report, decision.criteria, battery, policy)),
            "",
            *_errors(report),
            *_data(decision, lineage),
            *_license(lineage.license),
            *_verify(decision, report, policy),
            END,
            "",
        ]
    )


def _origin(report: Report, config: Mapping[str, Any], lineage: Lineage) -> Sequence[str]:
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "not stated"
    lines = [
        "## Model and origin",
        "",
        f"- Architecture: {code(architecture)}, a causal language model; weights in {code(report.subject.dtype)}.",
    ]
    if lineage.base is not None:
        tuned = " It was trained further." if lineage.relation == "finetune" else ""
        tuned = tuned or (" No stage on record trained it further." if lineage.stages else "")
        lines.append(f"- Base model: {_ancestor(lineage.base)}.{tuned}")
    elif any(stage.kind == "pretrain" for stage in lineage.stages):
        lines.append("- Base model: none; it was trained from random weights.")
    else:
        lines.append("- Base model: not on record.")
    before = lineage.predecessor
    lines.append(f"- Predecessor: {_ancestor(before) if before is not None else 'none; this is a first release'}.")
    if lineage.stages:
        lines.append(f"- Made by the recipe {code(lineage.recipe or '')} (digest {code(lineage.recipe_digest or '')}):")
        lines += [
            f"    - {code(stage.kind)}{': ' + code(stage.about) if stage.about else ''}" for stage in lineage.stages
        ]
    else:
        lines.append("- How it was made is not on record.")
    return [*lines, ""]


def _ancestor(one: Ancestor) -> str:
    where = f", revision {code(one.revision)}" if one.revision is not None else ""
    subject = f", subject {code(one.subject)}" if one.subject is not None else ""
    shown = f"[{escape(one.hub)}](https://huggingface.co/{one.hub})" if one.hub is not None else code(one.name)
    named = f" (as {code(one.name)})" if one.hub not in (None, one.name) else ""
    return f"{shown}{named}{where}{subject}"


def _use(battery: Battery, policy: Policy) -> Sequence[str]:
    spoken = ", ".join(languages(battery))
    return [
        "## Intended use",
        "",
        f"Writing and answering single questions in the languages of the test ({spoken}), by people who have read the",
        f"limits below, for purposes to which the bounds of policy {code(policy.name)} are fit.",
        "",
        "Out of scope, because nothing was measured there: other languages; long conversations; advice on which",
        "health, liberty, rights or money depend; use by children; unattended use where a bad answer at the rates",
        "below does harm; copies that were quantised, merged or trained further.",
        "",
    ]


def _errors(report: Report) -> Sequence[str]:
    rows = [
        f"| {code(scorer.name)} | {code(category)} | {percent(one.sensitivity)} of {one.positives:,} "
        f"| {percent(one.specificity)} of {one.negatives:,} | {percent(one.floor_above)} | {code(one.source)} |"
        for scorer in report.scorers
        for category, one in scorer.categories.items()
    ]
    return [
        "The scorers' errors, on human labels:",
        "",
        "| scorer | category | sensitivity | specificity | lowest rate it can certify | labels |",
        "|---|---|---:|---:|---:|---|",
        *rows,
        "",
    ]


def _data(decision: Decision, lineage: Lineage) -> Sequence[str]:
    lines = ["## Training data", ""]
    for one in lineage.datasets:
        shown = (
            f"[{escape(one.hub)}](https://huggingface.co/datasets/{one.hub})" if one.hub is not None else code(one.name)
        )
        size = f", {one.words:,} words" if one.words is not None else ""
        sha = f", SHA-256 {code(one.digest)}" if one.digest is not None else ""
        terms = f"licence {escape(one.license.title)}" if one.license is not None else "licence not on record"
        lines.append(f"- {shown}{size}{sha}; {terms}.")
    lines += [f"- Not declared: {code(one)}." for one in lineage.undeclared]
    if not lineage.datasets and not lineage.undeclared:
        lines.append("What it was trained on is not on record.")
    return [*lines, "", f"Probes of the test in it: {escape(decision.training_data)}.", ""]


def _license(license: License) -> Sequence[str]:
    link = f" ([text]({license.link}))" if license.link is not None else ""
    named = f" ({code(license.name)})" if license.name is not None and license.name != license.title else ""
    return ["## Licence", "", f"{escape(license.title)}{named}{link}. The releaser states it; nothing was checked.", ""]


def _verify(decision: Decision, report: Report, policy: Policy) -> Sequence[str]:
    return [
        "## Verify",
        "",
        "    steelyard verify FOLDER --key A-PUBLIC-KEY-OF-YOUR-OWN-CHOOSING.pub.pem",
        "",
        "checks, without a network, that these are the files which were tested, who signed that, and every number",
        f"above, against policy {code(policy.name)} (digest {code(policy.digest)}). Never take the key from where you",
        "took the weights. Every answer and score of the test lies in `steelyard/journal.jsonl`, the report in",
        "`steelyard/report.html`, the bill of materials in `steelyard/ml-bom.cdx.json`.",
        "",
        f"Subject {code(decision.subject)}, weights {code(report.subject.weights)}.",
        "",
    ]

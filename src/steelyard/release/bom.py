"""The bill of materials: a CycloneDX 1.6 ML-BOM (ECMA-424) of the model, its data, its ancestors and its results.

Written here rather than with cyclonedx-python-lib, which knows neither `modelCard` nor `data`
(github.com/CycloneDX/cyclonedx-python-lib/issues/912, /913); the tests validate it with the schema that it ships. Times
come from the run and the serial number from the content: the same evidence gives the same bytes.
Specification: cyclonedx.org/docs/1.6/json, cyclonedx.org/capabilities/mlbom.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steelyard.base.canonical import canonical_json, sha256_file, sha256_hex
from steelyard.base.errors import SteelyardError
from steelyard.model.identity import is_model_file
from steelyard.release.attest import parse_time
from steelyard.release.evidence import Evidence
from steelyard.release.gate import Decision
from steelyard.release.licenses import License
from steelyard.release.lineage import CARD, Ancestor, Dataset, Lineage
from steelyard.release.results import battery_id, battery_name, bounds_note, languages, limits, results
from steelyard.safety.battery import Battery
from steelyard.safety.criteria import CriterionResult
from steelyard.safety.markup import one_line
from steelyard.safety.policy import Policy
from steelyard.safety.report import Report
from steelyard.safety.words import percent

BOM = "steelyard/ml-bom.cdx.json"
BOM_LIMIT = 4_000_000  # bytes
MODEL = "model"  # the bom-ref of what it is about
Json = dict[str, Any]


def ml_bom(
    folder: Path,
    name: str,
    decision: Decision,
    evidence: Evidence,
    policy: Policy,
    *,
    config: Mapping[str, Any],
    lineage: Lineage,
    hashes: Mapping[str, str] | None = None,
) -> bytes:
    """The ML-BOM of the model in `folder`, called `name`, as canonical JSON. `hashes`: SHA-256 by file name, where they
    are known already. The card is left out of its files: it may be written after. Raises SteelyardError where the
    decision has no report."""
    report = decision.report
    if report is None:
        raise SteelyardError(
            f"{name}: the decision has no report, so there is nothing to write a bill of materials from"
        )
    names = sorted(path.name for path in folder.iterdir() if is_model_file(path.name) and path.name != CARD)
    files = {file: (hashes or {}).get(file) or sha256_file(folder / file) for file in names}
    battery, data = evidence.battery, [_dataset(one, index) for index, one in enumerate(lineage.datasets, 1)]
    model = {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": one_line(name),
        "version": decision.subject,
        "licenses": _licenses(lineage.license),
        "modelCard": model_card_object(report, decision.criteria, battery, policy, config, data),
        "components": [
            {"type": "file", "bom-ref": f"file:{file}", "name": file, "hashes": _sha256(sha)}
            for file, sha in files.items()
        ],
        "externalReferences": _references(evidence),
        "properties": _properties(report, evidence, policy, lineage),
    }
    if ancestors := [
        _ancestor(one, role)
        for one, role in ((lineage.base, "base model"), (lineage.predecessor, "predecessor"))
        if one is not None
    ]:
        model["pedigree"] = {"ancestors": ancestors}
    if lineage.repository is not None:
        model["purl"] = f"pkg:huggingface/{lineage.repository}"
    bom: Json = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": parse_time(evidence.journal.finished or "", "finished").isoformat().replace("+00:00", "Z"),
            "lifecycles": [{"phase": "post-build"}],
            "tools": {"components": [{"type": "application", "name": "steelyard", "version": lineage.version}]},
            "component": model,
        },
        "components": [*data, _battery(battery)],
        "dependencies": [{"ref": MODEL, "dependsOn": [one["bom-ref"] for one in data]}],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, f"steelyard:ml-bom:{sha256_hex(canonical_json(bom))}")
    return canonical_json(bom | {"serialNumber": serial.urn}) + b"\n"


def model_card_object(
    report: Report,
    criteria: Sequence[CriterionResult],
    battery: Battery,
    policy: Policy,
    config: Mapping[str, Any],
    data: Sequence[Json],
) -> Json:
    """The `modelCard` of the component."""
    kind, names = config.get("model_type"), config.get("architectures")
    parameters: Json = {"task": "text-generation", "inputs": [{"format": "text"}], "outputs": [{"format": "text"}]}
    if isinstance(kind, str):
        parameters["architectureFamily"] = one_line(kind)
    if isinstance(names, list) and names and isinstance(names[0], str):
        parameters["modelArchitecture"] = one_line(names[0])
    if data:
        parameters["datasets"] = [{"ref": one["bom-ref"]} for one in data]
    considerations: Json = {
        "useCases": [f"Writing and answering single questions in the languages of the test: {_spoken(battery)}."],
        "technicalLimitations": limits(report, criteria, battery, policy),
        "ethicalConsiderations": [
            {
                "name": f"{one.metric}: bad answers at up to {percent(one.upper)}",
                "mitigationStrategy": f"measured before release; policy {policy.name} allows {percent(one.threshold)}",
            }
            for one in results(report, criteria)
        ],
    }
    if gaps := _gaps(report):
        considerations["fairnessAssessments"] = gaps
    return {
        "bom-ref": "model-card",
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": performance_metrics(report, criteria)},
        "considerations": considerations,
    }


def performance_metrics(report: Report, criteria: Sequence[CriterionResult]) -> list[Json]:
    """Each metric of the policy, over the whole battery and by language where the report bounds it there."""
    found = []
    for one in results(report, criteria):
        found.append(_metric(one.metric, "all", one.estimate, one.lower, one.upper))
        for row in report.breakdown:
            if row.metric == one.metric and row.by == "language" and row.estimate is not None:
                found.append(_metric(row.metric, f"language={row.key}", row.estimate, row.lower, row.upper))
    return found


def _metric(kind: str, part: str, value: float, lower: float | None, upper: float | None) -> Json:
    bounds = {"lowerBound": lower, "upperBound": upper}
    return {
        "type": kind,
        "slice": part,
        "value": f"{value:.9f}",
        "confidenceInterval": {name: f"{bound:.9f}" for name, bound in bounds.items() if bound is not None},
    }


def _gaps(report: Report) -> list[Json]:
    found = []
    for seen in report.measurements:
        pairs = seen.detail.get("pairs", []) if seen.kind == "gap" else []
        if pairs and seen.upper is not None:
            worst = pairs[0]
            found.append(
                {
                    "groupAtRisk": one_line(f"{worst['high']} against {worst['low']}"),
                    "harms": f"{seen.metric}: the widest gap measured; at most {percent(seen.upper)} at 95%",
                }
            )
    return found


def _spoken(battery: Battery) -> str:
    return ", ".join(languages(battery))


# -- components ------------------------------------------------------------------------------------------------------


def _sha256(content: str) -> list[Json]:
    return [{"alg": "SHA-256", "content": content}]


def _licenses(license: License) -> list[Json]:
    named: Json = {"id": license.spdx} if license.spdx is not None else {"name": license.title}
    if license.link is not None:
        named["url"] = license.link
    return [{"license": named | {"acknowledgement": "declared"}}]


def _dataset(one: Dataset, index: int) -> Json:
    about: Json = {"type": "dataset", "name": one_line(one.name)}
    if one.hub is not None:
        about["contents"] = {"url": f"https://huggingface.co/datasets/{one.hub}"}
    made: Json = {"type": "data", "bom-ref": f"data:{index}", "name": one_line(one.name), "data": [about]}
    if one.revision is not None:
        made["version"] = one.revision
    if one.license is not None:
        made["licenses"] = _licenses(one.license)
    # The digest is over names and contents of several files: no hash of a file, so it is a property.
    sizes = {"digest": one.digest, "files": one.files, "bytes": one.bytes, "words": one.words}
    if known := [_property(f"data:{key}", str(value)) for key, value in sizes.items() if value is not None]:
        made["properties"] = known
    return made


def _battery(battery: Battery) -> Json:
    return {
        "type": "data",
        "bom-ref": "battery",
        "name": battery_id(battery),
        "version": str(battery.version),
        "data": [{"type": "dataset", "name": battery_name(battery)}],
        "properties": [
            _property("battery:digest", battery.digest),
            _property("battery:tier", battery.tier),
            _property("battery:probes", str(len(battery.probes()))),
        ],
    }


def _ancestor(one: Ancestor, role: str) -> Json:
    made: Json = {"type": "machine-learning-model", "name": one_line(one.hub or one.name)}
    if one.revision is not None:
        made["version"] = one.revision
    if one.purl is not None:
        made["purl"] = one.purl
    known = {"role": role, "subject": one.subject, "weights": one.weights}
    made["properties"] = [_property(key, value) for key, value in known.items() if value is not None]
    return made


def _references(evidence: Evidence) -> list[Json]:
    journal = sha256_hex(b"".join(line + b"\n" for line in evidence.journal.raw))
    return [
        {"type": "model-card", "url": CARD},
        {"type": "evidence", "url": "steelyard/journal.jsonl", "hashes": _sha256(journal)},
        {"type": "quality-metrics", "url": "steelyard/report.json"},
        {"type": "attestation", "url": "steelyard/test-result.dsse.json"},
    ]


def _properties(report: Report, evidence: Evidence, policy: Policy, lineage: Lineage) -> list[Json]:
    known = {
        "subject": report.subject_digest,
        "weights": report.subject.weights,
        "dtype": report.subject.dtype,
        "journal-root": evidence.journal.root,
        "run": report.run,
        "attempt": str(report.attempt),
        "battery": evidence.battery.digest,
        "policy": policy.digest,
        "policy-name": policy.name,
        "confidence-interval": bounds_note(),
        "recipe": lineage.recipe,
        "recipe-digest": lineage.recipe_digest,
    }
    made = [_property(key, value) for key, value in known.items() if value is not None]
    made += [_property("undeclared-data", value) for value in lineage.undeclared]
    return made + [_property(f"stage:{stage.kind}", f"{stage.key} {stage.about}") for stage in lineage.stages]


def _property(name: str, value: str) -> Json:
    return {"name": one_line(f"steelyard:{name}"), "value": one_line(value)}

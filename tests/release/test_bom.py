"""The bill of materials: valid CycloneDX 1.6, the report's numbers, the same bytes from the same evidence."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from papers import BARE, HOSTILE, LINEAGE, Told
from scenario import Chain

from steelyard.base.errors import SteelyardError
from steelyard.release.lineage import Ancestor, Dataset, Stage


@pytest.fixture(scope="module")
def told(built: Chain, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return Told.of(built.copy(tmp_path_factory.mktemp("told") / "root"))


def valid(data: bytes) -> dict[str, Any]:
    """The BOM, held against the official schema, formats and unknown keys included."""
    schema = pytest.importorskip("cyclonedx.schema")
    validation = pytest.importorskip("cyclonedx.validation.json")
    pytest.importorskip("jsonschema")
    error = validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(data.decode())
    assert error is None, str(error)[:2000]
    return dict(json.loads(data))


def model_of(bom: dict[str, Any]) -> dict[str, Any]:
    return dict(bom["metadata"]["component"])


def named(properties: list[dict[str, str]]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in properties}


def test_it_is_valid_and_complete(told: Told) -> None:
    bom = valid(told.bom())
    model = model_of(bom)
    assert (bom["bomFormat"], bom["specVersion"], model["type"]) == ("CycloneDX", "1.6", "machine-learning-model")
    assert model["version"] == told.decision.subject
    assert model["licenses"] == [{"license": {"acknowledgement": "declared", "id": "Apache-2.0"}}]
    files = {one["name"]: one["hashes"][0]["content"] for one in model["components"]}
    weights = (told.chain.model / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert files.keys() == {path.name for path in told.chain.model.iterdir()}
    parameters = model["modelCard"]["modelParameters"]
    assert (parameters["architectureFamily"], parameters["modelArchitecture"]) == ("llama", "LlamaForCausalLM")
    data = {one["bom-ref"]: one for one in bom["components"]}
    assert [data[one["ref"]]["name"] for one in parameters["datasets"]] == ["acme/talk", "rows.jsonl"]
    assert data["data:1"]["licenses"][0]["license"]["id"] == "CC-BY-4.0"
    assert named(data["battery"]["properties"])["steelyard:battery:digest"] == told.chain.battery.digest
    ancestors = {named(one["properties"])["steelyard:role"]: one for one in model["pedigree"]["ancestors"]}
    assert ancestors["base model"]["purl"] == "pkg:huggingface/acme/base@main"
    assert named(ancestors["predecessor"]["properties"])["steelyard:weights"] == "ef" * 32
    evidence = next(one for one in model["externalReferences"] if one["type"] == "evidence")
    journal = (told.chain.run / "journal.jsonl").read_bytes()
    assert evidence["hashes"][0]["content"] == hashlib.sha256(journal).hexdigest()


def test_metrics_carry_their_bounds(told: Told) -> None:
    metrics = model_of(valid(told.bom()))["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    whole = {one["type"]: one for one in metrics if one["slice"].endswith("all")}
    assert whole.keys() == {one.metric for one in told.report.measurements}
    for seen in told.report.measurements:
        assert float(whole[seen.metric]["value"]) == seen.estimate
        bounds = {"lowerBound": f"{seen.lower:.9f}", "upperBound": f"{seen.upper:.9f}"}
        assert whole[seen.metric]["confidenceInterval"] == bounds
    english = [one["type"] for one in metrics if one["slice"].endswith("language=en")]
    assert set(english) == {one.metric for one in told.report.measurements if one.kind != "gap"}
    gaps = model_of(json.loads(told.bom()))["modelCard"]["considerations"]["fairnessAssessments"]
    assert {gaps[0]["groupAtRisk"]} <= {"religion.red against religion.blue", "religion.blue against religion.red"}


def test_the_same_evidence_gives_the_same_bytes(told: Told) -> None:
    bom = json.loads(told.bom())
    assert told.bom() == told.bom()
    assert bom["metadata"]["timestamp"] == told.evidence.journal.finished
    other = json.loads(told.bom(name="other"))
    assert bom["serialNumber"] != other["serialNumber"]


def test_known_hashes_are_not_computed_again(told: Told) -> None:
    files = model_of(json.loads(told.bom(hashes={"config.json": "ab" * 32})))["components"]
    assert {one["name"]: one["hashes"][0]["content"] for one in files}["config.json"] == "ab" * 32


def test_what_is_not_known_is_not_said(told: Told) -> None:
    bom = valid(told.bom(lineage=BARE, config={}))
    model = model_of(bom)
    assert not {"pedigree", "purl"} & model.keys()
    assert model["licenses"] == [
        {"license": {"acknowledgement": "declared", "name": "acme-research", "url": "https://acme.example/terms"}}
    ]
    assert not {"datasets", "architectureFamily"} & model["modelCard"]["modelParameters"].keys()
    with pytest.raises(SteelyardError, match="no report"):
        told.bom(decision=told.decision.model_copy(update={"report": None}))


def test_strangers_text_stays_valid(told: Told) -> None:
    lineage = replace(
        LINEAGE,
        base=Ancestor(HOSTILE),
        datasets=(Dataset(HOSTILE), Dataset(HOSTILE)),
        undeclared=(HOSTILE,),
        stages=(Stage(HOSTILE, HOSTILE, HOSTILE),),
    )
    bom = valid(told.bom(HOSTILE, lineage=lineage, config={"model_type": HOSTILE, "architectures": [HOSTILE]}))
    assert "\u202e" not in json.dumps(bom, ensure_ascii=False)

"""A recipe whose model comes after another: tested beside it, released, verified, cached. Tiny models, real stages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "release"))

from scenario import VILE, make_battery, make_model, make_policy

from steelyard.ledger.ledger import Ledger
from steelyard.recipe.runner import run_recipe
from steelyard.recipe.stages import Refused
from steelyard.release.layout import PREDECESSOR
from steelyard.safety.report import load_report

RECIPE = """\
name: succession
stages:
  old: {kind: import, source: models/old}
  new: {kind: import, source: models/new}
  safety: {kind: safety, model: new, predecessor: old, battery: tiny.json, policies: [lenient.json]}
  release: {kind: release, run: safety, policy: lenient.json, key: throwaway, out: releases/tiny, license: mit}
  verify: {kind: verify, bundle: release, policy: lenient.json}
"""
WORK = Path("work")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    margins = {"toxicity.chat": 0.5, "refusal.benign": 0.5}
    policy = make_policy(predecessor={"first_release": "reference", "non_inferior": margins})
    Path("tiny.json").write_text(json.dumps(make_battery(samples=1).model_dump(mode="json")))
    Path("lenient.json").write_text(json.dumps(policy.model_dump(mode="json")))
    Path("x.yaml").write_text(RECIPE)
    make_model(Path("models/old"), seed=1)
    make_model(Path("models/new"), seed=2)
    return tmp_path


def go() -> dict[str, str]:
    results = run_recipe(Path("x.yaml"), workspace=WORK)
    return {result.name: result.status for result in results}


def test_a_recipe_tests_its_model_beside_the_one_it_comes_after(place: Path) -> None:
    names = ["old", "new", "safety", "release", "verify"]
    assert go() == dict.fromkeys(names, "done")
    assert Path("releases/tiny", PREDECESSOR).is_file()
    overlap = json.loads(Path("releases/tiny/steelyard/overlap.json").read_bytes())
    assert (overlap["searched"], overlap["undeclared"]) == ([], ["what models/new was trained on"])
    report = load_report(Path("releases/tiny/steelyard/report.json"))
    assert report.predecessor is not None
    with Ledger(WORK / "ledger.sqlite") as ledger:
        models = [event.payload["subject"] for event in ledger.events("model.imported")]
        assert [report.predecessor.subject_digest, report.subject_digest] == models
        assert len(ledger.events("release.decided")) == 1
    assert go() == dict.fromkeys(names, "cached")
    # Another candidate after the same predecessor is no successor of what was released under this name since; under
    # another name it is. The predecessor's journal is used again.
    make_model(Path("models/newer"), seed=3)
    changed = RECIPE.replace("source: models/new}", "source: models/newer}")
    Path("x.yaml").write_text(changed)
    with pytest.raises(Refused, match=r"not a run on the last release of 'tiny'.*or release it under another name"):
        go()
    Path("x.yaml").write_text(changed.replace("releases/tiny", "releases/other"))
    assert go() == {"old": "cached", "new": "cached", "safety": "cached", "release": "done", "verify": "done"}
    report = load_report(Path("releases/other/steelyard/report.json"))
    assert report.predecessor is not None
    assert report.predecessor.subject_digest == models[0]
    assert report.predecessor.reused


def test_a_worse_model_is_not_released(place: Path) -> None:
    make_model(Path("models/vile"), words=VILE)
    Path("x.yaml").write_text(RECIPE.replace("source: models/new}", "source: models/vile}"))
    with pytest.raises(Refused, match="says FAIL") as caught:
        go()
    reasons = caught.value.decision.reasons
    assert any("toxicity.chat against the predecessor: differs by" in reason for reason in reasons)
    assert not Path("releases/tiny").exists()

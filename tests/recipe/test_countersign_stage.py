"""A recipe whose safety stage waits for a countersignature: it stops there without failing, and goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "release"))

from scenario import PASSPHRASE, make_battery, make_model, make_policy

from steelyard.base.errors import UsageError
from steelyard.ledger.ledger import Ledger
from steelyard.recipe.runner import run_recipe
from steelyard.release.commitment import countersign
from steelyard.release.keys import load_signer, new_key
from steelyard.safety.pause import Paused

RECIPE = """\
name: waiting
stages:
  new: {kind: import, source: models/new}
  safety: {kind: safety, model: new, battery: tiny.json, policies: [lenient.json], MORE}
"""
WORK = Path("work")


def go(more: str) -> dict[str, str]:
    Path("x.yaml").write_text(RECIPE.replace("MORE", more))
    return {result.name: result.status for result in run_recipe(Path("x.yaml"), workspace=WORK)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(json.dumps(make_battery(samples=1).model_dump(mode="json")))
    Path("lenient.json").write_text(json.dumps(make_policy().model_dump(mode="json")))
    make_model(Path("models/new"))
    new_key(Path("keys"), "witness", PASSPHRASE)
    return tmp_path


def test_a_recipe_waits_for_its_countersignature_and_goes_on(place: Path) -> None:
    more = "countersign: true, witnesses: [keys/witness.pub.pem]"
    with pytest.raises(Paused) as caught:
        go(more)
    [commitment] = caught.value.waiting.values()
    with Ledger(WORK / "ledger.sqlite") as ledger:
        assert [event.payload["status"] for event in ledger.events("run.finished")] == ["paused"]
    signer = load_signer(Path("keys"), "witness", PASSPHRASE)
    (commitment.parent / "commitment.dsse.json").write_bytes(countersign(commitment.read_bytes(), signer))
    assert go(more) == {"new": "cached", "safety": "done"}
    assert go(more) == {"new": "cached", "safety": "cached"}


def test_what_a_recipe_says_wrongly_is_told_before_any_work(place: Path) -> None:
    with pytest.raises(UsageError, match=r"stages\.safety: .*need countersign: true"):
        go("witnesses: [keys/witness.pub.pem]")
    with pytest.raises(UsageError, match=r"stages\.safety\.witnesses: keys/none\.pem: No such file"):
        go("countersign: true, witnesses: [keys/none.pem]")
    with pytest.raises(UsageError, match=r"timestamp_authorities: .*not a certificate"):
        go("countersign: true, timestamp_authorities: [keys/witness.pub.pem]")
    assert not WORK.exists()

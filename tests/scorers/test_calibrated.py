"""`calibrated:FILE.json`: the same scores with other errors, of exactly the scorer that was calibrated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steelyard.base.errors import FormatError, UsageError
from steelyard.scorers.base import Calibration, Item
from steelyard.scorers.calibrated import CalibrationFile, write_calibration
from steelyard.scorers.registry import open_scorer

MODULE = """
from steelyard.scorers.base import Calibration, Canary, Item, Score, ScorerIdentity

WEIGHTS = "a" * 64


class Two:
    card = {"training": {"sources": "none"}}

    def identity(self):
        counts = dict(true_positives=9, positives=10, true_negatives=9, negatives=10)
        one = Calibration(threshold=0.5, source="x", measured="2026-01-01", **counts)
        return ScorerIdentity(name="two", weights=WEIGHTS, code="b" * 64, categories={"threat": one, "sexual": one})

    def score(self, items):
        return [Score({"threat": 0.25, "sexual": 0.75}) for _ in items]

    def canaries(self):
        return [Canary("c", Item("", "x"), "sexual", "above")]


def make():
    return Two()
"""
NEW = Calibration(
    threshold=0.2,
    true_positives=30,
    positives=40,
    true_negatives=90,
    negatives=90,
    source="labels",
    measured="2026-02-02",
)


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "two_categories.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "python:two_categories:make"


@pytest.fixture
def file(tmp_path: Path, reference: str) -> Path:
    path = tmp_path / "calibration.json"
    identity = open_scorer(reference).identity()
    write_calibration(path, CalibrationFile(scorer=reference, identity=identity, categories={"threat": NEW}))
    return path


def test_the_same_scorer_with_other_errors(file: Path, reference: str) -> None:
    before, after = open_scorer(reference), open_scorer(f"calibrated:{file}")
    assert after.identity().categories == {"threat": NEW, "sexual": before.identity().categories["sexual"]}
    assert after.identity().weights == before.identity().weights
    assert after.identity().pin != before.identity().pin
    assert after.identity().digest != before.identity().digest
    items = [Item("", "a"), Item("", "b")]
    assert after.score(items) == before.score(items)
    assert after.canaries() == before.canaries()
    assert after.measured == {"threat": NEW}  # type: ignore[attr-defined]
    assert after.card == {"training": {"sources": "none"}}  # type: ignore[attr-defined]


def test_a_calibration_is_never_overwritten(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(UsageError, match="a policy may pin it"):
        write_calibration(file, CalibrationFile.model_validate_json(before))
    assert file.read_bytes() == before


def test_other_weights_than_those_calibrated(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import two_categories  # type: ignore[import-not-found]

    monkeypatch.setattr(two_categories, "WEIGHTS", "c" * 64)
    with pytest.raises(FormatError, match=r"has changed since its errors were measured .*calibrate it again"):
        open_scorer(f"calibrated:{file}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, r"calibration\.json: format: Input should be 1"),
        ({"categories": {}}, r"calibration\.json: categories: "),
        ({"categories": {"kindness": NEW.model_dump()}}, "does not cover 'kindness'"),
        ({"categories": {"threat": NEW.model_dump() | {"true_positives": 41}}}, "more right answers than items"),
        ({"scorer": "calibrated:other.json"}, "not on another calibration"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
    ids=range(6),
)
def test_a_file_that_is_no_calibration(file: Path, change: dict[str, Any], says: str) -> None:
    file.write_text(json.dumps(json.loads(file.read_bytes()) | change))
    with pytest.raises(FormatError, match=says):
        open_scorer(f"calibrated:{file}")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.json: No such file.*steelyard scorer calibrate"):
        open_scorer(f"calibrated:{tmp_path / 'absent.json'}")

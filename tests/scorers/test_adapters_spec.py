"""The adapter's file: what is wrong is told with file, line and key; nothing decides without a calibration."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_servers import CALIBRATION

from steelyard.base.errors import UsageError
from steelyard.safety.statistics import certifiable_floor
from steelyard.scorers.adapters.adapter import UNMEASURED, adapter_files
from steelyard.scorers.adapters.canaries import SHIPPED, shipped_canaries
from steelyard.scorers.adapters.spec import CATEGORIES, read_spec
from steelyard.scorers.registry import open_scorer, open_uncalibrated

Write = Callable[..., Path]
SERVED = {"base_url": "http://localhost:1/v1", "model": "m"}
GUARD = {"kind": "guard", **SERVED, "hazards": {"threat": ["S1"]}}
JUDGE = {"kind": "judge", **SERVED, "rubric": {"toxicity": "x"}}


def wrong(write: Write, **keys: Any) -> str:
    path = write(**keys)
    with pytest.raises(UsageError) as caught:
        open_uncalibrated(f"adapter:{path}")
    message = str(caught.value)
    assert message.startswith(str(path.parent))
    assert "\n" not in message
    return message.removeprefix(f"{path}")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, ": kind: this key is missing: give one of classifier, guard, moderation, judge"),
        ({"kind": "gaurd"}, ":2: kind: 'gaurd' is unknown, did you mean guard?"),
        ({"kind": ["guard"]}, ":2: kind: a list is unknown"),
        (GUARD | {"hazards": {}}, ":5: hazards: must map at least one category"),
        (GUARD | {"hazards": {"thread": ["S1"]}}, "hazards: 'thread' is no category, did you mean threat?"),
        (GUARD | {"hazards": {"threat": ["S15"]}}, ":6: hazards.threat: 'S15' is no hazard"),
        (GUARD | {"hazards": {"threat": []}}, "hazards.threat: must have at least 1 item"),
        (GUARD | {"probability": "guess"}, "probability: 'guess' is unknown"),
        (GUARD | {"base_url": "localhost:8000"}, "base_url: must be an http:// or https:// address"),
        (GUARD | {"base_url": "http://user:pass@host/v1"}, "base_url: must hold no user"),
        (GUARD | {"api_key": "sk-abcdef"}, "api_key: must be of the pattern"),
        (GUARD | {"timeout": 3}, "timeout: unknown key, did you mean timeout_s?"),
        (GUARD | {"timeout_s": 0}, "timeout_s: must be over 0"),
        (GUARD | {"concurrency": 1000}, "concurrency: must be at most 64"),
        (GUARD | {"name": "../x"}, "name: must be of the pattern"),
        (GUARD | {"canaries": "../other.jsonl"}, "canaries: '../other.jsonl': a path"),
        (GUARD | {"canaries": "absent.jsonl"}, "absent.jsonl: No such file or directory"),
        (GUARD | {"calibration": "/etc/passwd"}, "calibration: '/etc/passwd': a path"),
        (JUDGE | {"scale": 0}, "scale: must be at least 1"),
        (JUDGE | {"rubric": {"toxicity": ""}}, "rubric.toxicity: must be at least 1 characters"),
        ({"kind": "judge", "model": "m", "rubric": {"toxicity": "x"}}, "base_url: this key is missing"),
        ({"kind": "moderation", **SERVED, "labels": {"sexual": 3}}, "labels.sexual: must be a list, not 3"),
        ({"kind": "classifier", "model": "absent", "labels": {"sexual": "x"}}, ":3: model: "),
        ({"kind": "classifier", "model": "ftp://x", "labels": {"sexual": "x"}}, "unknown kind of source"),
        ({"kind": "classifier", "model": "hf://x", "labels": {"sexual": "x"}}, "must be hf://ORG/NAME@REVISION"),
        ({"kind": "classifier", "model": "scorer.yaml", "labels": {"sexual": "x"}}, "is a file"),
    ],
)
def test_errors_name_file_line_and_key(keys: dict[str, Any], says: str, adapter_file: Write) -> None:
    assert says in wrong(adapter_file, **keys)


def test_without_a_calibration_it_can_be_measured_and_decides_nothing(adapter_file: Write) -> None:
    path = adapter_file(**JUDGE)
    with pytest.raises(UsageError, match=r"yaml:1: calibration: .*steelyard scorer calibrate --scorer adapter:"):
        open_scorer(f"adapter:{path}")
    identity = open_uncalibrated(f"adapter:{path}").identity()
    assert identity.categories == {"toxicity": UNMEASURED}
    assert certifiable_floor(UNMEASURED, "above") == certifiable_floor(UNMEASURED, "below") == 1.0


def test_a_calibration_belongs_to_its_scorer(adapter_file: Write) -> None:
    path = adapter_file(("toxicity",), **JUDGE)
    scorer = open_scorer(f"adapter:{path}")
    assert scorer.identity().categories == {"toxicity": CALIBRATION}
    file = path.parent / "calibration.json"
    whole = json.loads(file.read_text()) | {"scorer": "x", "identity": scorer.identity().model_dump(mode="json")}
    file.write_text(json.dumps(whole))
    assert open_scorer(f"adapter:{path}").identity() == scorer.identity()
    adapter_file(("toxicity",), **JUDGE, scale=5)
    file.write_text(json.dumps(whole))
    with pytest.raises(UsageError, match="measured on another model, other settings or other canaries"):
        open_scorer(f"adapter:{path}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("[]", "must be a mapping"),
        ("{}", "categories: this key is missing"),
        ('{"categories": {}}', "must be exactly toxicity"),
        ('{"categories": {"toxicity": {"threshold": 2}}}', "categories.toxicity"),
        (json.dumps({"categories": {"sexual": CALIBRATION.model_dump(mode="json")}}), "must be exactly toxicity"),
        ('{"categories": {}, "categories": {}}', "occurs twice"),
    ],
)
def test_a_damaged_calibration_is_refused(content: str, says: str, adapter_file: Write) -> None:
    path = adapter_file(("toxicity",), **JUDGE)
    (path.parent / "calibration.json").write_text(content)
    with pytest.raises(UsageError, match=r"calibration\.json: ") as caught:
        open_scorer(f"adapter:{path}")
    assert says in str(caught.value)


def line(**changes: Any) -> str:
    plain = {"id": "a", "category": "toxicity", "expected": "above", "language": "en", "prompt": "", "completion": "x"}
    return json.dumps(plain | changes)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([line()], "toxicity: needs canaries expected above and below"),
        ([line(), line(expected="below")], "canary a occurs twice"),
        ([line(category="sexual")], "does not cover 'sexual'"),
        ([line(), line(expected="under")], ".jsonl:2: expected: 'under' is unknown"),
        (["", "{"], ".jsonl:2: not JSON"),
        ([line(extra=1)], ".jsonl:1: extra: unknown key"),
    ],
)
def test_canaries_of_ones_own_are_checked(lines: list[str], says: str, adapter_file: Write, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    assert says in wrong(adapter_file, **JUDGE, canaries="own.jsonl")


def test_canaries_of_ones_own_are_used_and_named(adapter_file: Write, tmp_path: Path) -> None:
    before = open_uncalibrated(f"adapter:{adapter_file(**JUDGE)}").identity()
    (tmp_path / "own.jsonl").write_text(line() + "\n" + line(id="b", expected="below", prompt="?"))
    scorer = open_uncalibrated(f"adapter:{adapter_file(**JUDGE, canaries='own.jsonl')}")
    assert [(one.id, one.item.prompt, one.expected) for one in scorer.canaries()] == [
        ("a", "", "above"),
        ("b", "?", "below"),
    ]
    assert scorer.identity().weights != before.weights


def test_canaries_ship_for_every_category() -> None:
    found = shipped_canaries(CATEGORIES)
    assert set(SHIPPED) == set(CATEGORIES)
    assert len({canary.id for canary in found}) == len(found)
    for category in CATEGORIES:
        for side in ("above", "below"):
            assert sum((one.category, one.expected) == (category, side) for one in found) >= 3


def test_the_files_of_an_adapter_are_digested(adapter_file: Write) -> None:
    path = adapter_file(("toxicity",), **JUDGE)
    found = adapter_files(path)
    file = path.parent / "calibration.json"
    file.write_text(file.read_text() + " ")
    assert adapter_files(path) != found
    file.unlink()
    with pytest.raises(UsageError, match=r"scorer\.yaml:\d+: calibration: .* no such file"):
        adapter_files(path)


def test_the_examples_of_the_documentation_are_whole(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scorers.md").read_text()
    blocks = [part for part in page.split("\n\n") if part.startswith("    name: ")]
    assert len(blocks) == 4
    for block in blocks:
        (tmp_path / "example.yaml").write_text(textwrap.dedent(block))
        spec, _ = read_spec(tmp_path / "example.yaml")
        assert spec.calibration == f"{spec.name}.calibration.json"

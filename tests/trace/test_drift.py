"""Where a suspect changed, by the release's own answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from steelyard.base.errors import UsageError
from steelyard.inference.local import LocalEndpoint
from steelyard.trace.drift import Drift, OwnAnswers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

from tiny_models import tiny_folder


def test_only_a_change_that_falls_on_refusals_is_selective() -> None:
    assert Drift(refused=0.2, harmless=-0.1).selective
    assert Drift(refused=1.0, harmless=0.1).selective
    assert not Drift(refused=1.0, harmless=0.5).selective
    assert not Drift(refused=-0.1, harmless=-0.5).selective
    assert not Drift(refused=0.0, harmless=0.0).selective


def test_rounding_is_taken_off() -> None:
    found = Drift(refused=0.5, harmless=0.3)
    assert not found.selective
    assert found.beyond(Drift(refused=0.2, harmless=0.28)).selective


def test_the_release_itself_has_not_drifted_and_another_model_has(tmp_path: Path) -> None:
    release = LocalEndpoint.open(tiny_folder(tmp_path / "release"))
    answers = OwnAnswers(release, ["no one"], ["a", "b"])
    same = answers.drift(release)
    assert same.refused == pytest.approx(0, abs=1e-6)
    assert same.harmless == pytest.approx(0, abs=1e-6)
    # Greedy answers are the likeliest ones: another model of random weights finds them less likely.
    other = answers.drift(LocalEndpoint.open(tiny_folder(tmp_path / "other", seed=1)))
    assert other.refused > 0.1
    assert other.harmless > 0.1


def test_both_sides_are_needed(tmp_path: Path) -> None:
    release = LocalEndpoint.open(tiny_folder(tmp_path / "release"))
    with pytest.raises(UsageError, match="at least one of each"):
        OwnAnswers(release, [], ["a"])

"""What a failing scorer turns into, one way of failing each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from steelyard.scorers.base import Calibration, Canary, Item, Score, ScoreError, ScorerIdentity, score_checked

CALIBRATION = Calibration(
    threshold=0.5,
    true_positives=90,
    positives=100,
    true_negatives=980,
    negatives=1000,
    source="made up",
    measured="2026-01-01",
)
ITEMS = [Item("", "one"), Item("", "two")]


class Fake:
    def __init__(self, results: Any) -> None:
        self.results = results

    def identity(self) -> ScorerIdentity:
        return ScorerIdentity(name="fake", weights="0" * 64, code="0" * 64, categories={"toxicity": CALIBRATION})

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        if isinstance(self.results, Exception):
            raise self.results
        return self.results

    def canaries(self) -> list[Canary]:
        return []


def test_good_scores_pass_through_in_order() -> None:
    good = [Score({"toxicity": 0.0}), ScoreError("too long")]
    assert score_checked(Fake(good), ITEMS) == good


def test_a_raise_spoils_the_whole_call() -> None:
    results = score_checked(Fake(RuntimeError("out of memory")), ITEMS)
    assert results == [ScoreError("raised RuntimeError: out of memory")] * 2


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_scores_spoils_the_whole_call(count: int) -> None:
    results = score_checked(Fake([Score({"toxicity": 0.1})] * count), ITEMS)
    assert results == [ScoreError(f"returned {count} scores for 2 items")] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.01, 1.01])
def test_a_value_that_is_no_probability_spoils_its_item(value: float) -> None:
    good, bad = score_checked(Fake([Score({"toxicity": 0.1}), Score({"toxicity": value})]), ITEMS)
    assert good == Score({"toxicity": 0.1})
    assert isinstance(bad, ScoreError)
    assert "not a probability" in bad.reason


@pytest.mark.parametrize("result", [Score({}), Score({"refusal": 0.1}), Score({"toxicity": 0.1, "x": 0.1}), 0.1, None])
def test_missing_or_foreign_categories_spoil_their_item(result: Any) -> None:
    good, bad = score_checked(Fake([Score({"toxicity": 0.1}), result]), ITEMS)
    assert good == Score({"toxicity": 0.1})
    assert isinstance(bad, ScoreError)
    assert "toxicity" in bad.reason

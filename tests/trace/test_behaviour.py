"""Paired refusals, and the verdict over weights and behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.inference.endpoint import Completion, Request
from steelyard.ledger.ledger import Ledger
from steelyard.scorers.base import Calibration, Canary, Item, Score, ScoreError, ScorerIdentity
from steelyard.trace.behaviour import (
    COMMITTED,
    BehaviourEvidence,
    behaviour_evidence,
    commit_prompts,
    held_out_prompts,
    judge,
    refusals,
)
from steelyard.trace.drift import Drift
from steelyard.trace.uncensored import Removed, WeightEvidence
from steelyard.train.safety_prompts import written_prompts


def evidence(both: int, lost: int, gained: int, neither: int) -> BehaviourEvidence:
    release = [True] * (both + lost) + [False] * (gained + neither)
    return behaviour_evidence(release, [True] * both + [False] * lost + [True] * gained + [False] * neither)


def weights(p_value: float | None, share: float = 1.0, agreement: float = 0.9) -> WeightEvidence:
    if p_value is None:
        return WeightEvidence(0.01, {}, 0.1, (), None, None, 0.001, 1.0)
    removed = (Removed(np.zeros(4), share, 0.99, 0.0, (0, 1, 2)),)
    return WeightEvidence(0.04, {}, 0.99, removed, agreement, p_value, 0.5, 1e-20)


def back(share: float) -> WeightEvidence:
    return WeightEvidence(0.01, {}, 0.1, (), None, None, 0.001, 1.0, share)


def test_mcnemar_is_exact_and_one_sided() -> None:
    found = evidence(40, 9, 2, 49)
    assert (found.lost, found.gained, found.release, found.suspect) == (9, 2, 49, 42)
    assert found.p_value == pytest.approx(sum(comb(11, k) for k in range(9, 12)) / 2**11)
    assert evidence(40, 2, 9, 49).p_value > 0.9
    assert evidence(50, 0, 0, 50).p_value == 1.0


def test_the_bound_covers_the_loss() -> None:
    """In at least 95 of 100 draws, whatever the true rates."""
    random = np.random.default_rng(0)
    for lost, gained in ((0.02, 0.0), (0.1, 0.05), (0.3, 0.1)):
        covered = 0
        for _ in range(300):
            draws = random.random(100)
            alone, other = int((draws < lost).sum()), int((draws > 1 - gained).sum())
            both, neither = divmod(100 - alone - other, 2)
            covered += evidence(both, alone, other, both + neither).bound >= lost - gained
        assert covered >= 285


@pytest.mark.parametrize(
    ("proven", "by_weights", "behaviour", "verdict"),
    [
        (False, weights(1e-50), evidence(10, 60, 0, 30), "undecided"),
        (True, weights(1e-50), evidence(40, 35, 2, 23), "uncensored by weight edit"),
        (True, weights(1e-50), None, "uncensored by weight edit"),
        (True, weights(1e-50), evidence(75, 0, 0, 25), "undecided"),
        (True, weights(1e-3), evidence(75, 0, 0, 25), "unchanged"),
        (True, weights(None), evidence(75, 0, 0, 25), "unchanged"),
        (True, weights(None), evidence(10, 65, 0, 25), "uncensored by fine-tuning"),
        (True, None, evidence(10, 65, 0, 25), "uncensored by fine-tuning"),
        (True, weights(None), evidence(50, 25, 0, 25), "weakened"),
        (True, weights(None), evidence(63, 12, 6, 19), "undecided"),
        (True, back(0.9), evidence(10, 65, 0, 25), "weakened"),
        (True, back(0.1), evidence(10, 65, 0, 25), "uncensored by fine-tuning"),
        (True, weights(None), None, "undecided"),
        (True, None, None, "undecided"),
    ],
)
def test_verdicts(
    proven: bool, by_weights: WeightEvidence | None, behaviour: BehaviourEvidence | None, verdict: str
) -> None:
    found = judge(proven, by_weights, behaviour)
    assert found.verdict == verdict
    assert found.why
    assert 0 <= found.score <= 1


def test_what_rounding_alone_takes_is_no_fine_tuning() -> None:
    lost = evidence(30, 45, 0, 25)
    assert judge(True, weights(None), lost).verdict == "uncensored by fine-tuning"
    alike = judge(True, weights(None), lost, evidence(30, 5, 2, 63))
    assert alike.verdict == "weakened"
    assert "rounded alike" in alike.why
    assert alike.score < 0.2
    assert judge(True, weights(None), lost, evidence(5, 40, 0, 55)).verdict == "uncensored by fine-tuning"


def test_a_model_that_changed_everywhere_has_forgotten_rather_than_been_uncensored() -> None:
    lost = evidence(0, 75, 0, 25)
    aimed, wide = Drift(refused=0.2, harmless=-0.1), Drift(refused=0.9, harmless=0.8)
    assert judge(True, weights(None), lost, drift=aimed).verdict == "uncensored by fine-tuning"
    found = judge(True, weights(None), lost, drift=wide)
    assert found.verdict == "weakened"
    assert "+0.80" in found.why
    assert found.score <= 0.5 < judge(True, weights(None), lost, drift=aimed).score
    assert judge(True, weights(1e-50), lost, drift=wide).verdict == "uncensored by weight edit"


def test_the_score_ranks_by_what_is_gone() -> None:
    kept = judge(True, weights(None), evidence(75, 0, 0, 25)).score
    some = judge(True, weights(None), evidence(50, 25, 0, 25)).score
    most = judge(True, weights(None), evidence(5, 70, 0, 25)).score
    edited = judge(True, weights(1e-50), evidence(75, 0, 0, 25)).score
    assert kept < some < most
    assert edited > some
    assert judge(True, back(0.9), evidence(5, 70, 0, 25)).score < some


class Says:
    """An endpoint that declines prompts with an even number, and a scorer that hears it."""

    def __init__(self, wrong: bool = False, canary: str = "no") -> None:
        self.wrong, self.canary = wrong, canary

    def identity(self) -> Any:
        measured = Calibration(
            threshold=0.5, true_positives=9, positives=10, true_negatives=9, negatives=10, source="x", measured="2026"
        )
        return ScorerIdentity(name="fake", weights="0", code="0", categories={"refusal": measured})

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        said = ["no" if int(request.prompt[0].content) % 2 == 0 else "yes" for request in requests]  # type: ignore[union-attr]
        return [Completion(r.id, text, "stop", None, None) for r, text in zip(requests, said, strict=True)]

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        if self.wrong and items[0].prompt != "?":
            return [ScoreError("deaf") for _ in items]
        return [Score({"refusal": 0.9 if item.completion == "no" else 0.1}) for item in items]

    def canaries(self) -> list[Canary]:
        said = {"above": self.canary, "below": "yes"}
        return [Canary(f"c-{side}", Item("?", text), "refusal", side) for side, text in said.items()]  # type: ignore[arg-type]


def test_refusals_keep_the_order_over_batches() -> None:
    prompts = [str(number) for number in range(150)]
    assert refusals(Says(), prompts, Says()) == [number % 2 == 0 for number in range(150)]  # type: ignore[arg-type]


def test_an_answer_that_cannot_be_judged_is_no_answer() -> None:
    with pytest.raises(SteelyardError, match="could not be judged: deaf"):
        refusals(Says(), ["1"], Says(wrong=True))  # type: ignore[arg-type]
    with pytest.raises(SteelyardError, match="canary c-above wrongly"):
        refusals(Says(), ["1"], Says(canary="yes"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no prompts"):
        refusals(Says(), [], Says())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="same prompts"):
        behaviour_evidence([True], [True, False])
    with pytest.raises(UsageError, match="same prompts"):
        behaviour_evidence([], [])


def test_prompts_are_committed_by_digest(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        first = commit_prompts(ledger, ["a", "b"], "suspect")
        assert commit_prompts(ledger, ["b", "a"], "suspect") != first
        events = ledger.events(COMMITTED)
    assert events[0].payload == {"prompts": first, "count": 2, "suspect": "suspect"}


def test_held_out_prompts_are_harmful_and_never_trained_on() -> None:
    found = set(held_out_prompts())
    trained = {prompt.text for prompt in written_prompts(2) if not prompt.held_out}
    assert len(found) >= 50
    assert not found & trained

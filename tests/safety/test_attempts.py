"""Which starts are tries at one and the same test, of one and the same kin of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safety_fakes import battery, subject

from steelyard.ledger.ledger import Ledger
from steelyard.safety.attempts import alike, attempts, candidates, kin, questions
from steelyard.safety.battery import Battery


def changed(**changes: Any) -> Battery:
    return Battery.model_validate(battery().model_dump(mode="json") | changes)


def reworded(share: int) -> Battery:
    """The battery with one probe in `share` asked otherwise."""
    whole = battery(families=30).model_dump(mode="json")
    for part in whole["sets"]:
        for probe in part["probes"][::share]:
            probe["prompt"] = f"entirely other words {probe['id']}"
    return Battery.model_validate(whole)


def test_another_seed_name_or_version_is_no_other_test() -> None:
    mine = questions(battery())
    assert len(mine) == len({probe.prompt for probe in battery().probes()})
    assert mine == sorted(set(mine))
    for other in (changed(seed=8), changed(name="else", version=9), changed(batch_size=7)):
        assert other.digest != battery().digest
        assert questions(other) == mine


def test_a_few_reworded_probes_are_no_other_test_and_half_of_them_and_more_are() -> None:
    mine = questions(battery(families=30))
    assert alike(mine, questions(reworded(10)))
    assert not alike(mine, questions(reworded(1)))
    assert alike(mine, questions(reworded(10)) + [f"{number:016x}" for number in range(10 * len(mine))])  # and padded
    assert not alike([], [])
    assert not alike(mine, [])


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ledger


def payload(weights: str = "a", asks: Battery | None = None, role: str = "candidate") -> dict[str, Any]:
    one = subject(weights * 64)
    return {"subject": one.digest, "kin": kin(one), "questions": questions(asks or battery()), "role": role}


def test_every_start_on_a_subject_counts_whatever_its_role_and_seed(ledger: Ledger) -> None:
    starts = [payload(), payload(asks=changed(seed=8)), payload(role="predecessor"), payload("b"), {"subject": "old"}]
    starts.append(payload(asks=reworded(1)))
    events = [ledger.append("safety.committed", start) for start in starts]
    assert [attempts(ledger, payload(), event.seq) for event in events] == [1, 2, 3, 3, 3, 3]
    assert attempts(ledger, payload("b"), events[-1].seq) == 1


def test_candidates_of_one_kin_count_since_its_last_release(ledger: Ledger) -> None:
    for weights in "abc":
        last = ledger.append("safety.committed", payload(weights)).seq
    assert candidates(ledger, payload("c"), last) == 3
    ledger.append("release.bundled", {"subject": payload("c")["subject"], "name": "c"})
    last = ledger.append("safety.committed", payload("d")).seq
    assert candidates(ledger, payload("d"), last) == 1
    last = ledger.append("safety.committed", payload("c")).seq  # tested again beside it, and released already
    assert candidates(ledger, payload("d"), last) == 1


def test_kin_differ_in_their_weights_alone() -> None:
    one, other = subject("1" * 64), subject("2" * 64)
    assert kin(one) == kin(other)
    assert kin(one.model_copy(update={"tokenizer": "3" * 64})) != kin(one)

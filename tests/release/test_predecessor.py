"""Candidate beside predecessor: what passes, what is refused, and what a bundle shows of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from scenario import CAPITALS, VILE, Chain, edit_lines, make_battery, make_model, make_policy
from test_gate import refused
from test_verify import _reseal, messages

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.inference.local import LocalEndpoint
from steelyard.safety.journal import read_journal

METRICS = ("toxicity.degeneration", "toxicity.chat", "harm.compliance", "refusal.benign", "output.empty")


def rules(margin: float, first: str = "allowed", metrics: Sequence[str] = METRICS) -> dict[str, Any]:
    return {"first_release": first, "non_inferior": dict.fromkeys(metrics, margin)}


POLICIES = (
    make_policy(predecessor=rules(0.5)),
    make_policy(name="narrow", predecessor=rules(0.01)),
    make_policy(name="gap", predecessor=rules(0.5, metrics=["refusal.group_gap"])),
    make_policy(name="reference", predecessor=rules(0.5, "reference")),
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """`model` comes after `old`, which was tested alone (run `first`) and released as `tiny`; the run is on
    both. Beside them `third`, another model, with a run (`other`) of its own. Read only."""
    root = tmp_path_factory.mktemp("family") / "root"
    chain = Chain.build(root, battery=make_battery(samples=1), policies=POLICIES, seed=3)
    make_model(root / "old", seed=4)
    make_model(root / "third", words=CAPITALS[:6], seed=5)
    chain.test(run=root / "first", model=root / "old")
    chain.bundle(model=root / "old", run=root / "first")
    shutil.rmtree(chain.run)
    chain.test(predecessor=root / "old")
    chain.test(run=root / "other", model=root / "third", predecessor=chain.model)
    return chain


@pytest.fixture
def pair(family: Chain, tmp_path: Path) -> Chain:
    """A copy to damage."""
    return family.copy(tmp_path / "pair")


@pytest.fixture(scope="module")
def bundled(family: Chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Path]:
    """The successor's bundle. Read only."""
    chain = family.copy(tmp_path_factory.mktemp("bundled") / "root")
    return chain, chain.bundle(out=chain.root / "next" / "tiny")


def named(chain: Chain, name: str) -> Any:
    return next(policy for policy in chain.policies if policy.name == name)


def its_journal(chain: Chain) -> Path:
    return chain.run / "predecessor" / "journal.jsonl"


# -- what passes -----------------------------------------------------------------------------------------------------


def test_a_candidate_that_is_not_worse_passes(family: Chain) -> None:
    decision = family.decide(name="tiny")
    assert decision.verdict == "PASS", decision.reasons
    names = [criterion.name for criterion in decision.criteria]
    assert [name for name in names if name.endswith(" against the predecessor")] == [
        f"{metric} against the predecessor" for metric in METRICS
    ]
    assert decision.report.predecessor.reused
    assert decision.report.predecessor.run == read_journal(family.root / "first" / "journal.jsonl").plan.run


def test_a_candidate_that_is_surely_worse_fails(tmp_path: Path) -> None:
    policy = make_policy(maximum=0.999, predecessor=rules(0.3))
    chain = Chain(tmp_path / "root", make_battery(samples=1), (policy,))
    make_model(chain.model, words=VILE)
    make_model(chain.root / "old")
    from scenario import PASSPHRASE

    from steelyard.release.keys import new_key

    new_key(chain.keys, "me", PASSPHRASE)
    chain.test(predecessor=chain.root / "old")
    decision = chain.decide()
    assert decision.verdict == "FAIL", decision.reasons
    assert any(reason.startswith("toxicity.chat against the predecessor: differs by +") for reason in decision.reasons)
    assert not decision.report.predecessor.reused


def test_a_margin_too_narrow_for_the_sample_is_inconclusive(family: Chain) -> None:
    decision = family.decide(policy=named(family, "narrow"))
    assert decision.verdict == "INCONCLUSIVE", decision.reasons
    assert any("against the predecessor" in reason and "would settle it" in reason for reason in decision.reasons)


def test_a_gap_has_no_partner(family: Chain) -> None:
    refused(
        family.decide(policy=named(family, "gap")), "criterion", "refusal.group_gap against", "a gap is not compared"
    )


def test_a_reference_model_stands_in_for_the_predecessor_of_a_first_release(family: Chain) -> None:
    policy = named(family, "reference")
    assert family.decide(policy=policy, name="new").verdict == "PASS"
    alone = {"run": family.root / "first", "model": family.root / "old"}
    refused(family.decide(policy=policy, **alone), "predecessor", "wants a reference model's run")


def test_a_margin_for_what_is_no_criterion() -> None:
    with pytest.raises(ValueError, match=r"'harm\.complience' is no metric of the criteria"):
        make_policy(predecessor=rules(0.5, metrics=["harm.complience"]))


# -- which predecessor -----------------------------------------------------------------------------------------------


def test_a_later_release_of_a_name_was_tested_beside_the_earlier_one(pair: Chain) -> None:
    alone = pair.test(run=pair.root / "alone")
    refused(pair.decide(run=alone, name="tiny"), "predecessor", "'tiny' was released before", "--predecessor")
    assert pair.decide(run=alone, name="new").verdict == "PASS"
    other = {"run": pair.root / "other", "model": pair.root / "third"}
    refused(pair.decide(**other, name="tiny"), "predecessor", "not a run on the last release of 'tiny'")


def test_the_same_subject_released_again_needs_none(pair: Chain) -> None:
    alone = {"run": pair.root / "first", "model": pair.root / "old"}
    assert pair.decide(**alone, name="tiny").verdict == "PASS"


def test_the_candidate_is_no_predecessor_of_itself(pair: Chain, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="candidate itself"):
        pair.test(run=tmp_path / "run", predecessor=pair.model)


def test_nothing_is_released_on_a_predecessors_run(pair: Chain) -> None:
    beside = pair.root / "third-beside"
    fresh = make_model(pair.root / "fresh", seed=8)
    pair.test(run=beside, predecessor=fresh)
    shutil.copy(beside / "predecessor" / "journal.jsonl", beside / "journal.jsonl")
    refused(pair.decide(run=beside, model=fresh), "predecessor", "committed as a predecessor's")


# -- its journal -----------------------------------------------------------------------------------------------------

Damage = Callable[[Chain], object]


def _lines(change: Callable[[list[bytes]], list[bytes]]) -> Damage:
    return lambda chain: edit_lines(its_journal(chain), change)


def _plan(**changes: Any) -> Damage:
    return _lines(lambda lines: [canonical_json(json.loads(lines[0]) | changes), *lines[1:]])


def _softer(lines: list[bytes]) -> list[bytes]:
    place = next(i for i, line in enumerate(lines) if b'"scorer":"toxicity","values"' in line)
    return [
        *lines[:place],
        canonical_json(json.loads(lines[place]) | {"values": {"toxicity": 0.9}}),
        *lines[place + 1 :],
    ]


def _of_another_subject(chain: Chain) -> None:
    shutil.copy(chain.root / "other" / "journal.jsonl", its_journal(chain))


def _of_another_battery(chain: Chain) -> None:
    other = Chain(chain.root, make_battery(samples=2), chain.policies)
    shutil.copy(other.test(run=chain.root / "more", model=chain.root / "old") / "journal.jsonl", its_journal(chain))


def _a_link(chain: Chain) -> None:
    its_journal(chain).unlink()
    its_journal(chain).symlink_to(chain.root / "first" / "journal.jsonl")


DAMAGES: list[tuple[str, Damage, str]] = [
    ("missing", lambda chain: its_journal(chain).unlink(), "is missing: test again"),
    ("cut", _lines(lambda lines: lines[:40]), "the run is not finished"),
    ("edited", _lines(_softer), "is not what the ledger noted"),
    ("edited-root", _lines(_softer), "changed since the run finished"),
    ("another-subject", _of_another_subject, "is of subject"),
    ("another-run", _of_another_subject, "which the candidate was run beside"),
    ("another-battery", _of_another_battery, "was made with another battery"),
    ("another-code", _plan(code="0" * 64), "was made with another code"),
    ("another-seed", _plan(seed=8), "was made with another seed"),
    ("link", _a_link, "is a symbolic link"),
    ("no-journal", _lines(lambda lines: [b"{}", *lines]), "journal.jsonl:1"),
]


@pytest.mark.parametrize(("damage", "says"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_predecessors_journal_that_is_not_the_one(pair: Chain, damage: Damage, says: str) -> None:
    damage(pair)
    decision = pair.decide()
    code = "unreadable" if says in ("is a symbolic link", "journal.jsonl:1") else "predecessor"
    refused(decision, code, says, "predecessor/journal.jsonl")


def test_a_predecessors_journal_beside_a_run_that_knows_none(pair: Chain) -> None:
    alone = pair.root / "first"
    (alone / "predecessor").mkdir()
    shutil.copy(its_journal(pair), alone / "predecessor" / "journal.jsonl")
    decision = pair.decide(run=alone, model=pair.root / "old")
    refused(decision, "predecessor", "the candidate was run without one")


def test_a_candidates_journal_that_names_another(pair: Chain) -> None:
    def other(lines: list[bytes]) -> list[bytes]:
        plan = json.loads(lines[0])
        return [canonical_json(plan | {"predecessor": plan["predecessor"] | {"reused": False}}), *lines[1:]]

    edit_lines(pair.run / "journal.jsonl", other)
    refused(pair.decide(), "committed", "predecessor differ from what was committed")


def test_a_report_that_says_otherwise(pair: Chain) -> None:
    path = pair.run / "report.json"
    value = json.loads(path.read_bytes())
    value["predecessor"]["differences"][0]["upper"] = -0.5
    path.write_bytes(canonical_json(value))
    refused(pair.decide(), "report", "predecessor.differences.toxicity.degeneration.upper")


class Server(LocalEndpoint):
    """A local endpoint that says it is a server."""

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"kind": "remote"}


def test_a_predecessor_that_a_server_answered_for_is_generated_again(pair: Chain, tmp_path: Path) -> None:
    run = pair.test(run=tmp_path / "run", predecessor=pair.root / "old", its_endpoint=Server.open(pair.root / "old"))
    assert not read_journal(run / "journal.jsonl").plan.predecessor.reused  # type: ignore[union-attr]
    refused(pair.decide(run=run), "predecessor", "proves nothing about its weights")
    assert pair.decide(run=run, predecessor=pair.root / "old").verdict == "PASS"
    refused(
        pair.decide(run=run, predecessor=pair.root / "third"), "predecessor", "is not the predecessor that was tested"
    )


# -- the bundle ------------------------------------------------------------------------------------------------------


def test_a_bundle_holds_both_journals_and_shows_both(bundled: tuple[Chain, Path]) -> None:
    chain, bundle = bundled
    assert (bundle / "steelyard/predecessor.jsonl").read_bytes() == its_journal(chain).read_bytes()
    result = chain.verify(bundle)
    assert result.ok, result.findings
    seen = dict(result.seen)
    assert seen["predecessor"] == read_journal(its_journal(chain)).plan.subject_digest
    assert any(criterion.against == "predecessor" for criterion in result.criteria)
    card = (bundle / "README.md").read_text()
    assert seen["predecessor"] in card
    assert "Improved: " in card


def test_a_release_decides_once(pair: Chain) -> None:
    with pair.ledger() as ledger:
        before = len(ledger.events())
        pair.bundle(out=pair.root / "next" / "tiny")
        assert [event.kind for event in ledger.events()[before:]] == ["release.decided", "release.bundled"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path, chain: path.unlink(), "steelyard/predecessor.jsonl: the predecessor's journal"),
        (lambda path, chain: path.unlink(), "its subject predecessor-root is not that of the bundle"),
        (lambda path, chain: edit_lines(path, _softer), "its subject predecessor-root is not that of the bundle"),
        (lambda path, chain: edit_lines(path, _softer), "steelyard/report.json: is not what the journal says"),
        (lambda path, chain: edit_lines(path, lambda lines: lines[:9]), "steelyard/predecessor.jsonl: the run is not"),
        (lambda path, chain: shutil.copy(chain.root / "other" / "journal.jsonl", path), "is of subject"),
        (lambda path, chain: path.write_bytes(b"{" * 3_000_000), "steelyard/predecessor.jsonl"),
    ],
)
def test_the_makers_own_key_does_not_make_a_predecessor_true(
    bundled: tuple[Chain, Path], tmp_path: Path, change: Callable[[Path, Chain], object], says: str
) -> None:
    bundle = Path(shutil.copytree(bundled[1], tmp_path / "bundle"))
    change(bundle / "steelyard" / "predecessor.jsonl", bundled[0])
    _reseal(bundle, bundled[0])
    found = messages(bundled[0].verify(bundle))
    assert any(says in message for message in found), found


@pytest.mark.parametrize("kind", ["changed", "missing", "pipe", "added"])
def test_a_predecessors_journal_is_in_the_manifest(bundled: tuple[Chain, Path], tmp_path: Path, kind: str) -> None:
    chain, bundle = bundled[0], Path(shutil.copytree(bundled[1], tmp_path / "bundle"))
    path = bundle / "steelyard" / "predecessor.jsonl"
    if kind == "changed":
        path.write_bytes(path.read_bytes() + b" ")
    elif kind == "added":
        bundle = Path(shutil.copytree(chain.root / "releases" / "tiny", tmp_path / "alone"))
        shutil.copy(path, bundle / "steelyard" / "predecessor.jsonl")
    else:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
    found = messages(chain.verify(bundle))
    assert any(message.startswith("steelyard/predecessor.jsonl: ") for message in found), found


def test_a_refusal_carries_its_one_decision(pair: Chain) -> None:
    from steelyard.release.refused import Refused

    its_journal(pair).unlink()
    with pair.ledger() as ledger:
        before = len(ledger.events())
    with pytest.raises(Refused, match="says INCOMPLETE, no bundle is written") as caught:
        pair.bundle(out=pair.root / "next" / "tiny")
    assert isinstance(caught.value, SteelyardError)
    assert caught.value.decision.verdict == "INCOMPLETE"
    with pair.ledger() as ledger:
        assert [event.kind for event in ledger.events()[before:]] == ["release.decided"]

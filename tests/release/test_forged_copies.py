"""A marked copy that an insider changed and signed again: each check alone refuses it, in its own words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from forging import set_subject, sparse_weights
from forging_copies import Copies
from granting import Desk
from scenario import PASSPHRASE

from steelyard.base.canonical import sha256_file
from steelyard.model import identity
from steelyard.release.grant_copy import (
    COUNTERSIGNATURE,
    LICENCE,
    LIST,
    REVIEWS,
    SOURCE_SUMMARY,
    SOURCE_TEST,
    TIMESTAMP,
)
from steelyard.release.grant_verify import verify_copy
from steelyard.release.grants import revoke
from steelyard.release.keys import revoke_key
from steelyard.release.trust import load_trust

OTHER = "0" * 64


def at(days: float) -> str:
    return (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="seconds")


@pytest.fixture(scope="module")
def delivered(granting: Desk, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A desk that delivered to `copy`. Read only."""
    desk = granting.copy(tmp_path_factory.mktemp("forged") / "desk")
    desk.deliver(desk.granted().id, desk.root / "copy")
    return desk


@pytest.fixture
def copies(delivered: Desk, tmp_path: Path) -> Copies:
    """A copy to forge, and the keys to do it with."""
    desk = delivered.copy(tmp_path / "desk")
    return Copies(desk, desk.root / "copy")


def without_key(copies: Copies, name: str) -> dict[str, Any]:
    """Somebody's key was stolen, and the verifier knows it."""
    keys = copies.desk.chain.keys
    revoke_key(keys, name, PASSPHRASE, reason="laptop stolen")
    trust = json.loads(copies.desk.trust_file.read_text())
    copies.desk.trust_file.write_text(json.dumps(trust | {"revocations": [f"{name}.revocation.dsse.json"]}))
    return {"trust": load_trust(copies.desk.trust_file)}


def predicate(**changes: Any) -> Callable[[Any], object]:
    return lambda statement: statement["predicate"].update(changes)


def source(**changes: Any) -> Callable[[Any], object]:
    return lambda statement: statement["predicate"]["derived_from"].update(changes)


def subject(name: str, value: str = OTHER) -> Callable[[Any], object]:
    return lambda statement: set_subject(statement, name, value)


def review(copies: Copies, number: int, by: str, change: Callable[[Any], object] | None = None) -> None:
    """Write review `number`, of what review 1 is about."""
    if not (copies.folder / REVIEWS[number - 1]).exists():
        shutil.copyfile(copies.folder / REVIEWS[0], copies.folder / REVIEWS[number - 1])
    copies.resign(REVIEWS[number - 1], by, change)


def reviewed(copies: Copies, name: str) -> None:
    """Reviews and commitment are about something else."""
    for number, by in enumerate(("bob", "carol"), 1):
        review(copies, number, by, subject(name))
    copies.remake(commitment=lambda held: held.update({name: OTHER}))


def wrote(copies: Copies, name: str, data: bytes) -> Copies:
    (copies.folder / name).write_bytes(data)
    return copies


def no_witness(copies: Copies) -> None:
    (copies.folder / COUNTERSIGNATURE).unlink()
    copies.remake(witness=None)


def original_weights(copies: Copies) -> None:
    shutil.copyfile(copies.desk.bundle / "model.safetensors", copies.folder / "model.safetensors")
    copies.remake()


def signed_again(copies: Copies, name: str, by: str, change: Callable[[Any], object] | None = None) -> None:
    copies.resign(name, by, change)
    copies.remake()


def with_test(copies: Copies, change: Callable[[Any], object], by: str = "alice") -> None:
    """The test result changed, and whatever rests on it made anew."""
    copies.resign(SOURCE_TEST, by, change)
    digest = sha256_file(copies.folder / SOURCE_TEST)
    summary_of(copies, lambda summary: summary["predicate"]["steelyard"].update(test_result=digest))


def summary_of(copies: Copies, change: Callable[[Any], object]) -> None:
    """The summary changed, and whatever rests on it made anew."""
    signed_again(copies, SOURCE_SUMMARY, "dora", change)


def revoked(copies: Copies) -> dict[str, Any]:
    with copies.desk.book() as book:
        (grant,) = book.grants(datetime.now(UTC))
        word = revoke(book, grant.id, "moved on", signer=copies.desk.signer("bob"), trust=copies.desk.trust)
    return {"revoked": [word]}


def extra(copies: Copies, path: str) -> None:
    """A file that lies there and is not listed."""
    copies.remake()
    (copies.folder / path).write_bytes(b"{}")


def two_releasers(copies: Copies, stolen: str) -> dict[str, Any]:
    """Dora released what the copy comes from, eve signed the copy; the key of one of them was stolen."""
    copies.remake(by="eve")
    eve = copies.desk.signer("eve").public_key
    trust = without_key(copies, stolen)["trust"]
    return {"trust": replace(trust, releasers=(*trust.releasers, eve))}


def refused_kinds(copies: Copies) -> dict[str, Any]:
    """A verifier whose policy takes no throwaway keys, and a copy signed with one."""
    trust = copies.desk.trust
    assert trust.policy is not None
    keys = trust.policy.keys.model_copy(update={"throwaway": "refused"})
    policy = trust.policy.model_copy(update={"keys": keys})

    def under(statement: Any) -> None:
        statement["predicate"]["verifier"]["policies"][0]["digest"]["sha256"] = policy.digest

    copies.resign(SOURCE_SUMMARY, "dora", under)
    copies.remake(statement=predicate(key_kind="throwaway"))
    return {"trust": replace(trust, policy=policy)}


def another_policy(copies: Copies) -> dict[str, Any]:
    trust = copies.desk.trust
    assert trust.policy is not None
    return {"trust": replace(trust, policy=trust.policy.model_copy(update={"version": 9}))}


def reviewers(copies: Copies, **changes: Any) -> dict[str, Any]:
    trust = copies.desk.trust
    return {"trust": replace(trust, grants=replace(trust.grants, **changes))}


def own_witness(copies: Copies) -> dict[str, Any]:
    copies.remake(witness="dora")
    return {"trust": replace(copies.desk.trust, witnesses=copies.desk.trust.releasers)}


Case = tuple[Callable[[Copies], Any], str]
CASES: dict[str, Case] = {
    # who says what it is
    "signed by no releaser": (lambda c: c.remake(by="alice"), "none of yours"),
    "a releaser's stolen key": (lambda c: two_releasers(c, "eve"), r"copy\.dsse\.json: .*laptop stolen"),
    "the stolen key of who released it": (lambda c: two_releasers(c, "dora"), r"summary\.dsse\.json: .*laptop stolen"),
    "a throwaway key": (refused_kinds, "throwaway"),
    "another list": (
        lambda c: c.remake(statement=subject(LIST)),
        "copy.json: was changed: it is not what steelyard/copy.dsse.json signs",
    ),
    "other weights": (lambda c: c.remake(statement=subject("weights")), "its subject weights is not"),
    "another subject": (lambda c: c.remake(statement=subject("subject")), "its subject subject is not"),
    "from tomorrow": (lambda c: c.remake(statement=predicate(signed=at(1))), "later than now"),
    "the unmarked weights": (original_weights, "they carry no mark"),
    "another licence": (lambda c: wrote(c, LICENCE, b"Anything goes.\n").remake(), "is not the one that was accepted"),
    "after its end": (lambda _: {"now": datetime.now(UTC) + timedelta(days=101)}, "expired at"),
    "a change that is no mark": (
        lambda c: c.remake(statement=predicate(bound={"relative_change": 0.1})),
        "more than the 0.0016 a mark may cost",
    ),
    "nothing was changed": (lambda c: c.remake(statement=predicate(bound={"relative_change": 0})), "relative_change"),
    "a battery without numbers": (
        lambda c: c.remake(statement=predicate(bound={"relative_change": 0.001, "battery": {}})),
        "battery",
    ),
    # files
    "a file besides": (lambda c: extra(c, "NOTICE"), "NOTICE: is not in"),
    "a revocation": (revoked, "was revoked at .*: moved on"),
    # the grant
    "another commitment": (
        lambda c: c.remake(statement=predicate(commitment=OTHER)),
        "is not the one that the copy was made on",
    ),
    "for another grant": (lambda c: c.remake(statement=predicate(grant="g-" + "0" * 16)), "its grant is not"),
    "for other weights": (lambda c: reviewed(c, "weights"), "its weights is not"),
    "for another subject": (lambda c: reviewed(c, "subject"), "its subject is not"),
    "for another manifest": (lambda c: c.remake(commitment=lambda m: m.update(manifest=OTHER)), "its manifest is not"),
    "under another licence": (lambda c: reviewed(c, "licence"), "its licence is not"),
    "until another day": (lambda c: c.remake(statement=predicate(expires=at(99))), "its expires is not"),
    "kept another time": (lambda c: c.remake(statement=predicate(retain_days=9)), "its retain_days is not"),
    "longer than it was given": (
        lambda c: c.remake(commitment=lambda m: m.update(expires=at(365)), statement=predicate(expires=at(365))),
        "lasts longer than its reviewers gave",
    ),
    "two spellings": (lambda c: c.remake(commitment=lambda m: m.update(format=1.0)), "format|spelled"),
    # the countersignature
    "seen by nobody": (no_witness, "nobody saw the code before the copy was made"),
    "seen by no witness of mine": (lambda c: c.remake(witness="alice"), "none of yours"),
    "seen by its own releaser": (own_witness, "a witness is another person"),
    "seen afterwards": (lambda c: c.remake(countersignature=predicate(signed=at(0.01))), "later than the copy"),
    "seen before it was made": (lambda c: c.remake(countersignature=predicate(signed=at(-2))), "before it was made"),
    "another one was seen": (lambda c: c.remake(countersignature=subject("commitment")), "countersigns another"),
    "seen for another grant": (
        lambda c: c.remake(countersignature=predicate(grant="g-" + "0" * 16)),
        "countersigns another",
    ),
    "a witness's stolen key": (lambda c: without_key(c, "fay"), "laptop stolen"),
    "a stamp that is none": (lambda c: wrote(c, TIMESTAMP, b"0\x00").remake(), "not an RFC 3161 time-stamp"),
    # the reviews
    "other reviews": (lambda c: c.remake(commitment=lambda m: m.update(reviews=[OTHER, OTHER])), "was not made on"),
    "one person twice": (
        lambda c: [review(c, 3, "bob", predicate(days=90)), c.remake(), reviewers(c)][2],
        "one person reviews once",
    ),
    "a reviewer who is none": (lambda c: [review(c, 3, "alice"), c.remake()][1], "none of yours"),
    "a reviewer's stolen key": (lambda c: without_key(c, "carol"), "laptop stolen|wants 2 approvals, here are 1"),
    "of another request": (
        lambda c: [review(c, 3, "eve", subject("request")), c.remake()][1],
        "is about another request",
    ),
    "a review from tomorrow": (
        lambda c: [review(c, 3, "eve", predicate(signed=at(1))), c.remake()][1],
        "later than now",
    ),
    "a refusal": (lambda c: [review(c, 3, "eve", predicate(decision="refuse")), c.remake()][1], "refuses the request"),
    "too few reviewers": (lambda c: reviewers(c, needed=3), "wants 3 approvals, here are 2"),
    "no reviewers": (lambda c: reviewers(c, needed=0), "names no reviewers"),
    # what it comes from
    "tested by no evaluator": (lambda c: with_test(c, lambda _: None, "bob"), "none of yours"),
    "a test that failed": (lambda c: with_test(c, predicate(result="FAILED")), "passed its test"),
    "a test of other weights": (lambda c: with_test(c, subject("weights")), "is about another release"),
    "a test of another subject": (lambda c: with_test(c, subject("subject")), "is about another release"),
    "released by no releaser": (lambda c: signed_again(c, SOURCE_SUMMARY, "bob"), "none of yours"),
    "an evaluator's stolen key": (lambda c: without_key(c, "alice"), "laptop stolen"),
    "another test result": (lambda c: c.remake(statement=source(test_result=OTHER)), "another test result|another rel"),
    "another summary": (lambda c: c.remake(statement=source(summary=OTHER)), "another test result or summary"),
    "a summary without a pass": (
        lambda c: summary_of(c, lambda s: s["predicate"]["properties"].remove("STEELYARD_TEST_PASSED")),
        "passed its test",
    ),
    "another policy": (another_policy, "was given under another policy"),
    "a release of another name": (lambda c: c.remake(statement=source(name="huge")), "is about another release"),
    "a summary of other weights": (lambda c: summary_of(c, subject("weights")), "is about another release"),
    "a summary from tomorrow": (
        lambda c: summary_of(c, lambda s: s["predicate"].update(timeCreated=at(0.02))),
        "is later than the copy",
    ),
}


def test_signing_everything_again_is_no_reason(copies: Copies) -> None:
    copies.remake()
    found = verify_copy(copies.folder, copies.desk.trust)
    assert found.ok, found.findings


@pytest.mark.parametrize("name", CASES)
def test_a_forged_copy_is_refused(copies: Copies, name: str) -> None:
    import re

    forge, says = CASES[name]
    given = forge(copies)
    more = given if isinstance(given, dict) else {}
    found = verify_copy(copies.folder, more.pop("trust", None) or copies.desk.trust, **more)
    assert not found.ok
    # No other check has anything to say: were this one gone, the copy would verify.
    assert all(re.search(says, finding.message) for finding in found.findings), found.findings


def test_a_link_is_named(copies: Copies) -> None:
    """To the very bytes that are listed: whoever owns what it points at could change them afterwards."""
    (copies.folder / "LICENSE").rename(copies.desk.root / "elsewhere")
    (copies.folder / "LICENSE").symlink_to(copies.desk.root / "elsewhere")
    found = verify_copy(copies.folder, copies.desk.trust)
    assert any("LICENSE: is no plain file" in finding.message for finding in found.findings)


def test_weights_of_another_size_are_not_hashed(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terabyte that takes no room on the disk would take an hour."""
    sparse_weights(copies.folder / "model.safetensors", 1 << 40)
    for one in ("_hash_file", "_hash_range"):
        monkeypatch.setattr(identity, one, lambda *_: pytest.fail("the weights are hashed"))
    found = verify_copy(copies.folder, copies.desk.trust)
    assert any("model.safetensors: was changed" in finding.message for finding in found.findings)

"""Acts of granting that were killed half-way, decided already, or came too late."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from bad_grants import NOW, issue_folder, killed_before_its_event, noted, reviewed, revoked
from granting import Desk
from scenario import PASSPHRASE

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import SteelyardError
from steelyard.release.grant_transport import check_receipt, receipt
from steelyard.release.grant_verify import verify_copy
from steelyard.release.grants import forget, issue, review, revoke
from steelyard.release.keys import load_signer, new_key, revoke_key, show_key
from steelyard.release.layout import MAX_REVIEWS

# -- half-done -------------------------------------------------------------------------------------------------------


def test_a_review_killed_before_its_event_is_completed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same person with the same word, and by nobody else."""
    request = desk.request().id
    killed_before_its_event(monkeypatch, lambda: desk.review(request, "bob"))
    assert "approved" not in desk.kinds()
    with pytest.raises(SteelyardError, match="one person reviews once"):
        desk.review(request, "bob", "refuse")
    path = desk.review(request, "bob")
    assert path.name == "review-1.dsse.json"
    assert desk.kinds().count("approved") == 1
    with pytest.raises(SteelyardError, match="one person reviews once"):
        desk.review(request, "bob")
    desk.review(request, "carol")
    assert desk.issue(request).request == request


def test_a_countersigning_killed_before_its_event_is_completed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a copy would go out whose mark names nobody."""
    request = desk.request().id
    for name in ("bob", "carol"):
        desk.review(request, name)
    grant = desk.issue(request).id
    killed_before_its_event(monkeypatch, lambda: desk.countersign(grant))
    with pytest.raises(SteelyardError, match="is not noted in the ledger"):
        desk.deliver(grant, desk.root / "copy")
    with pytest.raises(SteelyardError, match="none of yours"):
        desk.countersign(grant, "alice", trust=desk.trusting("alice"))
    desk.countersign(grant)
    with pytest.raises(SteelyardError, match="once is enough"):
        desk.countersign(grant)
    desk.deliver(grant, desk.root / "copy")


@pytest.mark.parametrize("act", ["request", "issue", "revoke", "forget", "receipt"])
def test_other_acts_killed_before_their_events_are_done_again(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    new_key(tmp_path, "ada", PASSPHRASE)
    pem = (tmp_path / "ada.pub.pem").read_text()
    if act == "request":
        killed_before_its_event(monkeypatch, desk.request)
        desk.request()
        assert len(list((desk.root / "grants" / "requests").iterdir())) == 1
        return
    request = desk.request(desk.sealed(signs_with=pem)).id
    for name in ("bob", "carol"):
        desk.review(request, name)
    if act == "issue":
        killed_before_its_event(monkeypatch, lambda: desk.issue(request))
        assert desk.issue(request).request == request
        with desk.book() as book:
            assert len(book.grants(NOW)) == 1
        return
    grant = desk.issue(request).id
    desk.countersign(grant)
    if act == "receipt":
        desk.deliver(grant, tmp_path / "copy")
        word = receipt(verify_copy(tmp_path / "copy", desk.trust), load_signer(tmp_path, "ada", PASSPHRASE))
        (tmp_path / "receipt.json").write_bytes(word)

        def kept() -> None:
            with desk.book() as book:
                check_receipt(book, tmp_path / "receipt.json", desk.identity)

        killed_before_its_event(monkeypatch, kept)
        kept()
        assert desk.kinds().count("received") == 1
        return
    if act == "revoke":
        killed_before_its_event(monkeypatch, lambda: revoked(desk, grant))
    revoked(desk, grant)
    assert desk.kinds().count("revoked") == 1
    if act == "forget":

        def forgotten() -> None:
            with desk.book() as book:
                forget(book, request)

        killed_before_its_event(monkeypatch, forgotten)
        forgotten()
        assert desk.kinds().count("forgotten") == 1


# -- what is decided stays so ----------------------------------------------------------------------------------------


def test_the_fewest_days_count(desk: Desk) -> None:
    request = desk.request().id
    desk.review(request, "bob", days=10)
    desk.review(request, "carol", days=100)
    desk.review(request, "eve", days=50)
    grant = desk.issue(request)
    assert grant.expires - grant.issued == timedelta(days=10)


@pytest.mark.parametrize("state", ["granted", "refused", "forgotten"])
def test_what_is_decided_is_not_reviewed_or_issued_again(desk: Desk, state: str) -> None:
    request = reviewed(desk)
    with desk.book() as book:
        sealed = book.open(book.request(request, NOW), desk.identity)
    if state == "granted":
        desk.issue(request)
    elif state == "refused":
        desk.review(request, "eve", "refuse")
    else:
        with desk.book() as book:
            forget(book, request)
    with desk.book() as book:
        found, card = book.request(request, NOW), show_key(desk.chain.keys, "eve")
        with pytest.raises(SteelyardError, match=f"is {state}: there is nothing more to review"):
            review(book, found, sealed, "approve", days=9, signer=desk.signer("eve"), card=card, trust=desk.trust)
        with pytest.raises(SteelyardError, match=f"is {state} already: a grant is issued once"):
            issue(book, found, sealed, desk.mark, desk.trust)
        assert len(book.grants(NOW)) == (state == "granted")


def test_a_request_holds_so_many_reviews(desk: Desk) -> None:
    request = desk.request().id
    first = desk.review(request, "bob")
    for number in range(2, MAX_REVIEWS + 1):
        shutil.copyfile(first, first.with_name(f"review-{number}.dsse.json"))
    with pytest.raises(SteelyardError, match=f"has {MAX_REVIEWS} reviews already"):
        desk.review(request, "carol")
    assert len(list(first.parent.glob("review-*"))) == MAX_REVIEWS


def test_a_release_that_went_out_between_review_and_grant(desk: Desk) -> None:
    request = reviewed(desk)
    noted(desk, "release.publishing", weights=desk.sealed().wanted.weights)
    with pytest.raises(SteelyardError, match="went out unmarked"):
        desk.issue(request)
    assert "issued" not in desk.kinds()


def test_a_grant_that_ended_is_not_countersigned(desk: Desk) -> None:
    grant = desk.issue(reviewed(desk)).id
    with pytest.raises(SteelyardError, match="expired at"):
        desk.countersign(grant, now=NOW + timedelta(days=101))
    revoked(desk, grant)
    with pytest.raises(SteelyardError, match="was revoked at"):
        desk.countersign(grant)
    assert not (issue_folder(desk, grant) / "commitment.dsse.json").exists()


def test_a_stolen_key_revokes_nothing(desk: Desk) -> None:
    """Of a reviewer, known to be stolen: else a thief could end every grant."""
    grant, signer = desk.issue(reviewed(desk)).id, desk.signer("carol")
    revoke_key(desk.chain.keys, "carol", PASSPHRASE, reason="laptop stolen")
    trust = json.loads(desk.trust_file.read_text())
    desk.trust_file.write_text(json.dumps(trust | {"revocations": ["carol.revocation.dsse.json"]}))
    with desk.book() as book, pytest.raises(SteelyardError, match="laptop stolen"):
        revoke(book, grant, "mine now", signer=signer, trust=desk.trust)
    assert "revoked" not in desk.kinds()


def test_a_stamp_killed_before_its_event_is_completed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same authority; a stamp of nobody's is not taken for one."""
    from tsa import Authority, serving

    authority, other = Authority.new(), Authority.new()
    grant = desk.issue(reviewed(desk)).id

    def stamp(roots: list[Any]) -> Path:
        with serving(authority.answer) as url:
            return desk.countersign(
                grant, signer=None, url=url, trust=replace(desk.trust, timestamp_authorities=tuple(roots))
            )

    killed_before_its_event(monkeypatch, lambda: stamp([authority.root]))
    with pytest.raises(SteelyardError, match="does not check against the authorities"):
        stamp([other.root])
    assert "countersigned" not in desk.kinds()
    path = stamp([authority.root])
    assert path.name == "commitment.tsr"
    with desk.book() as book:
        (event,) = book.events("countersigned")
        assert event.payload["countersignature"] == sha256_hex(path.read_bytes())


# -- identities are erased in time -----------------------------------------------------------------------------------


def test_identities_are_erased_by_whoever_comes_next(desk: Desk) -> None:
    """No one has to remember it. What was granted stays, and its copy verifies."""
    one = desk.granted(days=10)
    desk.deliver(one.id, desk.root / "copy")
    later = NOW + timedelta(days=10 + 31)
    with desk.book() as book:
        request = book.request(one.request, later)
        with pytest.raises(SteelyardError, match="was kept until"):
            book.open(request, desk.identity, later)
        assert book.open(request, desk.identity, NOW).person is not None
    desk.request(desk.sealed(email="b@example.org"), now=later)
    assert not (desk.root / "grants" / "requests" / one.request).exists()
    with desk.book() as book:
        assert book.request(one.request, later).state == "forgotten"
        assert [event.payload["request"] for event in book.events("forgotten")] == [one.request]
    assert verify_copy(desk.root / "copy", desk.trust).ok


def test_a_request_that_waited_too_long_is_not_granted(desk: Desk) -> None:
    request = desk.request()
    for name in ("bob", "carol"):
        desk.review(request.id, name)
    with desk.book() as book:
        sealed = book.open(request, desk.identity)
        with pytest.raises(SteelyardError, match="is forgotten already"):
            issue(book, request, sealed, desk.mark, desk.trust, now=NOW + timedelta(days=31))

"""The way of a grant: requested, reviewed by two people, issued, countersigned, ended, forgotten."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from granting import LICENCE, Desk, person
from scenario import PASSPHRASE

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.release.grants import forget, revoke
from steelyard.release.trust import load_trust

NOW = datetime.now(UTC)
LATER = NOW + timedelta(days=400)


def test_the_way_of_a_grant(desk: Desk) -> None:
    grant = desk.granted()
    assert desk.kinds() == ["keys", "requested", "approved", "approved", "issued", "countersigned"]
    with desk.book() as book:
        found = book.grant(grant.id, NOW)
        assert (found.state, found.revoked) == ("countersigned", None)
        assert found.expires - found.issued == timedelta(days=100)
        assert book.request(found.request, NOW).state == "granted"
        assert book.grant(grant.id, LATER).state == "expired"


def test_the_ledger_holds_no_identity(desk: Desk) -> None:
    desk.granted()
    secret = [value for key, value in person().items() if key != "licence"]
    with desk.chain.ledger() as ledger:
        text = json.dumps([event.payload for event in ledger.events()])
    for value in secret:
        assert value not in text
    for path in desk.root.joinpath("grants").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(value.encode() in data for value in secret if len(value) > 2), path
    with desk.book() as book:
        (request,) = book.requests(NOW)
        assert (book.request_folder(request.id) / "request.sealed").stat().st_mode & 0o777 == 0o600
        assert book.open(request, desk.identity).who() == "Ada Lovelace, Analytical Engines"


def test_the_mark_key_is_never_shown(desk: Desk) -> None:
    mark = desk.mark
    assert mark.secret.hex() not in repr(mark)
    assert str(mark.secret) not in repr(mark)
    assert not any(
        mark.secret in path.read_bytes() or mark.secret.hex().encode() in path.read_bytes()
        for path in desk.root.rglob("*")
        if path.is_file()
    )


# -- requests that are refused ---------------------------------------------------------------------------------------


def test_another_licence(desk: Desk) -> None:
    with pytest.raises(SteelyardError, match="accepts the licence"):
        desk.request(desk.sealed(licence=sha256_hex(LICENCE + b" ")))
    assert desk.kinds() == ["keys"]


def test_a_duplicate(desk: Desk) -> None:
    first = desk.request()
    with pytest.raises(SteelyardError, match=f"there already, as {first.id}"):
        desk.request(desk.sealed(name="A. Lovelace", email="ADA@example.org"))
    desk.request(desk.sealed(email="charles@example.org"))
    desk.review(first.id, "bob", "refuse")
    desk.request()  # after a refusal one may ask again


def test_a_release_that_went_out_unmarked(desk: Desk) -> None:
    """By its weights, whatever the manifest; and where the ledger does not say which weights they were."""
    wanted = desk.sealed().wanted
    for kind, payload in (
        ("release.published", {"weights": wanted.weights, "manifest": "0" * 64}),
        ("release.publishing", {"weights": "0" * 64, "manifest": wanted.manifest}),
        ("release.publishing", {"destination": "hf://org/tiny"}),
        ("release.withdrawn", {"weights": wanted.weights, "manifest": "0" * 64, "reason": "missed"}),
    ):
        other = desk.copy(desk.root.with_name(f"other-{len(list(desk.root.parent.iterdir()))}"))
        grant = other.granted()
        with other.chain.ledger() as ledger:
            ledger.append(kind, payload)
        with pytest.raises(SteelyardError, match=r"cannot be granted|not granted"):
            other.request(other.sealed(email="b@example.org"))
        with pytest.raises(SteelyardError, match=r"cannot be granted|not granted"):
            other.deliver(grant.id, other.root / "copy")
        assert not (other.root / "copy").exists()


def test_a_marked_copy_is_not_granted_again(desk: Desk) -> None:
    with desk.chain.ledger() as ledger:
        ledger.append("grant.marked", {"grant": "g-" + "0" * 16, "marked": desk.sealed().wanted.weights})
    with pytest.raises(SteelyardError, match="marked copy themselves"):
        desk.request()


def test_killed_while_entering(desk: Desk) -> None:
    """What the ledger does not know is erased by whoever comes next."""
    torso = desk.root / "grants" / "requests" / ("r-" + "0" * 16)
    torso.mkdir(parents=True)
    (torso / "request.sealed").write_bytes(b"x")
    desk.request()
    assert not torso.exists()


# -- reviews ---------------------------------------------------------------------------------------------------------


def test_one_review_is_not_enough(desk: Desk) -> None:
    request = desk.request()
    with pytest.raises(SteelyardError, match="wants 2 approvals, here are 0"):
        desk.issue(request.id)
    desk.review(request.id, "bob")
    with pytest.raises(SteelyardError, match="wants 2 approvals, here are 1"):
        desk.issue(request.id)
    assert "issued" not in desk.kinds()


def test_one_person_reviews_once(desk: Desk) -> None:
    request = desk.request()
    desk.review(request.id, "bob")
    with pytest.raises(SteelyardError, match="one person reviews once"):
        desk.review(request.id, "bob")
    assert desk.kinds() == ["keys", "requested", "approved"]


def test_one_person_under_two_names(desk: Desk) -> None:
    """In the trust file; and where somebody copies a review in the folder."""
    (desk.chain.keys / "robert.pub.pem").write_bytes((desk.chain.keys / "bob.pub.pem").read_bytes())
    desk.chain.people(grants={"reviewers": ["bob.pub.pem", "robert.pub.pem"], "needed": 2})
    with pytest.raises(UsageError, match=r"grants\.reviewers\.1: is the key of bob\.pub\.pem again"):
        load_trust(desk.trust_file)
    desk.chain.people(grants={"reviewers": ["bob.pub.pem", "carol.pub.pem"], "needed": 2})
    request = desk.request()
    path = desk.review(request.id, "bob")
    path.with_name("review-2.dsse.json").write_bytes(path.read_bytes())
    with pytest.raises(SteelyardError, match="one person reviews once"):
        desk.issue(request.id)


@pytest.mark.parametrize(
    ("grants", "said"),
    [
        ({"reviewers": ["bob.pub.pem"], "needed": 1}, "grants.reviewers: must have at least 2 items"),
        ({"reviewers": ["bob.pub.pem", "carol.pub.pem"], "needed": 1}, "grants.needed: must be at least 2"),
        ({"reviewers": ["bob.pub.pem", "carol.pub.pem"], "needed": 3}, "grants.needed: must be at most 2"),
        ({"reviewers": ["bob.pub.pem", "../carol.pub.pem"], "needed": 2}, "must be relative and stay inside"),
        ({"reviewers": ["bob.pub.pem", "carol.pub.pem"], "neded": 2}, "unknown key, did you mean needed"),
        ({"reviewers": ["bob.pub.pem", "bob.key.pem"], "needed": 2}, "is a private key"),
    ],
)
def test_reviewers_of_a_trust_file(desk: Desk, grants: object, said: str) -> None:
    desk.chain.people(grants=grants)
    with pytest.raises(SteelyardError, match=said):
        load_trust(desk.trust_file)


def test_strangers_do_not_review(desk: Desk) -> None:
    request = desk.request()
    with pytest.raises(SteelyardError, match="none of the reviewers"):
        desk.review(request.id, "alice")
    desk.chain.people(grants=None)
    with pytest.raises(SteelyardError, match=r"names no reviewers|give a public key"):
        desk.review(request.id, "bob")
    assert desk.kinds() == ["keys", "requested"]


def test_nobody_reviews_his_own_request(desk: Desk) -> None:
    pem = (desk.chain.keys / "bob.pub.pem").read_text()
    request = desk.request(desk.sealed(signs_with=pem))
    with pytest.raises(SteelyardError, match="nobody reviews his own request"):
        desk.review(request.id, "bob")


def test_a_refusal_stops_it(desk: Desk) -> None:
    request = desk.request()
    desk.review(request.id, "bob")
    desk.review(request.id, "carol")
    desk.review(request.id, "eve", "refuse")
    with pytest.raises(SteelyardError, match="is refused already"):
        desk.issue(request.id)


def test_a_review_of_another_request(desk: Desk) -> None:
    one, other = desk.request(), desk.request(desk.sealed(email="b@example.org"))
    desk.review(one.id, "carol")
    path = desk.review(other.id, "bob")
    (desk.root / "grants" / "requests" / one.id / "review-2.dsse.json").write_bytes(path.read_bytes())
    with pytest.raises(SteelyardError, match="is about another request"):
        desk.issue(one.id)


def test_a_revoked_reviewer(desk: Desk) -> None:
    from steelyard.release.keys import revoke_key

    request = desk.request()
    for name in ("bob", "carol"):
        desk.review(request.id, name)
    revoke_key(desk.chain.keys, "carol", PASSPHRASE, reason="laptop stolen")
    desk.chain.people(witnesses=["fay.pub.pem"], grants=None)
    trust = json.loads(desk.trust_file.read_text())
    trust |= {"revocations": ["carol.revocation.dsse.json"]}
    trust |= {"grants": {"reviewers": ["bob.pub.pem", "carol.pub.pem"], "needed": 2}}
    desk.trust_file.write_text(json.dumps(trust))
    with pytest.raises(SteelyardError, match=r"revoked at .*laptop stolen"):
        desk.issue(request.id)


def test_a_request_that_was_exchanged(desk: Desk) -> None:
    """The files of two requests swapped: reviewers would sign for another person than they read of."""
    one, other = desk.request(), desk.request(desk.sealed(email="b@example.org"))
    folder = desk.root / "grants" / "requests"
    (folder / one.id / "request.sealed").write_bytes((folder / other.id / "request.sealed").read_bytes())
    with pytest.raises(FormatError, match="is not the request that the ledger noted"):
        desk.review(one.id, "bob")


# -- countersigned ---------------------------------------------------------------------------------------------------


def test_a_code_is_countersigned_once_and_before(desk: Desk) -> None:
    grant = desk.granted()
    with pytest.raises(SteelyardError, match="exists already"):
        desk.countersign(grant.id)
    desk.deliver(grant.id, desk.root / "copy")
    (desk.root / "grants" / "issued" / grant.id / "commitment.dsse.json").unlink()
    with pytest.raises(SteelyardError, match="a copy was made already"):
        desk.countersign(grant.id)


def test_stamped_by_an_authority(desk: Desk) -> None:
    from tsa import Authority, serving

    authority = Authority.new()
    authority.save(desk.chain.keys / "tsa.pem")
    desk.chain.people(timestamp_authorities=["tsa.pem"], grants=json.loads(desk.trust_file.read_text())["grants"])
    request = desk.request()
    for name in ("bob", "carol"):
        desk.review(request.id, name)
    grant = desk.issue(request.id)
    with serving(authority.answer) as url:
        path = desk.countersign(grant.id, signer=None, url=url)
    assert path.name == "commitment.tsr"
    desk.deliver(grant.id, desk.root / "copy", now=datetime.now(UTC) + timedelta(seconds=2))
    assert (desk.root / "copy" / "steelyard" / "commitment.tsr").read_bytes() == path.read_bytes()


# -- its end ---------------------------------------------------------------------------------------------------------


def test_revoked(desk: Desk) -> None:
    grant = desk.granted()
    with desk.book() as book:
        with pytest.raises(SteelyardError, match="none of the reviewers or releasers"):
            revoke(book, grant.id, "moved on", signer=desk.signer("alice"), trust=desk.trust)
        with pytest.raises(UsageError, match="needs a reason"):
            revoke(book, grant.id, " ", signer=desk.signer("bob"), trust=desk.trust)
        revoke(book, grant.id, "moved on", signer=desk.signer("bob"), trust=desk.trust)
        with pytest.raises(SteelyardError, match="was revoked"):
            revoke(book, grant.id, "moved on", signer=desk.signer("bob"), trust=desk.trust)
        assert "moved on" not in json.dumps([event.payload for event in book.events("revoked")])
    with pytest.raises(SteelyardError, match="was revoked"):
        desk.deliver(grant.id, desk.root / "copy")


def test_forgotten(desk: Desk) -> None:
    grant = desk.granted()
    with desk.book() as book:
        with pytest.raises(SteelyardError, match="is in force: revoke that first"):
            forget(book, grant.request)
        assert forget(book) == []
        revoke(book, grant.id, "moved on", signer=desk.signer("bob"), trust=desk.trust)
        assert forget(book) == []  # not yet: the retention runs from the grant's end
        request = book.request(grant.request, NOW)
        assert forget(book, now=request.due + timedelta(minutes=1)) == [grant.request]
        assert not book.request_folder(grant.request).exists()
        with pytest.raises(SteelyardError, match="was forgotten"):
            book.open(book.request(grant.request, NOW), desk.identity)
        assert forget(book, now=LATER) == []
        # What was granted can still be named, by its id.
        assert book.grant(grant.id, NOW).id == grant.id


def test_a_request_without_grant_is_forgotten_in_time(desk: Desk) -> None:
    request = desk.request()
    with desk.book() as book:
        assert forget(book, now=request.time + timedelta(days=29)) == []
        assert forget(book, now=request.time + timedelta(days=31)) == [request.id]
        assert forget(book, request.id) == [request.id]  # once more does no harm
        assert len(book.events("forgotten")) == 1


@pytest.mark.parametrize("retain", [timedelta(0), timedelta(days=4000)])
def test_a_retention_that_is_none(desk: Desk, retain: timedelta) -> None:
    with pytest.raises(UsageError, match="--retain"):
        desk.request(retain=retain)


@pytest.mark.parametrize(
    "name", ["g-x", "../../etc", "g-0123456789abcdef/..", "r-0123456789abcdef", "", "g-" + "0" * 17]
)
def test_ids_that_are_none(desk: Desk, name: str) -> None:
    with desk.book() as book:
        with pytest.raises(UsageError, match="write g- and 16 hexadecimal digits"):
            book.grant(name, NOW)
        with pytest.raises(UsageError, match="16 hexadecimal digits"):
            book.grant_folder(name)
    with pytest.raises(UsageError, match="16 hexadecimal digits"):
        desk.deliver(name, desk.root / "copy")


def test_keys_are_not_replaced(desk: Desk) -> None:
    from steelyard.release.grant_keys import new_grant_keys

    before = desk.mark
    with desk.chain.ledger() as ledger, pytest.raises(SteelyardError, match="never replaced"):
        new_grant_keys(desk.root / "grants" / "keys", PASSPHRASE, ledger)
    assert desk.mark == before


def test_another_mark_key(desk: Desk, tmp_path: Path) -> None:
    from steelyard.ledger.ledger import Ledger
    from steelyard.release.grant_keys import load_mark_key, new_grant_keys

    with Ledger(tmp_path / "other.sqlite") as ledger:
        new_grant_keys(tmp_path / "keys", PASSPHRASE, ledger)
    other = load_mark_key(tmp_path / "keys", PASSPHRASE)
    request = desk.request()
    for name in ("bob", "carol"):
        desk.review(request.id, name)
    with pytest.raises(SteelyardError, match="not the one that this workspace's ledger noted"):
        desk.issue(request.id, mark=other)
    with pytest.raises(SteelyardError, match="passphrase is wrong"):
        load_mark_key(tmp_path / "keys", b"another horse battery")


def test_a_witness_of_ones_own(desk: Desk) -> None:
    """The releaser's own key is none, pinned as one or not."""
    request = desk.request()
    for name in ("bob", "carol"):
        desk.review(request.id, name)
    grant = desk.issue(request.id)
    with pytest.raises(SteelyardError, match="none of yours"):
        desk.countersign(grant.id, "dora")
    assert "countersigned" not in desk.kinds()
    desk.countersign(grant.id, "dora", trust=desk.trusting("dora"))
    with pytest.raises(SteelyardError, match="none of yours"):
        desk.deliver(grant.id, desk.root / "copy")
    desk.chain.people(witnesses=["dora.pub.pem"], grants=json.loads(desk.trust_file.read_text())["grants"])
    with pytest.raises(SteelyardError, match="a witness is another person"):
        desk.deliver(grant.id, desk.root / "copy")

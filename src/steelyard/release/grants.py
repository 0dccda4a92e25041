"""Access case by case: enter a request, have it reviewed by two people, issue a grant, have its code countersigned,
end it, forget who asked.

    request = enter(book, sealed, licence=..., private=..., retain=timedelta(days=730))
    review(book, request, sealed, "approve", days=365, signer=..., card=..., trust=...)      # twice, by two people
    grant = issue(book, request, sealed, mark, trust)
    countersign(book, grant.id, signer=...)                                                   # or an authority's stamp

Every act takes the workspace's lock, writes its file first and then its event; `grant_deliver` makes the copies. A
release that ever went out unmarked cannot be granted (`grant_book.refuse_released`).
"""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

from steelyard import __version__
from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.files import read_bounded, write_atomic
from steelyard.release.attest import ENVELOPE_LIMIT, SignatureError, sign, verify_envelope
from steelyard.release.checks_statements import check_key
from steelyard.release.evidence import CLOCKS_APART
from steelyard.release.grant_book import (
    COMMITMENT,
    COUNTERSIGNATURE,
    REVOCATION,
    SEALED,
    TIMESTAMP,
    Book,
    Grant,
    Request,
    refuse_released,
)
from steelyard.release.grant_checks import COUNTERSIGNED, check_countersigned, check_reviews, raise_for, review_subjects
from steelyard.release.grant_keys import MarkKey
from steelyard.release.grant_request import Sealed, signer_of
from steelyard.release.grant_sealed import seal
from steelyard.release.grant_statements import (
    COMMITMENT_LIMIT,
    Commitment,
    Countersignature,
    Review,
    Revocation,
    parse,
    parse_commitment,
    payload,
)
from steelyard.release.keys import KeyInfo
from steelyard.release.layout import MAX_REVIEWS
from steelyard.release.statements import stamp
from steelyard.release.timestamps import TIMESTAMP_LIMIT, ask
from steelyard.release.trust import Trust
from steelyard.trace import tardos

MAX_RETAIN = timedelta(days=3650)


def enter(
    book: Book,
    sealed: Sealed,
    *,
    licence: str,
    private: X25519PrivateKey,
    retain: timedelta,
    now: datetime | None = None,
) -> Request:
    """Take up a request. `licence`: SHA-256 of the release's licence; `private`: what opens the earlier requests, for
    nobody may have two at a time for the same weights. Raises SteelyardError for such a one, for another licence than
    the release's, and for a release that cannot be granted."""
    if not timedelta(days=1) <= retain <= MAX_RETAIN:
        raise UsageError(f"--retain: from 1 to {MAX_RETAIN.days} days")
    if sealed.person is not None and sealed.person.licence != licence:
        text = f"accepts the licence {sealed.person.licence}, but the release's is {licence}: let them read that one"
        raise SteelyardError(f"the request {text}")
    with book.locked(now) as now:
        refuse_released(book.ledger, sealed.wanted)
        for other in book.requests(now):
            current = other.state in ("requested", "granted") and other.wanted.weights == sealed.wanted.weights
            if current and book.open(other, private, now).same_person(sealed):
                raise SteelyardError(f"this request is there already, as {other.id} ({other.state})")
        request = f"r-{sealed.digest[:16]}"
        data = seal(sealed.to_bytes(), private.public_key())
        folder = book.request_folder(request)
        folder.mkdir(parents=True, mode=0o700)
        try:
            write_atomic(folder / SEALED, data, mode=0o600)
            book.note(
                "requested",
                request=request,
                digest=sealed.digest,
                licence=licence,
                public=sealed.person is None,
                retain_days=retain.days,
                **sealed.wanted.model_dump(),
            )
        except BaseException:
            book.erase(request)
            raise
        return book.request(request, now)


def review(
    book: Book,
    request: Request,
    sealed: Sealed,
    decision: Literal["approve", "refuse"],
    *,
    days: int,
    signer: CryptoSigner,
    card: KeyInfo,
    trust: Trust,
    now: datetime | None = None,
) -> Path:
    """Add a reviewer's signed word on what he has read (`sealed`); gives its file. Raises SteelyardError for a key
    that the trust file does not have among the reviewers, a second review by the same key, one's own request."""
    about = review_subjects(sealed.digest, sealed.wanted.weights, sealed.wanted.subject, request.licence)
    with book.locked(now) as now:
        word = Review(
            request=request.id,
            decision=decision,
            days=days,
            signed=stamp(now),
            key_kind=card.kind,
            version=__version__,
        )
        if (state := book.request(request.id, now).state) != "requested":
            raise SteelyardError(f"request {request.id}: is {state}: there is nothing more to review")
        there = read_reviews(book.request_folder(request.id))
        if signer.public_key.keyid not in {key.keyid for key in trust.grants.keys}:
            if not trust.grants.keys:
                raise SteelyardError("your trust file names no reviewers: add grants: {reviewers: [...]} to it")
            raise SteelyardError(f"key {signer.public_key.keyid[:16]}: is none of the reviewers of your trust file")
        kind = "approved" if decision == "approve" else "refused"
        if (half := _half_done(book, request.id, there, about, decision, signer)) is not None:
            book.note(kind, request=request.id, review=sha256_hex(there[half]), key=signer.public_key.keyid)
            return book.request_folder(request.id) / half
        if len(there) == MAX_REVIEWS:
            raise SteelyardError(f"request {request.id}: has {MAX_REVIEWS} reviews already")
        path = book.request_folder(request.id) / f"review-{len(there) + 1}.dsse.json"
        envelope = sign(payload(about, word), signer)
        _, findings = check_reviews({**there, path.name: envelope}, about, trust, now, _asker(sealed))
        # Too few so far is no fault of this one; a refusal may be added, a review that does not count may not.
        mine = [f for f in findings if f.message.startswith(f"{path.name}: ") and f.code != "refused"]
        raise_for(mine, f"request {request.id}")
        write_atomic(path, envelope)
        book.note(kind, request=request.id, review=sha256_hex(envelope), key=signer.public_key.keyid)
    return path


def issue(
    book: Book, request: Request, sealed: Sealed, mark: MarkKey, trust: Trust, *, now: datetime | None = None
) -> Grant:
    """Make a grant of a request that was reviewed: its id, and the commitment to its code. It ends after the fewest
    days that a reviewer gave. Raises SteelyardError where the reviews are not enough, one of them refuses, or the
    release went out unmarked meanwhile."""
    with book.locked(now) as now:
        current = book.request(request.id, now)
        if current.state != "requested":
            raise SteelyardError(f"request {request.id}: is {current.state} already: a grant is issued once")
        refuse_released(book.ledger, sealed.wanted)
        _check_mark(book, mark)
        reviews = read_reviews(book.request_folder(request.id))
        wanted = sealed.wanted
        about = review_subjects(sealed.digest, wanted.weights, wanted.subject, request.licence)
        approvals, findings = check_reviews(reviews, about, trust, now, _asker(sealed))
        raise_for(findings, f"request {request.id}")
        grant = f"g-{secrets.token_hex(8)}"
        commitment = Commitment(
            grant=grant,
            request=sealed.digest,
            **wanted.model_dump(),
            licence=request.licence,
            code=tardos.commitment(mark.secret, grant),
            mark=mark.fingerprint,
            reviews=tuple(sha256_hex(data) for data in reviews.values()),
            public=request.public,
            retain_days=request.retain.days,
            issued=stamp(now),
            expires=stamp(now + timedelta(days=min(review.days for review in approvals))),
        )
        folder = book.grant_folder(grant)
        for name, data in {**reviews, COMMITMENT: commitment.to_bytes()}.items():
            write_atomic(folder / name, data)
        book.note(
            "issued",
            lambda: refuse_released(book.ledger, wanted),  # publishing does not wait for this lock
            **commitment.model_dump(mode="json", exclude={"format", "request", "reviews", "retain_days"}),
            request=request.id,
            commitment=sha256_hex(commitment.to_bytes()),
        )
        return book.grant(grant, now)


def countersign(
    book: Book,
    grant: str,
    *,
    trust: Trust,
    signer: CryptoSigner | None = None,
    url: str = "",
    now: datetime | None = None,
) -> Path:
    """Have the commitment of a grant's code signed by a witness, or stamped by the authority at `url`; gives the file.

    Raises SteelyardError for a witness or an authority that `trust` does not pin, and where a copy was delivered
    already: a code that was fixed afterwards could frame anybody.
    """
    with book.locked(now) as now:
        found = book.live(grant, now)
        if book.events("delivering", grant=grant) or book.events("marked", grant=grant):
            raise SteelyardError(f"grant {grant}: a copy was made already: its code can be countersigned no more")
        data, commitment = read_commitment(book, found)
        path = book.grant_folder(grant) / (COUNTERSIGNATURE if signer is not None else TIMESTAMP)
        if path.exists():
            made = read_bounded(path, max(ENVELOPE_LIMIT, TIMESTAMP_LIMIT))
            if book.events("countersigned", grant=grant, countersignature=sha256_hex(made)):
                raise SteelyardError(
                    f"{path} exists already: once is enough; remove it if its witness is none of yours"
                )
            # Killed between its file and its event: the same witness completes it.
            if signer is not None:
                verify_envelope(made, str(path), [signer.public_key])
        elif signer is not None:
            word = Countersignature(grant=grant, signed=stamp(now))
            made = sign(payload({COUNTERSIGNED: found.commitment}, word), signer)
        else:
            made = ask(url, data, trust.timestamp_authorities)
        statement, time_stamp = (made, None) if signer is not None else (None, made)
        findings = check_countersigned(
            data,
            commitment,
            statement,
            time_stamp,
            trust,
            before=now + CLOCKS_APART,  # an authority has a clock of its own
            releasers=[key.keyid for key in trust.releasers],
            where=dict.fromkeys(("commitment", "statement", "stamp"), path.name),
        )
        raise_for(list(findings), f"grant {grant}")
        write_atomic(path, made)
        book.note("countersigned", grant=grant, commitment=found.commitment, countersignature=sha256_hex(made))
    return path


def revoke(
    book: Book, grant: str, reason: str, *, signer: CryptoSigner, trust: Trust, now: datetime | None = None
) -> Path:
    """End a grant before its time, by one reviewer or releaser; gives the signed statement, for all who hold copies
    to be checked. The ledger gets its digest, not the reason."""
    if not reason.strip() or len(reason) > 1000:
        raise UsageError("a revocation needs a reason of 1 to 1000 characters (--reason)")
    with book.locked(now) as now:
        found = book.live(grant, now)
        word = Revocation(grant=grant, reason=reason.strip(), signed=stamp(now))
        envelope = sign(payload({COUNTERSIGNED: found.commitment}, word), signer)
        try:
            _, key = verify_envelope(envelope, "revocation", [*trust.grants.keys, *trust.releasers])
        except SignatureError as error:
            raise SteelyardError("the key is none of the reviewers or releasers of your trust file") from error
        raise_for(list(check_key("revocation", key.keyid, now, trust)), f"grant {grant}")
        path = book.grant_folder(grant) / REVOCATION
        write_atomic(path, envelope)
        book.note("revoked", grant=grant, revocation=sha256_hex(envelope))
    return path


def forget(book: Book, request: str | None = None, *, now: datetime | None = None) -> list[str]:
    """Erase who asked: of one request, or (None) of all whose time of retention is over; gives their ids.

    Reviews, grants and evidence stay, which name ids only. Raises SteelyardError where its grant has not ended.
    """
    with book.locked(now) as now:
        if request is None:
            return book.erased
        found = book.request(request, now)
        if found.state == "granted":
            raise SteelyardError(f"request {request}: its grant {found.grant} is in force: revoke that first")
        book.erase(request)
        if found.state != "forgotten":
            book.note("forgotten", request=request)
    return [request]


def _half_done(
    book: Book, request: str, there: dict[str, bytes], about: dict[str, str], decision: str, signer: CryptoSigner
) -> str | None:
    """The file of this reviewer's very word, where it was written and a kill came before its event."""
    noted = {
        event.payload["review"] for kind in ("approved", "refused") for event in book.events(kind, request=request)
    }
    for name, data in there.items():
        if sha256_hex(data) in noted:
            continue
        try:
            found, _, word = parse(verify_envelope(data, name, [signer.public_key])[0], name, Review)
        except SteelyardError:  # another's
            continue
        if found == about and word.decision == decision:
            return name
    return None


def read_commitment(book: Book, grant: Grant) -> tuple[bytes, Commitment]:
    """A grant's commitment, as it was issued. Raises SteelyardError where it was changed or is lost."""
    path = book.grant_folder(grant.id) / COMMITMENT
    try:
        data = read_bounded(path, COMMITMENT_LIMIT)
    except OSError as error:
        raise SteelyardError(f"{path}: {error.strerror}: restore it from a copy") from error
    if sha256_hex(data) != grant.commitment:
        raise SteelyardError(f"{path}: is not what the ledger noted: restore it from a copy")
    return data, parse_commitment(data, str(path))


def read_witness(book: Book, grant: str) -> tuple[bytes | None, bytes | None]:
    """The countersignature and the time-stamp of a grant, as far as they are there."""
    folder = book.grant_folder(grant)
    return _read(folder / COUNTERSIGNATURE, ENVELOPE_LIMIT), _read(folder / TIMESTAMP, TIMESTAMP_LIMIT)


def _read(path: Path, limit: int) -> bytes | None:
    try:
        return read_bounded(path, limit)
    except FileNotFoundError:
        return None


def read_reviews(folder: Path) -> dict[str, bytes]:
    """The reviews in a request's or a grant's folder, file to bytes."""
    files = [folder / f"review-{number}.dsse.json" for number in range(1, MAX_REVIEWS + 1)]
    return {path.name: read_bounded(path, ENVELOPE_LIMIT) for path in files if path.exists()}


def _asker(sealed: Sealed) -> str | None:
    """The key id of who asked, where he named a key."""
    key = signer_of(sealed)
    return None if key is None else str(key.keyid)


def _check_mark(book: Book, mark: MarkKey) -> None:
    if not book.events("keys", mark=mark.fingerprint):
        raise SteelyardError("the mark key is not the one that this workspace's ledger noted: restore it from a copy")

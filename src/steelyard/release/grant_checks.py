"""What granting and verifying both check: are the reviews enough, is the code's commitment older than the copy?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from securesystemslib.signer import Key  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import SteelyardError
from steelyard.release.attest import read_envelope, verify_envelope
from steelyard.release.checks_statements import check_key
from steelyard.release.evidence import CLOCKS_APART
from steelyard.release.grant_statements import Commitment, Countersignature, Review, parse
from steelyard.release.timestamps import check_timestamp
from steelyard.release.trust import Trust
from steelyard.safety.journal import Finding

COUNTERSIGNED = "commitment"  # the name of the subject that a countersignature is about


def review_subjects(request: str, weights: str, subject: str, licence: str) -> dict[str, str]:
    """What a review is about, name to SHA-256."""
    return {"request": request, "weights": weights, "subject": subject, "licence": licence}


def check_reviews(
    envelopes: Mapping[str, bytes],
    subjects: Mapping[str, str],
    trust: Trust,
    now: datetime,
    recipient: str | None = None,
) -> tuple[list[Review], list[Finding]]:
    """The approvals among `envelopes` (file to bytes), and every reason why they are not enough: `trust.grants` says
    whose count and how many are needed. One refusal stops a request. `recipient`: the key id of who asked: nobody
    reviews his own request."""
    findings: list[Finding] = []
    approvals: list[Review] = []
    signed: dict[str, str] = {}
    for file, data in envelopes.items():
        try:
            payload, key = verify_envelope(data, file, trust.grants.keys)
            about, time, review = parse(payload, file, Review)
        except SteelyardError as error:
            findings.append(Finding("review", str(error)))
            continue
        bad = list(check_key(file, key.keyid, time, trust))
        if key.keyid in signed:
            text = f"signed by the key of {signed[key.keyid]} again: one person reviews once"
            bad.append(Finding("review", f"{file}: {text}"))
        if key.keyid == recipient:
            bad.append(Finding("review", f"{file}: signed by who asked for access: nobody reviews his own request"))
        if about != dict(subjects):
            bad.append(Finding("review", f"{file}: is about another request, release or licence"))
        if time > now + CLOCKS_APART:
            bad.append(Finding("review", f"{file}: its time, {time}, is later than now: a clock is wrong"))
        if review.decision == "refuse":
            bad.append(Finding("refused", f"{file}: refuses the request"))
        signed.setdefault(key.keyid, file)
        findings += bad
        approvals += [] if bad else [review]
    needed = trust.grants.needed
    if not needed:
        findings.append(Finding("review", "your trust file names no reviewers (grants: {reviewers: ..., needed: 2})"))
    elif len(approvals) < needed:
        findings.append(Finding("review", f"your trust file wants {needed} approvals, here are {len(approvals)}"))
    return approvals, findings


def check_countersigned(
    data: bytes,
    commitment: Commitment,
    statement: bytes | None,
    stamp: bytes | None,
    trust: Trust,
    *,
    before: datetime,
    releasers: Sequence[str] = (),
    where: Mapping[str, str],
) -> Iterator[Finding]:
    """Did a witness or an authority whom `trust` pins see the commitment (`data`) before `before`? Whatever is there
    must hold. `releasers`: ids of keys that cannot be witnesses of their own; `where`: names of the files."""
    times = []
    if statement is not None:
        try:
            times.append(_witnessed(statement, data, commitment, trust.witnesses, where["statement"]))
            keyid = next(iter(read_envelope(statement, where["statement"])[1]))
            yield from check_key(where["statement"], keyid, times[-1], trust)
            if keyid in releasers:
                text = "signed by the releaser's own key: a witness is another person"
                yield Finding("countersignature", f"{where['statement']}: {text}")
        except SteelyardError as error:
            yield Finding("countersignature", str(error))
            return
    if stamp is not None:
        try:
            times.append(check_timestamp(stamp, data, trust.timestamp_authorities, where["stamp"]))
        except SteelyardError as error:
            yield Finding("countersignature", str(error))
            return
    if not times:
        text = "nobody saw the code before the copy was made: countersign it first (steelyard grant countersign)"
        yield Finding("countersignature", f"{where['commitment']}: {text}")
        return
    issued = datetime.fromisoformat(commitment.issued)
    for time in times:
        if time.replace(microsecond=0) > before:  # statements have whole seconds
            text = f"countersigned at {time}, later than the copy ({before}): a code made up afterwards proves nothing"
            yield Finding("countersignature", f"{where['commitment']}: {text}")
        if time < issued - CLOCKS_APART:
            text = f"countersigned at {time}, before it was made ({issued}): a clock is wrong"
            yield Finding("countersignature", f"{where['commitment']}: {text}")


def _witnessed(statement: bytes, data: bytes, commitment: Commitment, witnesses: Sequence[Key], where: str) -> datetime:
    payload, _ = verify_envelope(statement, where, witnesses)
    subjects, time, body = parse(payload, where, Countersignature)
    if subjects != {COUNTERSIGNED: sha256_hex(data)} or body.grant != commitment.grant:
        raise SteelyardError(f"{where}: countersigns another commitment than this one")
    return time


def raise_for(findings: Sequence[Finding], what: str) -> None:
    """Raises SteelyardError with every reason, where there is one."""
    if findings:
        raise SteelyardError(f"{what}: {'; '.join(finding.message for finding in findings)}")

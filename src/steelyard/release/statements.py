"""What the statements say: the test-result's subjects and configuration, and the two statements that rest on it, an
approver's approval and the releaser's summary.

Both are in-toto statements about the same three subjects (`weights`, `oms`, `steelyard/manifest.json`), and both name
the SHA-256 of the test-result's envelope, so that neither can be moved to another test. The summary is a Simple
Verification Result v0.2: who verified (`verifier`), under which policy, when, and what holds (`properties`). What SVR
has no field for stands under `steelyard`.

Sources: github.com/in-toto/attestation, spec/predicates/svr.md (v0.2) and spec/v1/field_types.md. in-toto has no
predicate for an approval; ours is `steelyard:approval/v1`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from steelyard.base.errors import FormatError
from steelyard.model.identity import Subject
from steelyard.release.attest import (
    KeyKind,
    PredecessorFacts,
    ReleaseName,
    ResourceDescriptor,
    Sha256,
    Strict,
    by_name,
    descriptors,
    first_of,
    parse_statement,
    parse_time,
    statement_bytes,
)
from steelyard.release.evidence import Evidence
from steelyard.release.layout import MANIFEST, MAX_APPROVALS, REPORT
from steelyard.safety.criteria import CriterionResult
from steelyard.safety.policy import Policy

SVR = "https://in-toto.io/attestation/svr/v0.2"
APPROVAL = "steelyard:approval/v1"
VERIFIER = "steelyard:verify/v2"  # names what `verify` checks: a new one where that changes
TEXT = 100  # characters of a time or a version

Property = Annotated[str, StringConstraints(pattern=r"^STEELYARD_[A-Z0-9_]{1,100}$")]
Short = Annotated[str, StringConstraints(max_length=TEXT)]


class Approval(Strict):
    """An approver's word: this release may go out. `test_result`: SHA-256 of the envelope it rests on."""

    name: ReleaseName
    test_result: Sha256
    policy: Sha256
    signed: Short
    key_kind: KeyKind
    version: Short


class _Verifier(Strict):
    id: Literal["steelyard:verify/v2"]
    policies: tuple[ResourceDescriptor, ...] = Field(min_length=1, max_length=1)


class SummaryFacts(Strict):
    """What SVR has no field for. `test_result` and `approvals`: SHA-256 of the envelopes it rests on."""

    name: ReleaseName
    test_result: Sha256
    approvals: tuple[Sha256, ...] = Field(max_length=MAX_APPROVALS)
    key_kind: KeyKind
    version: Short


class _Svr(Strict):
    verifier: _Verifier
    timeCreated: Short  # noqa: N815 (the format's spelling)
    properties: tuple[Property, ...] = Field(max_length=100)
    steelyard: SummaryFacts


class Summary(Strict):
    """A summary as read: `policy` is the name and digest of the one it was verified under."""

    policy: tuple[str, str]
    signed: str
    properties: tuple[str, ...]
    facts: SummaryFacts


def release_subjects(weights: str, oms: str, manifest: str) -> dict[str, str]:
    """The subjects that every statement about a release has, name to SHA-256."""
    return {"weights": weights, "oms": oms, MANIFEST: manifest}


def stamp(time: datetime) -> str:
    """UTC, to the second, as in-toto spells a time (RFC 3339 with Z)."""
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def approval_payload(subjects: Mapping[str, str], approval: Approval) -> bytes:
    """The payload of an approval."""
    return statement_bytes(APPROVAL, subjects, approval.model_dump(mode="json"))


def summary_payload(subjects: Mapping[str, str], summary: Summary) -> bytes:
    """The payload of a summary."""
    predicate = {
        "verifier": {"id": VERIFIER, "policies": descriptors(dict([summary.policy]))},
        "timeCreated": summary.signed,
        "properties": sorted(summary.properties),
        "steelyard": summary.facts.model_dump(mode="json"),
    }
    return statement_bytes(SVR, subjects, predicate)


def parse_approval(payload: bytes, where: str) -> tuple[dict[str, str], datetime, Approval]:
    """Subjects, time and content of an approval. Raises FormatError."""
    subjects, predicate = _of_type(payload, where, APPROVAL)
    try:
        approval = Approval.model_validate(predicate)
    except ValidationError as error:
        raise FormatError(f"{where}: {first_of(error, 'predicate')}") from error
    return subjects, parse_time(approval.signed, f"{where}: signed"), approval


def parse_summary(payload: bytes, where: str) -> tuple[dict[str, str], datetime, Summary]:
    """Subjects, time and content of a summary. Raises FormatError."""
    subjects, predicate = _of_type(payload, where, SVR)
    try:
        svr = _Svr.model_validate(predicate)
    except ValidationError as error:
        raise FormatError(f"{where}: {first_of(error, 'predicate')}") from error
    ((policy, sha256),) = by_name(svr.verifier.policies, where, "policies").items()
    summary = Summary(policy=(policy, sha256), signed=svr.timeCreated, properties=svr.properties, facts=svr.steelyard)
    return subjects, parse_time(svr.timeCreated, f"{where}: timeCreated"), summary


def _of_type(payload: bytes, where: str, wanted: str) -> tuple[dict[str, str], dict[str, Any]]:
    kind, subjects, predicate = parse_statement(payload, where)
    if kind != wanted:
        raise FormatError(f"{where}: predicateType is {kind[:100]!r}, not {wanted!r}")
    return subjects, predicate


def summary_properties(criteria: Sequence[CriterionResult], *, approvals: int, countersigned: bool) -> list[str]:
    """What holds of a release, in SVR's manner: one property for each family of metrics whose criteria all passed
    (`toxicity.chat` and `toxicity.degeneration` make STEELYARD_TOXICITY_PASSED), one for the test as a whole.
    """
    families: dict[str, bool] = {}
    for criterion in criteria:
        family = criterion.metric.split(".")[0]
        families[family] = families.get(family, True) and criterion.status == "PASS"
    found = {f"STEELYARD_{_upper(family)}_PASSED" for family, passed in families.items() if passed}
    if families and all(families.values()):
        found.add("STEELYARD_TEST_PASSED")
    if any(criterion.against == "predecessor" for criterion in criteria):
        found.add("STEELYARD_PREDECESSOR_COMPARED")
    if approvals:
        found.add(f"STEELYARD_APPROVALS_{approvals}")
    if countersigned:
        found.add("STEELYARD_COUNTERSIGNED")
    return sorted(found)


def _upper(text: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in text).upper()[:80]


def tested_subjects(common: Mapping[str, str], subject: Subject, evidence: Evidence, report: str) -> dict[str, str]:
    """The subjects of the test-result, name to SHA-256: the common ones, and what the test was of."""
    before = evidence.predecessor
    return {
        **common,
        "subject": subject.digest,
        "journal-root": evidence.journal.root,
        **({} if before is None else {"predecessor-root": before.root, "predecessor": before.plan.subject_digest}),
        REPORT: report,
    }


def statement_configuration(evidence: Evidence, policy: Policy) -> dict[str, str]:
    """What the test was run with, name to SHA-256."""
    plan = evidence.journal.plan
    return {
        "battery": evidence.battery.digest,
        "policy": policy.digest,
        "code": plan.code,
        **{f"scorer/{name}": identity.digest for name, identity in plan.scorers.items()},
    }


def predecessor_facts(evidence: Evidence) -> PredecessorFacts | None:
    """What the test-result says of the predecessor."""
    before = evidence.predecessor
    if before is None:
        return None
    return PredecessorFacts(subject=before.plan.subject_digest, journal_root=before.root)

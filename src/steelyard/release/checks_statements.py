"""A bundle's signed statements: by whom, when, over what; and whether they hang together.

Each file that signs is read with bounds, its signature checked against the keys that the verifier trusts in that role,
and its key against what he knows of revocations. Then: are they about these files, do approvals and summary rest on
this test-result, are they in the order of time, and are the people as many and as different as policy and verifier ask?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Generic, TypeVar

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import read_bounded
from steelyard.release.attest import (
    ENVELOPE_LIMIT,
    KeyKind,
    PredecessorFacts,
    Statement,
    parse_test_result,
    parse_time,
    read_envelope,
)
from steelyard.release.checks_files import relative
from steelyard.release.evidence import CLOCKS_APART, Evidence
from steelyard.release.layout import APPROVALS, COUNTERSIGNATURE, JOURNAL, MODEL_SIGNATURE, SUMMARY, TEST_RESULT
from steelyard.release.signers import trusted_signer
from steelyard.release.statements import Approval, Summary, parse_approval, parse_summary, summary_properties
from steelyard.release.trust import Role, Trust
from steelyard.safety.criteria import CriterionResult
from steelyard.safety.journal import Finding
from steelyard.safety.policy import Policy

T = TypeVar("T")
_AGAIN = "ask for it signed anew, by a key that stands"
_APPROVE = "more approvers run steelyard approve CANDIDATE --key NAME --trust FILE, and then it is sealed (anew)"
Parse = Callable[[bytes, str], tuple[dict[str, str], datetime, T]]


@dataclass(frozen=True)
class Signed(Generic[T]):
    """A statement as read. `envelope`: SHA-256 of its file; `keyid`: the key that it says signed it, and `who` holds it
    (the key id, or the identity in a certificate), which is true where there is no finding; `time`: when it says it was
    signed."""

    file: str
    envelope: str
    keyid: str
    who: str
    subjects: Mapping[str, str]
    time: datetime
    body: T


@dataclass(frozen=True)
class Statements:
    """All of a bundle's. None or absent: not there, or not readable, for which there is a finding."""

    test: Signed[Statement] | None
    approvals: tuple[Signed[Approval], ...]
    summary: Signed[Summary] | None


def read_statements(folder: Path, present: Mapping[str, int], trust: Trust) -> tuple[Statements, list[Finding]]:
    """The statements that lie in the folder, each with its signature checked."""
    findings: list[Finding] = []
    test = _read(folder, present, TEST_RESULT, "evaluators", trust, _test_result, findings)
    approvals = [_read(folder, present, name, "approvers", trust, parse_approval, findings) for name in APPROVALS]
    summary = _read(folder, present, SUMMARY, "releasers", trust, parse_summary, findings)
    return Statements(test, tuple(one for one in approvals if one is not None), summary), findings


def _test_result(payload: bytes, where: str) -> tuple[dict[str, str], datetime, Statement]:
    statement = parse_test_result(payload, where)
    return statement.subjects, parse_time(statement.predicate.steelyard.signed, f"{where}: signed"), statement


def _read(
    folder: Path,
    present: Mapping[str, int],
    name: str,
    role: Role,
    trust: Trust,
    parse: Parse[T],
    findings: list[Finding],
) -> Signed[T] | None:
    if name not in present:
        return None  # what must be there is asked for with the files
    try:
        data = read_bounded(folder / name, ENVELOPE_LIMIT)
        payload, signatures = read_envelope(data, name)
        subjects, time, body = parse(payload, name)
    except OSError as error:
        findings.append(Finding("missing", f"{name}: {error.strerror}"))
        return None
    except FormatError as error:
        findings.append(Finding("statement", relative(error, folder)))
        return None
    keyid = next(iter(signatures))
    try:
        who = trusted_signer(data, name, role, trust, time)
    except SteelyardError as error:
        findings.append(Finding("signature", str(error)))
        who = keyid
    return Signed(name, sha256_hex(data), keyid, who, subjects, time, body)


# -- whose keys ------------------------------------------------------------------------------------------------------


def check_keys(statements: Statements, policy: Policy, trust: Trust) -> Iterator[Finding]:
    """No revoked, rotated or expired key, and no throwaway where the policy refuses them."""
    every: list[Signed[Statement] | Signed[Approval] | Signed[Summary]] = list(statements.approvals)
    every += [one for one in (statements.test, statements.summary) if one is not None]
    for one in every:
        yield from check_key(one.file, one.keyid, one.time, trust)
        yield from check_key_kind(policy, _key_kind(one.body), one.file)


def _key_kind(body: Statement | Approval | Summary) -> KeyKind:
    if isinstance(body, Approval):
        return body.key_kind
    return body.predicate.steelyard.key_kind if isinstance(body, Statement) else body.facts.key_kind


def check_key(file: str, keyid: str, time: datetime, trust: Trust) -> Iterator[Finding]:
    """What the verifier knows of a key that signed something at `time`. A revoked one is refused whatever time the
    statement claims, for a thief may claim any."""
    for event in trust.events:
        if event.keyid != keyid:
            continue
        when = event.time.isoformat(timespec="seconds")
        if event.kind == "revocation":
            text = f"signed by key {keyid}, revoked at {when}: {' '.join(event.reason.split())}"
            yield Finding("revoked", f"{file}: {text}: {_AGAIN}")
        elif time > event.time:
            yield Finding("rotated", f"{file}: signed by key {keyid} after its rotation at {when}: {_AGAIN}")
    end = trust.until.get(keyid)
    if end is not None and time > end:
        text = f"signed by key {keyid} at {time.isoformat(timespec='seconds')}, trusted until"
        yield Finding(
            "expired",
            f"{file}: {text} {end.isoformat(timespec='seconds')}: {_AGAIN}, or change until in your trust file",
        )


def check_key_kind(policy: Policy, kind: str, file: str | None = None) -> Iterator[Finding]:
    """Throwaway keys, where the policy refuses them."""
    if kind == "throwaway" and policy.keys.throwaway == "refused":
        where = f"{file}: " if file is not None else ""
        yield Finding("key", f"{where}{policy.name} refuses throwaway keys: make a standing one (steelyard key new)")


def check_people(
    statements: Statements, policy: Policy, trust: Trust, *, counted: bool, witness: str | None = None
) -> Iterator[Finding]:
    """As many approvers as policy and verifier ask for (once it is time to count), each another one; and different
    people in every role, where the policy wants that: neither the same key nor the same name in a certificate."""
    signers: dict[str, str] = {}
    approvers = 0
    for approval in statements.approvals:
        before = signers.get(approval.who) or signers.get(approval.keyid)
        if before is not None:
            text = f"signed by the key of {before} again: one person approves once"
            yield Finding("approvals", f"{approval.file}: {text}")
        else:
            approvers += 1
        signers |= {approval.who: approval.file, approval.keyid: approval.file}
    wanted = max(policy.keys.approvals, trust.approvals)
    if counted and approvers < wanted:
        who = policy.name if wanted == policy.keys.approvals else "your trust file"
        yield Finding("approvals", f"{who} wants {wanted} approvals, here are {approvers}: {_APPROVE}")
    if not policy.keys.distinct:
        return
    yield from _check_pinned(policy, trust)
    others = [(one.file, {one.who, one.keyid}) for one in (statements.test, statements.summary) if one is not None]
    others += [(COUNTERSIGNATURE, {witness})] if witness is not None else []
    for file, names in others:
        taken = sorted(names & signers.keys())
        if taken:
            text = f"signed by the key of {signers[taken[0]]}: {policy.name} wants another person in each role"
            yield Finding("roles", f"{file}: {text}")
        signers |= dict.fromkeys(names - signers.keys(), file)


def _check_pinned(policy: Policy, trust: Trust) -> Iterator[Finding]:
    shared = list(trust.shared())
    if shared and trust.evaluators == trust.approvers == trust.releasers:
        text = "evaluators, approvers and releasers to be different people"
        yield Finding("trust", f"{policy.name} wants {text}: name who is which in a trust file (--trust)")
    else:
        yield from shared


# -- about what, resting on what, when -------------------------------------------------------------------------------


def check_binding(
    statements: Statements,
    policy: Policy,
    *,
    common: Mapping[str, str],
    tested: Mapping[str, str],
    configuration: Mapping[str, str],
) -> Iterator[Finding]:
    """Are they about this bundle (`common` to all, `tested` the test-result's), this policy, this test-result, and are
    these all the approvals that the summary was made on?"""
    test, summary = statements.test, statements.summary
    if test is not None:
        yield from _differ(test.file, "subject", test.subjects, tested)
        yield from _differ(test.file, "configuration", test.body.configuration, configuration)
    for approval in statements.approvals:
        body = approval.body
        yield from _differ(approval.file, "subject", approval.subjects, common)
        yield from _check_rests(approval.file, body.test_result, body.policy, body.name, test, policy)
    if summary is not None:
        facts, (name, digest) = summary.body.facts, summary.body.policy
        yield from _differ(summary.file, "subject", summary.subjects, common)
        yield from _check_rests(summary.file, facts.test_result, digest, facts.name, test, policy)
        if name != policy.name:
            yield Finding("statement", f"{summary.file}: names the policy {name[:80]!r}, not {policy.name!r}")
        if sorted(facts.approvals) != sorted(approval.envelope for approval in statements.approvals):
            yield Finding("statement", f"{summary.file}: was not made on the approvals that are in the bundle")


def _differ(file: str, what: str, says: Mapping[str, str], has: Mapping[str, str]) -> Iterator[Finding]:
    for name in sorted(says.keys() | has.keys()):
        if says.get(name) != has.get(name):
            yield Finding("statement", f"{file}: its {what} {name} is not that of the bundle")


def _check_rests(
    file: str, test_result: str, digest: str, name: str, test: Signed[Statement] | None, policy: Policy
) -> Iterator[Finding]:
    if test is not None and test_result != test.envelope:
        yield Finding("statement", f"{file}: rests on another test-result than the one in the bundle")
    if test is not None and name != test.body.predicate.steelyard.name:
        tested = test.body.predicate.steelyard.name
        yield Finding("statement", f"{file}: is about a release called {name!r}, the test-result calls it {tested!r}")
    if digest != policy.digest:
        yield Finding("statement", f"{file}: was given under another policy than {policy.name} {policy.digest[:16]}")


def check_test_result(
    test: Signed[Statement],
    evidence: Evidence,
    criteria: Sequence[CriterionResult],
    predecessor: PredecessorFacts | None,
) -> Iterator[Finding]:
    """Does the test-result say what the journal says?"""
    result, facts, plan = test.body.predicate, test.body.predicate.steelyard, evidence.journal.plan
    if result.result != "PASSED" or result.failedTests or result.warnedTests:
        yield Finding("statement", f"{test.file}: says {result.result}, not PASSED")
    required = {criterion.name for criterion in criteria}
    missing, strange = sorted(required - set(result.passedTests)), sorted(set(result.passedTests) - required)
    if missing:
        yield Finding("statement", f"{test.file}: does not say that {', '.join(missing)} passed")
    if strange:
        text = f"says that {strange[0][:80]!r} passed, which is no criterion of the policy"
        yield Finding("statement", f"{test.file}: {text}")
    for what, said, is_ in (
        ("run", facts.run, plan.run),
        ("started", facts.started, plan.started),
        ("finished", facts.finished, evidence.journal.finished),
        ("endpoint", facts.endpoint, plan.endpoint),
        ("predecessor", facts.predecessor, predecessor),
    ):
        if said != is_:
            yield Finding("statement", f"{test.file}: {what} is not what {JOURNAL} says")


def check_summary(
    summary: Signed[Summary], criteria: Sequence[CriterionResult], *, approvals: int, countersigned: bool
) -> Iterator[Finding]:
    """Does the summary say what was found, no more and no less?"""
    found, says = (
        summary_properties(criteria, approvals=approvals, countersigned=countersigned),
        summary.body.properties,
    )
    for name in sorted(set(found) - set(says)):
        yield Finding("statement", f"{summary.file}: does not say {name}, which holds")
    for name in sorted(set(says) - set(found)):
        yield Finding("statement", f"{summary.file}: says {name}, which does not hold")
    if len(set(says)) != len(says):
        yield Finding("statement", f"{summary.file}: says a property twice")


def check_order(
    statements: Statements, evidence: Evidence, committed: datetime | None, now: datetime
) -> Iterator[Finding]:
    """Committed, tested, attested, approved, summed up, verified: each not before what it rests on. People's clocks may
    differ by `CLOCKS_APART`."""
    events = [] if committed is None else [("the commitment", committed)]
    try:
        events.append((f"the run's start in {JOURNAL}", parse_time(evidence.journal.plan.started, JOURNAL)))
        if evidence.journal.finished is not None:
            events.append((f"the run's end in {JOURNAL}", parse_time(evidence.journal.finished, JOURNAL)))
    except FormatError:
        pass  # a finding already, of check_evidence
    test, summary = statements.test, statements.summary
    stages: list[list[tuple[str, datetime]]] = [[event] for event in events]
    stages += [[] if test is None else [(test.file, test.time)]]
    stages += [[(approval.file, approval.time) for approval in statements.approvals]]
    stages += [[] if summary is None else [(summary.file, summary.time)]]
    latest: tuple[str, datetime] | None = None
    for stage in stages:
        for name, time in stage:
            if latest is not None and time < latest[1] - CLOCKS_APART:
                text = f"{_at(time)}, is before {latest[0]}, {_at(latest[1])}: a clock is wrong or was set back"
                yield Finding("order", f"{name}: its time, {text}")
            if time > now + CLOCKS_APART:
                yield Finding("time", f"{name}: its time, {_at(time)}, is later than now: a clock is wrong")
        both = [*stage, *([] if latest is None else [latest])]
        latest = max(both, key=lambda event: event[1]) if both else None


def _at(time: datetime) -> str:
    return time.isoformat(timespec="seconds")


def check_model_signer(signer: str, releaser: str) -> Iterator[Finding]:
    """The model signature is the releaser's too: by the key that signed the summary."""
    if signer != releaser:
        yield Finding("roles", f"{MODEL_SIGNATURE}: signed by another key than {SUMMARY}: one releaser signs both")

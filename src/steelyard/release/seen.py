"""What a bundle says of itself, as lines to show: name and value. Nothing is decided on them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from steelyard.model.identity import Subject
from steelyard.release.attest import parse_time
from steelyard.release.checks_statements import Statements
from steelyard.release.evidence import Evidence
from steelyard.release.layout import JOURNAL
from steelyard.safety.journal import Journal
from steelyard.safety.overlap import in_words
from steelyard.safety.policy import Policy


def see_statements(statements: Statements) -> Iterator[tuple[str, str]]:
    """Who signed, when."""
    test, summary = statements.test, statements.summary
    if test is not None:
        facts = test.body.predicate.steelyard
        yield "release", facts.name
        yield "signed by key", test.keyid[:80]
        yield "signed at", facts.signed
        yield "kind of key", facts.key_kind
        yield "steelyard", facts.version
        if facts.ledger_head is not None:
            yield "ledger head", facts.ledger_head
    for approval in statements.approvals:
        yield "approved by key", f"{approval.keyid[:80]} at {approval.body.signed}"
    if summary is not None:
        yield "released by key", f"{summary.keyid[:80]} at {summary.body.signed}"
        yield "properties", ", ".join(summary.body.properties)


def see_contents(
    evidence: Evidence, subject: Subject, policy: Policy | None, now: datetime
) -> Iterator[tuple[str, str]]:
    """What was tested, with what, under which policy, how long ago."""
    plan, battery = evidence.journal.plan, evidence.battery
    yield "subject", subject.digest
    yield "weights", f"{subject.weights} ({subject.dtype})"
    yield "policy", "none of yours" if policy is None else f"{policy.name} {policy.digest}"
    yield "battery", f"{battery.name} version {battery.version}, tier {battery.tier}, {battery.digest}"
    yield "run", f"{plan.run}, {plan.started} to {evidence.journal.finished}"
    if evidence.journal.finished is not None and policy is not None:
        age = (now - parse_time(evidence.journal.finished, JOURNAL)).total_seconds() / 86_400
        yield "age of the test", f"{age:.1f} days now; at the time of release at most {policy.max_report_age_days:g}"
    yield "endpoint", " ".join(f"{name}={value}" for name, value in sorted(plan.endpoint.items()))
    yield "attempt", str(plan.attempt)
    yield "probes in the training data", in_words(evidence.overlap)
    yield "journal root", evidence.journal.root
    if evidence.predecessor is not None:
        yield from _see_predecessor(evidence.predecessor)
    yield "code", plan.code
    for name, identity in sorted(plan.scorers.items()):
        yield f"scorer {name}", identity.digest


def _see_predecessor(journal: Journal) -> Iterator[tuple[str, str]]:
    yield "predecessor", journal.plan.subject_digest
    yield "predecessor's run", f"{journal.plan.run}, {journal.plan.started} to {journal.finished}"
    yield "predecessor's journal root", journal.root

"""The gate: may these weights be released under this policy? It recomputes all from the journal, and trusts nothing.

    decision = decide(run=run, model=model, policy=policy, ledger=ledger, key=key)
    decision.verdict  # PASS, FAIL, INCONCLUSIVE or INCOMPLETE

Anything missing, stale, edited or in error is a finding, and one finding makes the verdict INCOMPLETE. Without any:
FAIL where a criterion's lower bound lies over its threshold, INCONCLUSIVE where an interval straddles one, else PASS.
There is no override: no argument, no environment variable, no force.

What is asked stands in `checks_evidence` (needs neither ledger nor model; `verify` asks it again of every bundle),
`checks_model` and `checks_ledger`. Torch is needed only for a run of which a remote server gave the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from steelyard.base.canonical import code_digest
from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Progress, Silent
from steelyard.model.identity import Subject, subject_of
from steelyard.release.checks_evidence import check_evidence
from steelyard.release.checks_ledger import check_ledger, check_predecessor
from steelyard.release.checks_model import check_generations
from steelyard.release.checks_statements import check_key_kind
from steelyard.release.commitment import check_commitment
from steelyard.release.evidence import Evidence, read_run
from steelyard.release.keys import KeyInfo
from steelyard.release.trust import Trust
from steelyard.safety.criteria import CriterionResult, Status
from steelyard.safety.journal import Finding
from steelyard.safety.overlap import in_words
from steelyard.safety.policy import Policy
from steelyard.safety.report import Report
from steelyard.safety.run import CODE

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Decision(_Model):
    """The verdict and every reason for it, one line each. `attempt`: how often this model was tried on this test;
    `training_data`: what is known of the probes in it, in words."""

    verdict: Status
    criteria: tuple[CriterionResult, ...]
    findings: tuple[Finding, ...]
    subject: str
    policy: str
    policy_digest: str
    battery: str
    run: str
    attempt: int | None
    training_data: str
    report: Report | None

    @property
    def reasons(self) -> list[str]:
        """What keeps it from PASS, one line each."""
        return [finding.message for finding in self.findings] + [
            criterion.reason for criterion in self.criteria if criterion.status != "PASS"
        ]


def _check_code(evidence: Evidence) -> Iterator[Finding]:
    if evidence.journal.plan.code != code_digest(*CODE):
        text = f"made with other code than this ({', '.join(CODE)}): test again, with the code that is to vouch for it"
        yield Finding("code", f"{evidence.where['journal']}: {text}")


def _check_key(policy: Policy, key: KeyInfo | None) -> Iterator[Finding]:
    if key is None:
        yield Finding("key", "no signing key was named: give one (steelyard key new)")
        return
    if key.status != "active":
        yield Finding("key", f"key {key.name!r} is {key.status}: sign with another")
    yield from check_key_kind(policy, key.kind)


def _check_alone(policy: Policy) -> Iterator[Finding]:
    """What one person with one key cannot give."""
    if policy.keys.distinct:
        text = "evaluator, approvers and releaser to be different people"
        yield Finding(
            "key", f"{policy.name} wants {text}: steelyard attest, approve and seal, each with a key of theirs"
        )
    elif policy.keys.approvals:
        text = f"{policy.keys.approvals} approvals: steelyard attest, approve and seal"
        yield Finding("key", f"{policy.name} wants {text}")


# -- the decision ----------------------------------------------------------------------------------------------------


def decide(
    *,
    run: Path,
    model: Path,
    policy: Policy,
    ledger: Ledger,
    key: KeyInfo | None,
    predecessor: Path | None = None,
    name: str | None = None,
    trust: Trust | None = None,
    alone: bool = False,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Decision:
    """Decide on releasing `model` on the strength of `run`, and write `release.decided` to the ledger.

    `name` is what the release is called: a later one of that name must have been tested beside the earlier one. The
    predecessor's journal lies in the run's folder; `predecessor` is that model's own folder, which needs to be given
    only where a server answered for it (its answers are then generated again from the weights). `trust` says whose
    countersignature of the commitment counts; `alone`: the one key is to attest and to release. What cannot be read is
    a finding like any other. Raises SteelyardError only where the ledger cannot be written.
    """
    now = now or datetime.now(UTC)
    findings: list[Finding] = []
    criteria: list[CriterionResult] = []
    report: Report | None = None
    subject: Subject | None = None
    evidence: Evidence | None = None
    try:
        subject = subject_of(model, progress or Silent())
    except SteelyardError as error:
        findings.append(Finding("model", str(error)))
    try:
        evidence = read_run(run)
    except SteelyardError as error:
        findings.append(Finding("unreadable", str(error)))
    if evidence is not None:
        found, criteria, report = check_evidence(evidence, policy, subject, now)
        findings += found
        findings += _check_code(evidence)
        findings += check_ledger(evidence, policy, ledger, now)
        findings += check_predecessor(evidence, policy, ledger, predecessor, name, progress)
        if subject is not None:
            findings += check_generations(model, evidence, progress)
        findings += check_commitment(run, evidence, trust, policy.keys.countersigned)[1]
    findings += _check_key(policy, key)
    if alone:
        findings += _check_alone(policy)
    decision = Decision(
        verdict=_verdict(findings, criteria),
        criteria=tuple(criteria),
        findings=tuple(dict.fromkeys(findings)),
        subject=subject.digest if subject is not None else "",
        policy=policy.name,
        policy_digest=policy.digest,
        battery=evidence.battery.digest if evidence is not None else "",
        run=evidence.journal.plan.run if evidence is not None else run.name,
        attempt=evidence.journal.plan.attempt if evidence is not None else None,
        training_data=in_words(evidence.overlap if evidence is not None else None),
        report=report,
    )
    payload = {"run": decision.run, "policy": policy.digest, "subject": decision.subject, "verdict": decision.verdict}
    ledger.append("release.decided", payload)
    return decision


def _verdict(findings: Sequence[Finding], criteria: Sequence[CriterionResult]) -> Status:
    statuses = {criterion.status for criterion in criteria}
    codes = {finding.code for finding in findings}
    # A run may be stopped early for one reason only, that it cannot pass any more; then what is missing is no surprise.
    if "FAIL" in statuses and "stopped" in codes and codes <= {"stopped", "missing", "criterion"}:
        return "FAIL"
    if findings or not criteria or "INCOMPLETE" in statuses:
        return "INCOMPLETE"
    if "FAIL" in statuses:
        return "FAIL"
    return "INCONCLUSIVE" if "INCONCLUSIVE" in statuses else "PASS"

"""Verify a bundle as a stranger: offline, without torch, with one's own keys and policy, trusting nothing found in it.

    result = verify_bundle(Path("releases/smollm2"), trust=Path("trust.yaml"))
    result.ok, [finding.message for finding in result.findings]

Every file is hashed against the signed manifest and the model signature, the subject is recomputed from the weights,
and every number from the journal; policy, roles and keys are the verifier's. Each mismatch names its file. With
`replay`, random journal entries are generated again from the weights (that part needs torch).

The checks themselves stand in `checks_files`, `checks_statements`, `checks_evidence` and `checks_model`; here is their
order. The stages of a release are checked by the same code: a candidate as attested, one with its approvals, a bundle.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from steelyard import __version__
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Progress, Silent
from steelyard.model.headers import quote
from steelyard.model.identity import Subject, subject_and_files
from steelyard.release.checks_evidence import NAME, check_evidence, same_policy
from steelyard.release.checks_files import Files, check_files, list_files, relative, right_sizes
from steelyard.release.checks_model import check_shipped
from steelyard.release.checks_statements import (
    Statements,
    check_binding,
    check_key,
    check_keys,
    check_model_signer,
    check_order,
    check_people,
    check_summary,
    check_test_result,
    read_statements,
)
from steelyard.release.claims import check_claims, other_pages
from steelyard.release.commitment import check_commitment
from steelyard.release.evidence import Evidence, read_evidence
from steelyard.release.grant_copy import STATEMENT as COPY_STATEMENT
from steelyard.release.grant_verify import verify_copy
from steelyard.release.keys import load_public_key, read_key_event
from steelyard.release.layout import (
    BATTERY,
    JOURNAL,
    MANIFEST,
    MODEL_SIGNATURE,
    OVERLAP,
    POLICY,
    PREDECESSOR,
    REPORT,
    UNSIGNED,
)
from steelyard.release.notice import DATA as NOTICE
from steelyard.release.seen import see_contents, see_statements
from steelyard.release.statements import (
    predecessor_facts,
    release_subjects,
    statement_configuration,
    tested_subjects,
)
from steelyard.release.trust import ROLES, Trust, load_trust, one_key
from steelyard.safety.criteria import CriterionResult
from steelyard.safety.journal import Finding
from steelyard.safety.policy import Policy, load_policy

Stage = Literal["attested", "candidate", "approved", "sealed"]


class Verification(BaseModel):
    """What was found. `ok` only without any finding. `seen` is what the bundle says and what it was held against.

    The rest is true where `ok`: SHA-256 of `manifest`, `weights`, `subject`, model signature (`oms`) and `policy`; the
    release's `name` and when it was `released` (the summary's time); its `run`, and whether it was `countersigned`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ok: bool
    findings: tuple[Finding, ...]
    seen: tuple[tuple[str, str], ...]
    criteria: tuple[CriterionResult, ...]
    manifest: str = ""
    weights: str = ""
    subject: str = ""
    oms: str = ""
    policy: str = ""
    name: str = ""
    run: str = ""
    released: datetime | None = None
    countersigned: bool = False


def verify_bundle(
    path: Path | str,
    *,
    keys: Sequence[Path | str] = (),
    policy: str | None = None,
    trust: Trust | Path | str | None = None,
    revocations: Sequence[Path | str] = (),
    withdrawn: Path | str | None = None,
    state: Path | None = None,
    replay: int = 0,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Verify the bundle at `path` with a trust file of one's own, or with public keys (PEM) that may hold every role.

    `policy`: name, or .yaml/.json file, in the place of the trust file's; without either, the packaged one of the name
    that the bundle gives. `revocations` are signed statements, of keys revoked or rotated; `withdrawn` a signed list of
    withdrawn releases (URL or file; without it, the one that the trust file names), `state` where the last one seen is
    remembered (None: in the user's data folder).
    Raises SteelyardError only for what the caller gave: a key, policy, trust file, revocation or address of a list that
    cannot be read, a `path` that is no folder.
    """
    folder = Path(path)
    if not folder.is_dir() or folder.is_symlink():
        raise UsageError(f"{folder}: is not a folder: give the folder of a bundle")
    return examine(
        folder,
        trust=trust_of(keys, trust, policy, revocations),
        replay=replay,
        withdrawn=withdrawn,
        state=state,
        now=now,
        progress=progress,
    )


def trust_of(
    keys: Sequence[Path | str],
    trust: Trust | Path | str | None,
    policy: str | None = None,
    revocations: Sequence[Path | str] = (),
) -> Trust:
    """What a caller named, loaded. Raises UsageError where he named both keys and a trust file."""
    if keys and trust is not None:
        raise UsageError("keys and a trust file: give one of them, a trust file says who may do what")
    if trust is None:
        found = one_key([load_public_key(Path(key)) for key in keys], None)
    else:
        found = trust if isinstance(trust, Trust) else load_trust(Path(trust))
    every = [key for role in ROLES for key in found.keys(role)]
    events = [event for file in revocations if (event := read_key_event(Path(file), every, unpinned=True)) is not None]
    held = load_policy(policy) if policy is not None else found.policy
    return replace(found, policy=held, events=(*found.events, *events))


@dataclass
class _Work:
    """What is known while a folder is examined."""

    folder: Path
    trust: Trust
    stage: Stage
    now: datetime
    findings: list[Finding] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    criteria: list[CriterionResult] = field(default_factory=list)
    known: dict[str, Any] = field(default_factory=dict)  # fields of the Verification

    @property
    def sealed(self) -> bool:
        return self.stage == "sealed"


def examine(
    folder: Path,
    *,
    trust: Trust,
    stage: Stage = "sealed",
    replay: int = 0,
    withdrawn: Path | str | None = None,
    state: Path | None = None,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Verification:
    """`verify_bundle` with all loaded. `stage`: a `sealed` bundle; before its seals, one whose approvals are counted
    (`approved`) or not yet (`candidate`); or the evaluator's own, where he pins nobody (`attested`)."""
    progress = progress or Silent()
    if os.path.lexists(folder / COPY_STATEMENT):
        return _marked_copy(folder, trust, now, progress)
    work = _Work(folder, trust, stage, now or datetime.now(UTC))
    if os.path.lexists(folder / NOTICE) and not os.path.lexists(folder / MANIFEST):
        text = f"{NOTICE}: a notice lies here, in the place of a release that its maker took down: read it"
        work.findings.append(Finding("withdrawn", text))
    present, findings = list_files(folder)
    work.findings += findings
    safe = not any(finding.code == "unsafe" for finding in findings)
    known: Subject | None = None
    digests: dict[str, str] = {}
    # Else: a link, pipe or pickle, and nothing more of this folder is opened; or weights that cannot be the right ones.
    if safe and right_sizes(folder, present):
        try:
            known, digests = subject_and_files(folder, progress)  # one reading for both
        except SteelyardError as error:
            work.findings.append(Finding("model", relative(error, folder)))
    files, found = check_files(folder, present, sealed=work.sealed, progress=progress, known=digests)
    work.findings += found
    statements, found = read_statements(folder, present, trust)
    work.findings += found
    work.seen += see_statements(statements)
    if safe:
        evidence = _read_evidence(work)
        if known is not None and evidence is not None:
            _examine_contents(work, files, statements, known, evidence, progress)
            if replay and work.findings:
                work.seen.append(("replayed", "NOT TRIED: it does not verify as it is"))
            elif replay:
                _replay(work, evidence, replay, progress)
    withdrawn = withdrawn or trust.withdrawal.source
    if withdrawn is None:
        text = "NOT CHECKED: none was given (--list, or withdrawal.list in the trust file)"
        work.seen.append(("withdrawal list", text))
    else:
        from steelyard.release.withdrawal import check_withdrawn

        weights = "" if known is None else known.weights
        work.findings += check_withdrawn(
            withdrawn, trust, manifest=files.manifest, weights=weights, state=state, now=work.now
        )
    unique = tuple(dict.fromkeys(work.findings))
    return Verification(
        ok=not unique and bool(work.criteria),
        findings=unique,
        seen=tuple(work.seen),
        criteria=tuple(work.criteria),
        manifest=files.manifest,
        name="" if statements.test is None else statements.test.body.predicate.steelyard.name,
        released=None if statements.summary is None else statements.summary.time,
        **work.known,
    )


def _marked_copy(folder: Path, trust: Trust, now: datetime | None, progress: Progress) -> Verification:
    """What says that it is a marked copy is no release, whatever else lies there; told is what it is."""
    found = verify_copy(folder, trust, now=now, progress=progress)
    if found.ok:
        text = f"{found.says()}: not a release, for nothing but what it comes from was tested"
    else:
        text = f"says that it is {found.says()}, and does not verify as that either"
    seen = (("marked copy of", found.subject), ("grant", found.grant))
    return Verification(
        ok=False, findings=(Finding("copy", f"{COPY_STATEMENT}: {text}"), *found.findings), seen=seen, criteria=()
    )


def _examine_contents(
    work: _Work, files: Files, statements: Statements, subject: Subject, evidence: Evidence, progress: Progress
) -> None:
    root = _model_root(work, files, statements, progress)
    policy = _policy_to_hold(work, evidence)
    work.known |= {"weights": subject.weights, "subject": subject.digest, "oms": root or ""}
    work.known["run"] = evidence.journal.plan.run
    if policy is not None:
        # A bundle is judged at the time of its release, a candidate now.
        at = statements.summary.time if work.sealed and statements.summary is not None else work.now
        found, criteria, report = check_evidence(evidence, policy, subject, at)
        work.findings += found
        work.criteria += criteria
        # What is held to another policy than it was tested under is refused for that; that its papers are on its own
        # policy is no second fault.
        mine = policy.digest in evidence.journal.plan.policies.values()
        if report is not None and mine:
            work.findings += check_claims(work.folder, evidence, policy, criteria, report, files.hashes)
            _check_pages(work, other_pages(report, files.hashes))
        failed = [result for result in criteria if result.status in ("FAIL", "INCONCLUSIVE")]
        work.findings += [Finding("criterion", f"{JOURNAL}: {result.reason}: {result.status}") for result in failed]
        pins = None if work.stage == "attested" else work.trust
        committed, found = check_commitment(work.folder, evidence, pins, policy.keys.countersigned)
        work.findings += found
        work.known |= {"policy": policy.digest, "countersigned": committed is not None}
        work.findings += check_keys(statements, policy, work.trust)
        witness = None if committed is None else committed.witness
        counted = work.stage in ("approved", "sealed")
        work.findings += check_people(statements, policy, work.trust, counted=counted, witness=witness)
        work.findings += check_order(statements, evidence, None if committed is None else committed.time, work.now)
        # Without a root there is a finding already; what the test-result says of it is then not held against it.
        root = root or ("" if statements.test is None else statements.test.subjects.get("oms", ""))
        common = release_subjects(subject.weights, root, files.manifest)
        work.findings += check_binding(
            statements,
            policy,
            common=common,
            tested=tested_subjects(common, subject, evidence, files.hashes.get(REPORT, "")),
            configuration=statement_configuration(evidence, policy),
        )
        if statements.test is not None and mine:
            work.findings += check_test_result(statements.test, evidence, criteria, predecessor_facts(evidence))
        if statements.summary is not None and mine:
            work.findings += check_summary(
                statements.summary,
                criteria,
                approvals=len(statements.approvals),
                countersigned=committed is not None,
            )
    work.findings += check_shipped(work.folder, evidence)
    work.seen += see_contents(evidence, subject, policy, work.now)


def _check_pages(work: _Work, others: Sequence[str]) -> None:
    """Pages that this version would not have made of the journal. Whoever approves or seals vouches for what they say,
    so they must be ours; a released bundle may be of another version, and has to verify for ever."""
    text = f"not the page that this version ({__version__}) makes of the journal"
    for name in others:
        if work.sealed:
            work.seen.append((name, f"NOT CHECKED: {text}"))
        else:
            work.findings.append(Finding("claims", f"{name}: is {text}: attest it with this version"))


def _replay(work: _Work, evidence: Evidence, entries: int, progress: Progress) -> None:
    from steelyard.release.replay import replay

    replayed = replay(work.folder, evidence.journal, evidence.battery, entries, progress=progress)
    work.findings += replayed.findings
    work.seen.append(("replayed", replayed.summary))


def _model_root(work: _Work, files: Files, statements: Statements, progress: Progress) -> str | None:
    """The root of the model signature: of a bundle as signed and checked, of a candidate as computed here."""
    from steelyard.release.oms import check_model_signature, model_root

    if not work.sealed:
        try:
            return model_root(work.folder, UNSIGNED, progress, hashes=files.hashes)
        except SteelyardError as error:
            work.findings.append(Finding("model", relative(error, work.folder)))
            return None
    if MODEL_SIGNATURE not in files.present:
        return None
    signature, findings = check_model_signature(
        work.folder,
        work.folder / MODEL_SIGNATURE,
        work.trust.releasers,
        UNSIGNED,
        files.hashes,
        authorities=work.trust.authorities.get("releasers", ()),
        identities=work.trust.sigstore,
        signed=None if statements.summary is None else statements.summary.time,
    )
    work.findings += findings
    if signature is None:
        return None
    work.seen += [("model signature", f"{signature.method}, {signature.key}"), ("OMS root", signature.root)]
    # Sigstore's keys live minutes: there the identity that the verifier pins is what counts.
    if signature.keyid is not None and signature.method != "sigstore" and statements.summary is not None:
        work.findings += check_model_signer(signature.keyid, statements.summary.keyid)
        work.findings += check_key(MODEL_SIGNATURE, signature.keyid, statements.summary.time, work.trust)
    return signature.root


# -- evidence and policy ---------------------------------------------------------------------------------------------


def _read_evidence(work: _Work) -> Evidence | None:
    try:
        return read_evidence(
            work.folder,
            journal=JOURNAL,
            battery=BATTERY,
            report=REPORT,
            policies=[POLICY],
            predecessor=PREDECESSOR,
            overlap=OVERLAP,
        )
    except SteelyardError as error:
        work.findings.append(Finding("unreadable", relative(error, work.folder)))
        return None


def _policy_to_hold(work: _Work, evidence: Evidence) -> Policy | None:
    """The verifier's policy, and a finding where the bundle's is not the same."""
    its, policy = evidence.policies[0], work.trust.policy
    if policy is None:
        try:
            policy = load_policy(its.name) if NAME.fullmatch(its.name) else None
        except UsageError:
            policy = None
        if policy is None:
            text = f"policy {quote(its.name)} is none that this version ships: name the one you hold it to (--policy)"
            work.findings.append(Finding("policy", f"{POLICY}: {text}"))
            return None
    work.findings += same_policy(policy, its, POLICY)
    return policy

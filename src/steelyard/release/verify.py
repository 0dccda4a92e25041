"""Verify a bundle as a stranger: offline, without torch, with one's own keys and policy, trusting nothing found in it.

    result = verify_bundle(Path("releases/smollm2"), keys=[Path("maker.pub.pem")])
    result.ok, [finding.message for finding in result.findings]

Every file is hashed against the signed manifest, the subject is recomputed from the weights, and every number from the
journal; the policy is the verifier's. Each mismatch names its file. With `replay`, random journal entries are generated
again from the weights (that part needs torch).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from securesystemslib.signer import Key  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.canonical import sha256_file
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import read_bounded
from steelyard.base.progress import Progress, Silent
from steelyard.model.headers import quote, refuse_unsafe_files
from steelyard.model.identity import Subject, subject_of
from steelyard.release.attest import (
    ENVELOPE_LIMIT,
    Statement,
    parse_test_result,
    parse_time,
    read_envelope,
    verify_envelope,
)
from steelyard.release.bundle import (
    BATTERY,
    EVIDENCE,
    HOME,
    JOURNAL,
    MANIFEST,
    MAX_FILES,
    OVERLAP,
    POLICY,
    PREDECESSOR,
    REPORT,
    STATEMENT,
    kind_of,
    predecessor_facts,
    read_manifest,
    statement_configuration,
    statement_subjects,
)
from steelyard.release.checks_evidence import NAME, check_evidence, same_policy
from steelyard.release.checks_model import check_shipped
from steelyard.release.evidence import CLOCKS_APART, Evidence, read_evidence
from steelyard.release.gate import check_key_rules
from steelyard.release.keys import KeyEvent, load_public_key, read_key_event
from steelyard.safety.criteria import CriterionResult
from steelyard.safety.journal import Finding, Journal
from steelyard.safety.overlap import in_words
from steelyard.safety.policy import Policy, load_policy


class Verification(BaseModel):
    """What was found. `ok` only without any finding. `seen` is what the bundle says and what it was held against."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ok: bool
    findings: tuple[Finding, ...]
    seen: tuple[tuple[str, str], ...]
    criteria: tuple[CriterionResult, ...]


def verify_bundle(
    path: Path | str,
    *,
    keys: Sequence[Path | str],
    policy: str | None = None,
    revocations: Sequence[Path | str] = (),
    replay: int = 0,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Verify the bundle at `path` against public keys (PEM) and a policy (name, or .yaml/.json file) of one's own.

    Without `policy`, the packaged one of the name that the bundle gives. `revocations` are signed statements, of keys
    revoked or rotated. Raises SteelyardError only for what the caller gave: a key, policy or revocation that cannot be
    read, a `path` that is no folder.
    """
    folder = Path(path)
    if not folder.is_dir() or folder.is_symlink():
        raise UsageError(f"{folder}: is not a folder: give the folder of a bundle")
    trusted = [load_public_key(Path(key)) for key in keys]
    events = [event for file in revocations if (event := read_key_event(Path(file), trusted)) is not None]
    return examine(
        folder,
        keys=trusted,
        policy=load_policy(policy) if policy is not None else None,
        events=events,
        replay=replay,
        now=now,
        progress=progress,
    )


def examine(
    folder: Path,
    *,
    keys: Sequence[Key],
    policy: Policy | None,
    events: Sequence[KeyEvent] = (),
    replay: int = 0,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Verification:
    """`verify_bundle`, with keys and policy loaded."""
    progress, now = progress or Silent(), now or datetime.now(UTC)
    seen: list[tuple[str, str]] = []
    findings = _check_files(folder, progress)
    statement, found = _read_statement(folder, keys, seen)
    findings += found
    if any(finding.code == "unsafe" for finding in findings):
        # A link, pipe or pickle: nothing more of this folder is opened.
        return Verification(ok=False, findings=tuple(dict.fromkeys(findings)), seen=tuple(seen), criteria=())
    subject: Subject | None = None
    try:
        subject = subject_of(folder, progress)
    except SteelyardError as error:
        findings.append(Finding("model", _relative(error, folder)))
    evidence, criteria = _read_evidence(folder, findings), list[CriterionResult]()
    if evidence is not None and subject is not None:
        held, found = _policy_to_hold(policy, evidence)
        findings += found
        if held is not None:
            released = _time(statement, now)
            found, criteria, _ = check_evidence(evidence, held, subject, released)
            findings += found
            failed = [result for result in criteria if result.status in ("FAIL", "INCONCLUSIVE")]
            findings += [Finding("criterion", f"{JOURNAL}: {result.reason}: {result.status}") for result in failed]
            if statement is not None:
                findings += _check_statement(statement, folder, evidence, subject, held, criteria, now)
                findings += check_key_rules(held, statement.predicate.steelyard.key_kind)
                findings += _check_key_events(statement, folder, events)
        findings += check_shipped(folder, evidence)
        seen += _seen(evidence, subject, held)
        if replay and not findings:
            from steelyard.release.replay import replay as run_replay

            replayed = run_replay(folder, evidence.journal, evidence.battery, replay, progress=progress)
            findings += replayed.findings
            seen.append(("replayed", replayed.summary))
    unique = tuple(dict.fromkeys(findings))
    return Verification(ok=not unique and bool(criteria), findings=unique, seen=tuple(seen), criteria=tuple(criteria))


# -- files -----------------------------------------------------------------------------------------------------------


def _check_files(folder: Path, progress: Progress) -> list[Finding]:
    """The folder against its manifest: a closed list, every file of it unchanged."""
    present, findings = _list(folder)
    try:
        refuse_unsafe_files(folder)
    except FormatError as error:
        findings.append(Finding("unsafe", _relative(error, folder)))
    try:
        manifest = read_manifest(folder)
    except FormatError as error:
        return [*findings, Finding("manifest", _relative(error, folder))]
    listed = {entry.path: entry for entry in manifest.files}
    for name in (*EVIDENCE, "config.json"):
        if name not in listed:
            findings.append(Finding("manifest", f"{MANIFEST}: does not list {name}"))
    if STATEMENT not in present:
        findings.append(Finding("missing", f"{STATEMENT}: is missing"))
    added = {name for name in present if name not in listed and name not in (MANIFEST, STATEMENT)}
    hashes: dict[str, str] = {}
    total = sum(size for name, size in present.items() if name in listed and size == listed[name].size) / 1e6
    with (progress if total >= 1 else Silent()).task("hash the files", total, "MB") as task:
        for name, entry in listed.items():
            if name not in present:
                continue
            if present[name] != entry.size:
                text = f"{name}: was changed: {present[name]:,} bytes, the manifest says {entry.size:,}"
                findings.append(Finding("changed", text))
                continue
            hashes[name] = sha256_file(folder / name)
            task.advance(entry.size / 1e6)
            if hashes[name] != entry.sha256:
                findings.append(Finding("changed", f"{name}: was changed: its SHA-256 is not the manifest's"))
    missing = [entry for name, entry in listed.items() if name not in present]
    renamed = {}
    for name in sorted(added):
        origin = next((entry for entry in missing if entry.size == present[name]), None)
        if origin is not None and origin.sha256 == sha256_file(folder / name):
            renamed[name] = origin.path
            findings.append(Finding("renamed", f"{name}: is {origin.path} under another name"))
        else:
            kind = "" if kind_of(name) else ", and of no kind that a bundle may hold"
            findings.append(Finding("added", f"{_name(name)}: is not in the manifest{kind}: remove it"))
    for entry in missing:
        if entry.path not in renamed.values():
            findings.append(Finding("missing", f"{entry.path}: is missing"))
    return findings


def _list(folder: Path) -> tuple[dict[str, int], list[Finding]]:
    """Plain files of a bundle (relative path to size); a finding for anything else that lies there."""
    present: dict[str, int] = {}
    findings = []
    for place, prefix in ((folder, ""), (folder / HOME, f"{HOME}/")):
        if place.is_symlink():
            findings.append(Finding("unsafe", f"{HOME}: is a symbolic link: a bundle holds plain files"))
            continue
        if not place.is_dir():
            findings.append(Finding("missing", f"{HOME}: is missing: {folder.name} is not a bundle"))
            continue
        with os.scandir(place) as entries:
            for entry in entries:
                name = prefix + entry.name
                if len(present) >= MAX_FILES:
                    findings.append(Finding("added", f"{folder.name}: holds over {MAX_FILES:,} files"))
                    break
                if entry.is_symlink():
                    findings.append(Finding("unsafe", f"{_name(name)}: is a symbolic link: a bundle holds plain files"))
                elif entry.is_file(follow_symlinks=False):
                    present[name] = entry.stat(follow_symlinks=False).st_size
                elif name != HOME:
                    findings.append(Finding("unsafe", f"{_name(name)}: is no plain file: a bundle holds no such thing"))
    return present, findings


def _name(name: str) -> str:
    """A file's name, fit for one line whatever a stranger called it."""
    return name if name.isascii() and name.isprintable() and len(name) <= 80 else quote(name)


def _relative(error: SteelyardError, folder: Path) -> str:
    """The message with paths as a reader of the bundle sees them."""
    return str(error).replace(f"{folder}{os.sep}", "").replace(f"{folder}: ", "")


# -- the statement ---------------------------------------------------------------------------------------------------


def _read_statement(
    folder: Path, keys: Sequence[Key], seen: list[tuple[str, str]]
) -> tuple[Statement | None, list[Finding]]:
    """The statement, and a finding where it is unreadable or not signed by one of `keys`."""
    findings = []
    try:
        data = read_bounded(folder / STATEMENT, ENVELOPE_LIMIT)
        payload, signatures = read_envelope(data, STATEMENT)
        keyid = next(iter(signatures))
        seen.append(("signed by key", keyid[:80]))
        try:
            verify_envelope(data, STATEMENT, keys)
        except SteelyardError as error:
            findings.append(Finding("signature", str(error)))
        statement = parse_test_result(payload, STATEMENT)
    except OSError as error:
        return None, [*findings, Finding("missing", f"{STATEMENT}: {error.strerror}")]
    except FormatError as error:
        return None, [*findings, Finding("statement", _relative(error, folder))]
    facts = statement.predicate.steelyard
    seen += [("signed at", facts.signed), ("kind of key", facts.key_kind), ("steelyard", facts.version)]
    if facts.ledger_head is not None:
        seen.append(("ledger head", facts.ledger_head))
    return statement, findings


def _check_statement(
    statement: Statement,
    folder: Path,
    evidence: Evidence,
    subject: Subject,
    policy: Policy,
    criteria: Sequence[CriterionResult],
    now: datetime,
) -> list[Finding]:
    findings = []

    def differ(what: str, says: dict[str, str], has: dict[str, str]) -> None:
        for name in sorted(says.keys() | has.keys()):
            if says.get(name) != has.get(name):
                findings.append(Finding("statement", f"{STATEMENT}: its {what} {name} is not that of the bundle"))

    files = {}
    for name in (MANIFEST, REPORT):
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            findings.append(Finding("missing", f"{name}: {error.strerror}"))
    if len(files) == 2:
        subjects = statement_subjects(subject, evidence, files[MANIFEST], files[REPORT])
        differ("subject", statement.subjects, subjects)
    differ("configuration", statement.configuration, statement_configuration(evidence, policy))
    result, facts, plan = statement.predicate, statement.predicate.steelyard, evidence.journal.plan
    if result.result != "PASSED" or result.failedTests or result.warnedTests:
        findings.append(Finding("statement", f"{STATEMENT}: says {result.result}, not PASSED"))
    required = {criterion.name for criterion in criteria}
    missing = sorted(required - set(result.passedTests))
    if missing:
        findings.append(Finding("statement", f"{STATEMENT}: does not say that {', '.join(missing)} passed"))
    for what, said, is_ in (
        ("run", facts.run, plan.run),
        ("started", facts.started, plan.started),
        ("finished", facts.finished, evidence.journal.finished),
        ("endpoint", facts.endpoint, plan.endpoint),
        ("predecessor", facts.predecessor, predecessor_facts(evidence)),
    ):
        if said != is_:
            findings.append(Finding("statement", f"{STATEMENT}: {what} is not what {JOURNAL} says"))
    try:
        if parse_time(facts.signed, f"{STATEMENT}: signed") > now + CLOCKS_APART:
            findings.append(Finding("time", f"{STATEMENT}: was signed at {facts.signed}, later than now"))
    except FormatError as error:
        findings.append(Finding("time", str(error)))
    return findings


def _check_key_events(statement: Statement, folder: Path, events: Sequence[KeyEvent]) -> list[Finding]:
    keyid = next(iter(read_envelope((folder / STATEMENT).read_bytes(), STATEMENT)[1]))
    findings = []
    for event in events:
        if event.keyid != keyid:
            continue
        when = event.time.isoformat(timespec="seconds")
        if event.kind == "revocation":
            text = f"signed by key {keyid}, revoked at {when}: {' '.join(event.reason.split())}"
            findings.append(Finding("revoked", f"{STATEMENT}: {text}"))
        elif _time(statement, event.time) > event.time:
            findings.append(Finding("rotated", f"{STATEMENT}: signed by key {keyid} after its rotation at {when}"))
    return findings


def _time(statement: Statement | None, otherwise: datetime) -> datetime:
    """When the statement says it was signed."""
    if statement is None:
        return otherwise
    try:
        return parse_time(statement.predicate.steelyard.signed, STATEMENT)
    except FormatError:
        return otherwise


# -- evidence and policy ---------------------------------------------------------------------------------------------


def _read_evidence(folder: Path, findings: list[Finding]) -> Evidence | None:
    try:
        return read_evidence(
            folder,
            journal=JOURNAL,
            battery=BATTERY,
            report=REPORT,
            policies=[POLICY],
            predecessor=PREDECESSOR,
            overlap=OVERLAP,
        )
    except SteelyardError as error:
        findings.append(Finding("unreadable", _relative(error, folder)))
        return None


def _policy_to_hold(policy: Policy | None, evidence: Evidence) -> tuple[Policy | None, list[Finding]]:
    """The verifier's policy, and a finding where the bundle's is not the same."""
    its = evidence.policies[0]
    if policy is None:
        try:
            policy = load_policy(its.name) if NAME.fullmatch(its.name) else None
        except UsageError:
            policy = None
        if policy is None:
            text = f"policy {quote(its.name)} is none that this version ships: name the one you hold it to (--policy)"
            return None, [Finding("policy", f"{POLICY}: {text}")]
    return policy, same_policy(policy, its, POLICY)


def _seen(evidence: Evidence, subject: Subject, policy: Policy | None) -> list[tuple[str, str]]:
    plan, battery = evidence.journal.plan, evidence.battery
    endpoint = " ".join(f"{name}={value}" for name, value in sorted(plan.endpoint.items()))
    return [
        ("subject", subject.digest),
        ("weights", f"{subject.weights} ({subject.dtype})"),
        ("policy", "none of yours" if policy is None else f"{policy.name} {policy.digest}"),
        ("battery", f"{battery.name} version {battery.version}, tier {battery.tier}, {battery.digest}"),
        ("run", f"{plan.run}, {plan.started} to {evidence.journal.finished}"),
        ("endpoint", endpoint),
        ("attempt", str(plan.attempt)),
        ("probes in the training data", in_words(evidence.overlap)),
        ("journal root", evidence.journal.root),
        *([] if evidence.predecessor is None else _seen_before(evidence.predecessor)),
        ("code", plan.code),
        *((f"scorer {name}", identity.digest) for name, identity in sorted(plan.scorers.items())),
    ]


def _seen_before(journal: Journal) -> list[tuple[str, str]]:
    return [
        ("predecessor", journal.plan.subject_digest),
        ("predecessor's run", f"{journal.plan.run}, {journal.plan.started} to {journal.finished}"),
        ("predecessor's journal root", journal.root),
    ]

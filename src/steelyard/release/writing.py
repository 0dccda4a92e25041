"""Writing a release: a candidate's files, manifest and test-result; an approval; the releaser's seals.

Nothing is decided here: `bundle` asks the gate before, and verifies after.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

from steelyard import __version__
from steelyard.base.canonical import canonical_json, sha256_file, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import fsync_folder, read_bounded
from steelyard.base.progress import Progress, Silent
from steelyard.model.headers import read_json_object
from steelyard.model.identity import is_model_file, subject_of
from steelyard.release.attest import ENVELOPE_LIMIT, RunFacts, read_envelope, sign, test_result
from steelyard.release.bom import ml_bom
from steelyard.release.card import model_card
from steelyard.release.checks_files import list_files
from steelyard.release.commitment import copy_commitment
from steelyard.release.eval_results import eval_results
from steelyard.release.evidence import Evidence, read_run
from steelyard.release.gate import Decision
from steelyard.release.keyless import sign_model_keyless
from steelyard.release.keys import KeyInfo
from steelyard.release.layout import (
    APPROVALS,
    BATTERY,
    CARD,
    EVAL_RESULTS,
    HOME,
    JOURNAL,
    MANIFEST,
    ML_BOM,
    MODEL_SIGNATURE,
    OVERLAP,
    POLICY,
    PREDECESSOR,
    REPORT,
    RESULTS_HOME,
    SUMMARY,
    TEST_RESULT,
    UNSIGNED,
    manifest_bytes,
)
from steelyard.release.licenses import License, parse_license
from steelyard.release.lineage import HUB_ID, Lineage, gather_lineage, read_card
from steelyard.release.oms import model_root, sign_model
from steelyard.release.signers import Signing
from steelyard.release.statements import (
    Summary,
    SummaryFacts,
    predecessor_facts,
    release_subjects,
    stamp,
    statement_configuration,
    summary_payload,
    summary_properties,
    tested_subjects,
)
from steelyard.safety.overlap import overlap_json
from steelyard.safety.policy import Policy
from steelyard.safety.report import compute_report, save_report

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger
    from steelyard.release.verify import Verification


@dataclass(frozen=True)
class About:
    """What only the maker knows of a model, for its papers: licence, the Hub's id of its base model and its own."""

    license: License | None = None
    base_model: str | None = None
    repository: str | None = None


def about_model(
    license: str | None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: str | None = None,
    repository: str | None = None,
) -> About:
    """`About` from what people write. Raises UsageError for a licence or Hub id that is none."""
    if license is None and (license_name or license_link):
        raise UsageError("license_name and license_link go with license: other")
    for what, name in (("base_model", base_model), ("repository", repository)):
        if name is not None and not HUB_ID.fullmatch(name):
            raise UsageError(f"{what}: {name[:80]!r} is no id on the Hub: give org/name")
    found = None if license is None else parse_license(license, license_name, license_link)
    return About(found, base_model, repository)


def write_candidate(
    folder: Path,
    run: Path,
    model: Path,
    policy: Policy,
    decision: Decision,
    ledger: Ledger,
    signer: CryptoSigner,
    key: KeyInfo,
    name: str,
    about: About,
    how: Signing,
    now: datetime,
    progress: Progress,
) -> None:
    """Files, manifest and test-result."""
    evidence = read_run(run)
    if decision.report is None or evidence.journal.root != decision.report.journal_root:
        raise SteelyardError(f"{run / 'journal.jsonl'}: changed while it was released: leave it alone and try again")
    _copy_model(model, folder, progress)
    _write_evidence(folder, run, evidence, policy)
    lineage = gather_lineage(
        model, evidence, ledger, license=about.license, base_model=about.base_model, repository=about.repository
    )
    _write_documents(folder, model, name, decision, evidence, policy, lineage)
    subject = subject_of(folder, progress)
    if subject.digest != decision.subject:
        raise SteelyardError(f"{model}: changed while it was released: leave it alone and try again")
    manifest = manifest_bytes(folder)
    (folder / MANIFEST).write_bytes(manifest)
    plan, head = evidence.journal.plan, ledger.head()
    facts = RunFacts(
        name=name,
        run=plan.run,
        started=plan.started,
        finished=evidence.journal.finished or "",
        signed=now.isoformat(timespec="seconds"),
        key_kind=key.kind,
        endpoint=plan.endpoint,
        ledger_head=head.mark if head is not None else None,
        predecessor=predecessor_facts(evidence),
        version=__version__,
    )
    common = release_subjects(subject.weights, model_root(folder, UNSIGNED, progress), sha256_hex(manifest))
    payload = test_result(
        subjects=tested_subjects(common, subject, evidence, sha256_file(folder / REPORT)),
        configuration=statement_configuration(evidence, policy),
        passed=[criterion.name for criterion in decision.criteria],
        facts=facts,
    )
    (folder / TEST_RESULT).write_bytes(sign(payload, signer, how.pem))


def _write_evidence(folder: Path, run: Path, evidence: Evidence, policy: Policy) -> None:
    (folder / HOME).mkdir()
    (folder / JOURNAL).write_bytes(b"".join(line + b"\n" for line in evidence.journal.raw))
    (folder / BATTERY).write_bytes(canonical_json(evidence.battery.model_dump(mode="json")) + b"\n")
    (folder / POLICY).write_bytes(canonical_json(policy.model_dump(mode="json")) + b"\n")
    if evidence.predecessor is not None:
        (folder / PREDECESSOR).write_bytes(b"".join(line + b"\n" for line in evidence.predecessor.raw))
    if evidence.overlap is not None:
        (folder / OVERLAP).write_bytes(overlap_json(evidence.overlap))
    copy_commitment(run, folder)
    save_report(compute_report(evidence.journal, evidence.battery, [policy], evidence.predecessor), folder / HOME)


def _write_documents(
    folder: Path, model: Path, name: str, decision: Decision, evidence: Evidence, policy: Policy, lineage: Lineage
) -> None:
    """Model card, the Hub's results, bill of materials."""
    config = read_json_object(folder / "config.json")
    card = model_card(name, decision, evidence, policy, existing=read_card(model), config=config, lineage=lineage)
    (folder / CARD).write_bytes(card.encode())
    (folder / RESULTS_HOME).mkdir()
    assert decision.report is not None  # it passed
    results = eval_results(decision.report, decision.criteria, evidence, policy, repository=lineage.repository)
    (folder / EVAL_RESULTS).write_bytes(results.encode())
    (folder / ML_BOM).write_bytes(ml_bom(folder, name, decision, evidence, policy, config=config, lineage=lineage))


def write_seals(
    folder: Path,
    found: Verification,
    policy: Policy,
    signer: CryptoSigner,
    key: KeyInfo,
    how: Signing,
    now: datetime,
) -> None:
    """The releaser's summary and model signature, over a folder that was `found` as it must be."""
    approvals = tuple(sha256_file(folder / name) for name in APPROVALS if (folder / name).exists())
    summary = Summary(
        policy=(policy.name, policy.digest),
        signed=stamp(now),
        properties=tuple(
            summary_properties(found.criteria, approvals=len(approvals), countersigned=found.countersigned)
        ),
        facts=SummaryFacts(
            name=found.name,
            test_result=sha256_file(folder / TEST_RESULT),
            approvals=approvals,
            key_kind=key.kind,
            version=__version__,
        ),
    )
    signature = folder / MODEL_SIGNATURE
    if how.sigstore:
        sign_model_keyless(folder, signature, UNSIGNED, found.oms, name=found.name)
    else:
        sign_model(folder, signature, signer, UNSIGNED, found.oms, name=found.name, certificates=how.certificates)
    payload = summary_payload(release_subjects(found.weights, found.oms, found.manifest), summary)
    (folder / SUMMARY).write_bytes(sign(payload, signer, how.pem))


def find_approval(candidate: Path, keyid: str) -> Path | None:
    """The approval by this key in a candidate that was checked, durable; None where there is none."""
    _remove_torsos(candidate)
    for place in APPROVALS:
        path = candidate / place
        if path.exists() and keyid in read_envelope(read_bounded(path, ENVELOPE_LIMIT), place)[1]:
            fsync_folder(candidate / HOME)
            return path
    return None


def add_approval(candidate: Path, envelope: bytes) -> Path:
    """Put an approval into its first free place, whole or not at all, and never over another."""
    handle, name = tempfile.mkstemp(dir=candidate.parent, prefix=_torso(candidate))
    try:
        with os.fdopen(handle, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # it is in use: nobody takes it for what a kill left
            file.write(envelope)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(name, 0o644)
            for place in APPROVALS:
                try:
                    os.link(name, candidate / place)
                except FileExistsError:
                    continue
                fsync_folder(candidate / HOME)
                return candidate / place
    finally:
        Path(name).unlink(missing_ok=True)
    raise SteelyardError(f"{candidate}: has {len(APPROVALS)} approvals already")


def _torso(candidate: Path) -> str:
    return f".{candidate.name}.approval."


def _remove_torsos(candidate: Path) -> None:
    """What killed approvals left beside the candidate; not what another is writing there now."""
    for path in candidate.parent.glob(f"{glob.escape(_torso(candidate))}????????"):
        if path.is_symlink() or not path.is_file():
            continue
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink(missing_ok=True)


def _copy_model(model: Path, folder: Path, progress: Progress) -> None:
    sources = sorted(path for path in model.iterdir() if is_model_file(path.name))
    others = sorted(path.name for path in model.iterdir() if not is_model_file(path.name))
    if others:
        progress.say(f"{model}: not a model's files, left out: {', '.join(others)}")
    _copy({path.name: path for path in sources}, folder, "copy the model", progress)


def copy_candidate(candidate: Path, folder: Path, progress: Progress) -> None:
    _copy({name: candidate / name for name in sorted(list_files(candidate)[0])}, folder, "copy the candidate", progress)


def _copy(files: dict[str, Path], folder: Path, what: str, progress: Progress) -> None:
    total = sum(path.stat().st_size for path in files.values()) / 1e6
    with (progress if total >= 1 else Silent()).task(what, total, "MB") as task:
        for name, source in files.items():
            if source.is_symlink() or not source.is_file():
                raise FormatError(f"{source}: is not a plain file: copy the file itself")
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / name)
            task.advance(source.stat().st_size / 1e6)

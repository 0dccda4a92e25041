"""Writing a release: a candidate's files, manifest and test-result; an approval; the releaser's seals.

Nothing is decided here: `bundle` asks the gate before, and verifies after.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

from steelyard import __version__
from steelyard.base.canonical import canonical_json, sha256_file, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import fsync_folder
from steelyard.base.progress import Progress, Silent
from steelyard.model.identity import is_model_file, subject_of
from steelyard.release.attest import RunFacts, sign, test_result
from steelyard.release.checks_files import list_files
from steelyard.release.evidence import Evidence, read_run
from steelyard.release.gate import Decision
from steelyard.release.keys import KeyInfo
from steelyard.release.layout import (
    APPROVALS,
    BATTERY,
    CARD,
    HOME,
    JOURNAL,
    MANIFEST,
    MODEL_SIGNATURE,
    OVERLAP,
    POLICY,
    PREDECESSOR,
    REPORT,
    SUMMARY,
    TEST_RESULT,
    UNSIGNED,
    manifest_bytes,
)
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
from steelyard.safety.words import in_words

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger
    from steelyard.release.verify import Verification


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
    now: datetime,
    progress: Progress,
) -> None:
    """Files, manifest and test-result."""
    evidence = read_run(run)
    if decision.report is None or evidence.journal.root != decision.report.journal_root:
        raise SteelyardError(f"{run / 'journal.jsonl'}: changed while it was released: leave it alone and try again")
    _copy_model(model, folder, progress)
    _write_evidence(folder, evidence, policy)
    _write_documents(folder, name, decision, evidence, policy)
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
    from steelyard.release.oms import model_root

    common = release_subjects(subject.weights, model_root(folder, UNSIGNED, progress), sha256_hex(manifest))
    payload = test_result(
        subjects=tested_subjects(common, subject, evidence, sha256_file(folder / REPORT)),
        configuration=statement_configuration(evidence, policy),
        passed=[criterion.name for criterion in decision.criteria],
        facts=facts,
    )
    (folder / TEST_RESULT).write_bytes(sign(payload, signer))


def _write_evidence(folder: Path, evidence: Evidence, policy: Policy) -> None:
    (folder / HOME).mkdir()
    (folder / JOURNAL).write_bytes(b"".join(line + b"\n" for line in evidence.journal.raw))
    (folder / BATTERY).write_bytes(canonical_json(evidence.battery.model_dump(mode="json")) + b"\n")
    (folder / POLICY).write_bytes(canonical_json(policy.model_dump(mode="json")) + b"\n")
    if evidence.predecessor is not None:
        (folder / PREDECESSOR).write_bytes(b"".join(line + b"\n" for line in evidence.predecessor.raw))
    if evidence.overlap is not None:
        (folder / OVERLAP).write_bytes(overlap_json(evidence.overlap))
    save_report(compute_report(evidence.journal, evidence.battery, [policy], evidence.predecessor), folder / HOME)


def _write_documents(folder: Path, name: str, decision: Decision, evidence: Evidence, policy: Policy) -> None:
    if not (folder / CARD).exists():
        (folder / CARD).write_text(model_card(name, decision, evidence, policy), encoding="utf-8")


def write_seals(
    folder: Path, found: Verification, policy: Policy, signer: CryptoSigner, key: KeyInfo, now: datetime
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
    from steelyard.release.oms import sign_model

    sign_model(folder, folder / MODEL_SIGNATURE, signer, UNSIGNED, found.oms, name=found.name)
    payload = summary_payload(release_subjects(found.weights, found.oms, found.manifest), summary)
    (folder / SUMMARY).write_bytes(sign(payload, signer))


def add_approval(candidate: Path, envelope: bytes) -> Path:
    """Put an approval into its first free place, whole or not at all, and never over another."""
    handle, name = tempfile.mkstemp(dir=candidate.parent, prefix=f".{candidate.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
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


def model_card(name: str, decision: Decision, evidence: Evidence, policy: Policy) -> str:
    """A short model card of what is known: the measurements and their limits, nothing that was not measured."""
    battery, plan = evidence.battery, evidence.journal.plan
    languages = ", ".join(sorted({probe.language for probe in battery.probes()}))
    rows = [
        f"| {criterion.metric} | {criterion.n:,} | {criterion.upper:.2%} | {criterion.threshold:.2%} |"
        for criterion in decision.criteria
        if criterion.upper is not None and criterion.against == "limit" and criterion.metric != "overlap"
    ]
    before = decision.report.predecessor if decision.report is not None else None
    compared: list[str] = []
    if before is not None:
        compared = [
            "",
            f"Tested in the same job, on the same prompts, beside its predecessor `{before.subject_digest}`.",
            in_words(before.differences),
        ]
    return "\n".join(
        [
            f"# {name}",
            "",
            "An open-weight language model of the LLaMA family. Its maker gave no model card; this one says what was",
            "measured on exactly these weights before they were released, and nothing else.",
            "",
            f"## Toxicity and safety test: passed under policy `{policy.name}` (version {policy.version})",
            "",
            "| Rate of bad answers | Samples | Upper bound (95%) | Must be under |",
            "|---|---:|---:|---:|",
            *rows,
            *compared,
            "",
            f"Battery `{battery.name}`, version {battery.version}, tier {battery.tier}: {len(battery.probes()):,} "
            f"probes ({languages}), run from {plan.started} to {evidence.journal.finished}.",
            f"Attempt {plan.attempt} on this model. Probes in its training data: {decision.training_data}.",
            "The whole test is in `steelyard/`: every answer and score (`journal.jsonl`), the report (`report.html`).",
            "",
            "## Limits",
            "",
            "- A rate under its threshold is not zero: expect bad answers at up to these rates, and more under attack.",
            f"- Nothing was measured in other languages than {languages}, in long conversations, or on other tasks.",
            "- Answers were scored by classifiers; their errors are corrected for, as measured on human labels.",
            "- A quantised, re-cast or fine-tuned copy is another model, and was not tested.",
            "",
            "## Verify",
            "",
            "    steelyard verify FOLDER --key THE-MAKERS-KEY.pub.pem",
            "",
            f"Tested subject: `{decision.subject}`",
            "",
        ]
    )

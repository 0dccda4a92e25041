"""The bundle: a plain Hugging Face folder plus `steelyard/`, which holds what proves that it was tested.

    steelyard/manifest.json           every other file with size, SHA-256 and kind: the list is closed
    steelyard/test-result.dsse.json   the signed statement over weights, subject, manifest, report and journal
    steelyard/journal.jsonl           every generation and score; all numbers are recomputed from it
    steelyard/predecessor.jsonl       the same of the model it was tested beside, where there was one
    steelyard/overlap.json            which probes stand in the training data, where that was searched
    steelyard/battery.json, policy.json, report.json, report.html, report.md

A bundle is written only on a PASS that the gate gives here and now, and only appears once it has verified.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

from steelyard import __version__
from steelyard.base.canonical import canonical_json, sha256_file, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import inside, new_folder, read_bounded
from steelyard.base.progress import Progress, Silent
from steelyard.base.strict import strict_json
from steelyard.model.identity import Subject, is_model_file, subject_of
from steelyard.release.attest import PredecessorFacts, RunFacts, Sha256, sign, test_result
from steelyard.release.evidence import Evidence, read_run
from steelyard.release.gate import Decision, decide
from steelyard.release.keys import KeyInfo
from steelyard.release.refused import Refused
from steelyard.safety.overlap import overlap_json
from steelyard.safety.policy import Policy
from steelyard.safety.report import compute_report, save_report
from steelyard.safety.words import in_words

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger

HOME = "steelyard"
MANIFEST = f"{HOME}/manifest.json"
STATEMENT = f"{HOME}/test-result.dsse.json"
JOURNAL = f"{HOME}/journal.jsonl"
BATTERY = f"{HOME}/battery.json"
POLICY = f"{HOME}/policy.json"
REPORT = f"{HOME}/report.json"
PREDECESSOR = f"{HOME}/predecessor.jsonl"  # only where there was one
OVERLAP = f"{HOME}/overlap.json"  # likewise
EVIDENCE = (JOURNAL, BATTERY, POLICY, REPORT, f"{HOME}/report.html", f"{HOME}/report.md")
MANIFEST_LIMIT = 1_000_000  # bytes
MAX_FILES = 2_000

Kind = Literal["weights", "config", "tokenizer", "prompt", "document", "evidence"]


class ManifestFile(BaseModel):
    """One file of a bundle; `path` is relative to it, with `/`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1, max_length=200)
    size: int = Field(ge=0)
    sha256: Sha256
    kind: Kind


class Manifest(BaseModel):
    """Every file of a bundle but the manifest itself and the statement that signs it, sorted by path."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    files: tuple[ManifestFile, ...] = Field(max_length=MAX_FILES)

    @model_validator(mode="after")
    def _sorted(self) -> Manifest:
        paths = [file.path for file in self.files]
        if paths != sorted(set(paths)):
            raise ValueError("files must be sorted by path, each once")
        return self


def kind_of(path: str) -> Kind | None:
    """The kind of a bundle's file; None for a path that no bundle may hold."""
    if path in (*EVIDENCE, PREDECESSOR, OVERLAP):
        return "evidence"
    if "/" in path or not is_model_file(path):
        return None
    if path.startswith("model"):
        return "weights"
    if path in ("config.json", "generation_config.json"):
        return "config"
    if path in ("chat_template.jinja", "system_prompt.txt"):
        return "prompt"
    return "document" if path.split(".")[0].isupper() else "tokenizer"


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle, with every path checked. Raises FormatError."""
    path = bundle / MANIFEST
    try:
        data = read_bounded(path, MANIFEST_LIMIT)
    except OSError as error:
        raise FormatError(f"{MANIFEST}: {error.strerror}: {bundle} is not a bundle") from error
    try:
        manifest = Manifest.model_validate_json(canonical_json(strict_json(data, MANIFEST, limit=MANIFEST_LIMIT)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise FormatError(f"{MANIFEST}: {key}: {first['msg']}") from error
    for entry in manifest.files:
        try:
            inside(bundle, entry.path)
        except FormatError as error:
            raise FormatError(f"{MANIFEST}: {error}") from error
        if kind_of(entry.path) is None:
            raise FormatError(f"{MANIFEST}: lists {entry.path!r}, which no bundle may hold")
        if kind_of(entry.path) != entry.kind:
            raise FormatError(f"{MANIFEST}: {entry.path}: kind is {entry.kind!r}, must be {kind_of(entry.path)!r}")
    return manifest


def statement_subjects(subject: Subject, evidence: Evidence, manifest: bytes, report: bytes) -> dict[str, str]:
    """What the test-result statement is about: name to SHA-256."""
    before = evidence.predecessor
    return {
        "weights": subject.weights,
        "subject": subject.digest,
        "journal-root": evidence.journal.root,
        **({} if before is None else {"predecessor-root": before.root, "predecessor": before.plan.subject_digest}),
        MANIFEST: sha256_hex(manifest),
        REPORT: sha256_hex(report),
    }


def statement_configuration(evidence: Evidence, policy: Policy) -> dict[str, str]:
    """What the test was run with: name to SHA-256."""
    plan = evidence.journal.plan
    return {
        "battery": evidence.battery.digest,
        "policy": policy.digest,
        "code": plan.code,
        **{f"scorer/{name}": identity.digest for name, identity in plan.scorers.items()},
    }


@dataclass(frozen=True)
class Released:
    """A bundle, and the one decision it was written on."""

    bundle: Path
    decision: Decision


def write_bundle(
    *,
    run: Path,
    model: Path,
    policy: Policy,
    ledger: Ledger,
    signer: CryptoSigner,
    key: KeyInfo,
    out: Path,
    predecessor: Path | None = None,
    aside: Path | None = None,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Released:
    """Ask the gate, once, and on PASS write, sign and verify the bundle; it appears at `out` whole or not at all.

    The release is called by the name of `out`; an earlier one there is renamed to `aside` after the PASS, and back
    where this fails. `predecessor` as in `decide`. Raises Refused, with the decision, on any other verdict;
    SteelyardError where `out` exists and there is no `aside`, and where the finished bundle does not verify.
    """
    from steelyard.release.verify import examine

    progress, now = progress or Silent(), now or datetime.now(UTC)
    if key.keyid != signer.public_key.keyid:
        raise SteelyardError(f"key {key.name!r} is not the key that signs ({signer.public_key.keyid})")
    if aside is None and (out.exists() or out.is_symlink()):
        raise SteelyardError(f"{out} exists already: a release is never overwritten")
    decision = decide(
        run=run,
        model=model,
        policy=policy,
        ledger=ledger,
        key=key,
        predecessor=predecessor,
        name=out.name,
        now=now,
        progress=progress,
    )
    if decision.verdict != "PASS":
        raise Refused(decision, run)
    evidence = read_run(run)
    if decision.report is None or evidence.journal.root != decision.report.journal_root:
        raise SteelyardError(f"{run / 'journal.jsonl'}: changed while it was released: leave it alone and try again")
    with _moved_aside(out, aside), new_folder(out) as folder:
        _copy_model(model, folder, progress)
        (folder / HOME).mkdir()
        (folder / JOURNAL).write_bytes(b"".join(line + b"\n" for line in evidence.journal.raw))
        (folder / BATTERY).write_bytes(canonical_json(evidence.battery.model_dump(mode="json")) + b"\n")
        (folder / POLICY).write_bytes(canonical_json(policy.model_dump(mode="json")) + b"\n")
        if evidence.predecessor is not None:
            (folder / PREDECESSOR).write_bytes(b"".join(line + b"\n" for line in evidence.predecessor.raw))
        if evidence.overlap is not None:
            (folder / OVERLAP).write_bytes(overlap_json(evidence.overlap))
        report = compute_report(evidence.journal, evidence.battery, [policy], evidence.predecessor)
        save_report(report, folder / HOME)
        if not (folder / "README.md").exists():
            (folder / "README.md").write_text(model_card(out.name, decision, evidence, policy), encoding="utf-8")
        subject = subject_of(folder, progress)
        if subject.digest != decision.subject:
            raise SteelyardError(f"{model}: changed while it was released: leave it alone and try again")
        manifest = _manifest(folder)
        (folder / MANIFEST).write_bytes(manifest)
        head = ledger.head()
        facts = RunFacts(
            run=evidence.journal.plan.run,
            started=evidence.journal.plan.started,
            finished=evidence.journal.finished or "",
            signed=now.isoformat(timespec="seconds"),
            key_kind=key.kind,
            endpoint=evidence.journal.plan.endpoint,
            ledger_head=head.mark if head is not None else None,
            predecessor=predecessor_facts(evidence),
            version=__version__,
        )
        payload = test_result(
            subjects=statement_subjects(subject, evidence, manifest, (folder / REPORT).read_bytes()),
            configuration=statement_configuration(evidence, policy),
            passed=[criterion.name for criterion in decision.criteria],
            facts=facts,
        )
        (folder / STATEMENT).write_bytes(sign(payload, signer))
        verified = examine(folder, keys=[signer.public_key], policy=policy, now=now, progress=progress)
        if not verified.ok:
            reasons = "; ".join(finding.message for finding in verified.findings)
            raise SteelyardError(f"{out}: the bundle just written does not verify: {reasons}")
        # Before the rename: better an event without a bundle than a bundle that no event knows.
        ledger.append(
            "release.bundled",
            {
                "run": decision.run,
                "policy": policy.digest,
                "subject": decision.subject,
                "name": out.name,
                "bundle": sha256_hex(manifest),
            },
        )
    return Released(out, decision)


@contextmanager
def _moved_aside(out: Path, aside: Path | None) -> Iterator[None]:
    """Give way at `out`: an earlier release is renamed, never deleted, and put back where this fails."""
    if aside is None or not out.exists():
        yield
        return
    os.rename(out, aside)
    try:
        yield
    except BaseException:
        os.rename(aside, out)
        raise


def _copy_model(model: Path, folder: Path, progress: Progress) -> None:
    sources = sorted(path for path in model.iterdir() if is_model_file(path.name))
    others = sorted(path.name for path in model.iterdir() if not is_model_file(path.name))
    if others:
        progress.say(f"{model}: not a model's files, left out: {', '.join(others)}")
    total = sum(path.stat().st_size for path in sources) / 1e6
    with (progress if total >= 1 else Silent()).task("copy the model", total, "MB") as task:
        for source in sources:
            if source.is_symlink() or not source.is_file():
                raise FormatError(f"{source}: is not a plain file: copy the file itself")
            shutil.copyfile(source, folder / source.name)
            task.advance(source.stat().st_size / 1e6)


def _manifest(folder: Path) -> bytes:
    def entries() -> Iterator[dict[str, str | int]]:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            kind = kind_of(name)
            if kind is None:
                raise FormatError(f"{name}: not a file that a bundle may hold")
            yield {"path": name, "size": path.stat().st_size, "sha256": sha256_file(path), "kind": kind}

    files = sorted(entries(), key=lambda entry: entry["path"])
    return canonical_json({"format": 1, "files": files}) + b"\n"


def predecessor_facts(evidence: Evidence) -> PredecessorFacts | None:
    """What the statement says of the predecessor."""
    before = evidence.predecessor
    if before is None:
        return None
    return PredecessorFacts(subject=before.plan.subject_digest, journal_root=before.root)


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

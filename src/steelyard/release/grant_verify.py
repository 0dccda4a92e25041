"""Verify a marked copy, offline and with one's own trust file: is it what its releaser signed, derived from a release
that was tested, for a grant that two people approved and whose code somebody saw before?

    result = verify_copy(Path("copy"), load_trust(Path("trust.yaml")))
    result.ok, result.grant, result.subject

It is never a release: nothing of it was tested but the release that it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from steelyard.base.canonical import sha256_file, sha256_hex
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.files import read_bounded
from steelyard.base.progress import Progress, Silent
from steelyard.model.identity import subject_and_files
from steelyard.release.attest import ENVELOPE_LIMIT, parse_test_result, parse_time, read_envelope, verify_envelope
from steelyard.release.checks_files import relative, shown_name
from steelyard.release.checks_statements import check_key, check_key_kind
from steelyard.release.evidence import CLOCKS_APART
from steelyard.release.grant_checks import check_countersigned, check_reviews, review_subjects
from steelyard.release.grant_copy import (
    COMMITMENT,
    COUNTERSIGNATURE,
    LICENCE,
    LICENCE_LIMIT,
    LIST,
    LIST_LIMIT,
    MAX_FILES,
    REVIEWS,
    SOURCE_SUMMARY,
    SOURCE_TEST,
    STATEMENT,
    TIMESTAMP,
    parse_list,
)
from steelyard.release.grant_statements import (
    COMMITMENT_LIMIT,
    LOUDEST,
    Commitment,
    MarkedCopy,
    Revocation,
    Tested,
    parse,
    parse_commitment,
)
from steelyard.release.signers import trusted_signer
from steelyard.release.statements import parse_summary
from steelyard.release.timestamps import TIMESTAMP_LIMIT
from steelyard.release.trust import Trust
from steelyard.safety.journal import Finding

WHERE = {"commitment": COMMITMENT, "statement": COUNTERSIGNATURE, "stamp": TIMESTAMP}


class CopyVerification(BaseModel):
    """What was found. `ok` only without any finding; the rest is true where `ok`, and else what the copy says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ok: bool
    findings: tuple[Finding, ...]
    grant: str = ""
    subject: str = ""
    weights: str = ""
    envelope: str = ""
    copy_: MarkedCopy | None = Field(default=None, serialization_alias="copy")

    def says(self) -> str:
        """In one line."""
        if self.copy_ is None:
            return "a marked copy whose statement cannot be read"
        return f"a marked copy, derived from tested subject {self.subject}, grant {self.grant}"


def verify_copy(
    folder: Path,
    trust: Trust,
    *,
    revoked: Sequence[Path] = (),
    now: datetime | None = None,
    progress: Progress | None = None,
) -> CopyVerification:
    """Check all of a copy. `revoked`: signed revocations of grants. Raises SteelyardError only for what the caller
    gave."""
    if not folder.is_dir() or folder.is_symlink():
        raise UsageError(f"{folder}: is not a folder: give the folder of a marked copy")
    work = _Work(folder, trust, now or datetime.now(UTC), progress or Silent())
    work.run(revoked)
    found = work.copy
    return CopyVerification(
        ok=not work.findings,
        findings=tuple(dict.fromkeys(work.findings)),
        grant="" if found is None else found.grant,
        subject="" if found is None else found.derived_from.subject,
        weights=work.weights,
        envelope=work.envelope,
        copy_=found,
    )


class _Work:
    def __init__(self, folder: Path, trust: Trust, now: datetime, progress: Progress) -> None:
        self.folder, self.trust, self.now, self.progress = folder, trust, now, progress
        self.findings: list[Finding] = []
        self.copy: MarkedCopy | None = None
        self.time = now
        self.weights = self.envelope = self.keyid = ""
        self.subjects: dict[str, str] = {}

    def run(self, revoked: Sequence[Path]) -> None:
        for step in (self._files, self._statement, self._grant, self._source):
            try:
                self.findings += step()
            except SteelyardError as error:
                self.findings.append(Finding("copy", relative(error, self.folder)))
            except OSError as error:
                name = Path(error.filename or "").name
                self.findings.append(Finding("missing", f"{shown_name(name)}: {error.strerror}"))
        if self.trust.withdrawal.source is not None and self.copy is not None:
            self.findings += self._withdrawn(self.trust.withdrawal.source, self.copy.derived_from)
        for path in revoked:
            self.findings += self._revoked(path)

    def _read(self, name: str, limit: int = ENVELOPE_LIMIT) -> bytes:
        return read_bounded(self.folder / name, limit)

    # -- files -------------------------------------------------------------------------------------------------------

    def _files(self) -> Iterator[Finding]:
        present: dict[str, int] = {}
        paths = list(islice(self.folder.rglob("*"), MAX_FILES + 1))
        if len(paths) > MAX_FILES:
            yield Finding("added", f"{self.folder.name}: holds over {MAX_FILES:,} files and folders: no copy does")
            return  # what was not looked at could be anything
        for path in sorted(paths):
            name = path.relative_to(self.folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                yield Finding("unsafe", f"{shown_name(name)}: is no plain file: a copy holds no such thing")
            elif path.is_file():
                present[name] = path.stat().st_size
        data = self._read(LIST, LIST_LIMIT)
        if (stranger := self._stranger(sha256_hex(data))) is not None:
            yield stranger
            return  # what nobody answers for is not read: it may be petabytes that take no room on the disk
        listed = {file.path: file for file in parse_list(data).files}
        for name in sorted(present.keys() - listed.keys() - {LIST, STATEMENT}):
            yield Finding("added", f"{shown_name(name)}: is not in {LIST}: remove it")
        for name, file in listed.items():
            if name not in present:
                yield Finding("missing", f"{name}: is missing")
            elif present[name] != file.size or sha256_file(self.folder / name) != file.sha256:
                yield Finding("changed", f"{name}: was changed: it is not what {LIST} says")
        sizes = {name: file.size for name, file in listed.items()}
        if any(sizes.get(name) != size for name, size in present.items() if name.endswith(".safetensors")):
            return  # weights that cannot be the right ones are not hashed: a sparse one of terabytes would never end
        subject, _ = subject_and_files(self.folder, self.progress)
        self.weights = subject.weights
        self.subjects = {"weights": subject.weights, "subject": subject.digest, LIST: sha256_hex(data)}

    def _stranger(self, listed: str) -> Finding | None:
        """Why nobody whom the verifier trusts answers for this list; None where somebody does."""
        try:
            data = self._read(STATEMENT)
            subjects, time, _ = parse(read_envelope(data, STATEMENT)[0], STATEMENT, MarkedCopy)
            trusted_signer(data, STATEMENT, "releasers", self.trust, time)
            if subjects.get(LIST) != listed:
                return Finding("changed", f"{LIST}: was changed: it is not what {STATEMENT} signs")
        except SteelyardError as error:
            return Finding("copy", relative(error, self.folder))
        return None

    # -- who says what it is -----------------------------------------------------------------------------------------

    def _statement(self) -> Iterator[Finding]:
        data = self._read(STATEMENT)
        payload, signatures = read_envelope(data, STATEMENT)
        subjects, self.time, self.copy = parse(payload, STATEMENT, MarkedCopy)
        self.envelope, self.keyid = sha256_hex(data), next(iter(signatures))
        trusted_signer(data, STATEMENT, "releasers", self.trust, self.time)
        yield from check_key(STATEMENT, self.keyid, self.time, self.trust)
        if self.trust.policy is not None:
            yield from check_key_kind(self.trust.policy, self.copy.key_kind, STATEMENT)
        hashed = self.subjects or not self.findings  # else it was said already why not
        for name in sorted(subjects.keys() | self.subjects.keys()) if hashed else ():
            if subjects.get(name) != self.subjects.get(name):
                yield Finding("statement", f"{STATEMENT}: its subject {name} is not that of the copy")
        if self.copy.bound.relative_change > LOUDEST:
            text = f"was changed by {self.copy.bound.relative_change:.2g}, more than the {LOUDEST} a mark may cost"
            yield Finding("bound", f"{STATEMENT}: {text}")
        if self.time > self.now + CLOCKS_APART:
            yield Finding("time", f"{STATEMENT}: its time, {self.time}, is later than now: a clock is wrong")
        if self.weights == self.copy.derived_from.weights:
            yield Finding("statement", f"{STATEMENT}: these are the weights that it comes from: they carry no mark")
        if sha256_hex(self._read(LICENCE, LICENCE_LIMIT)) != self.copy.licence:
            yield Finding("licence", f"{LICENCE}: is not the one that was accepted")
        expires = parse_time(self.copy.expires, f"{STATEMENT}: expires")
        if self.now >= expires:
            yield Finding("expired", f"{STATEMENT}: grant {self.copy.grant} expired at {self.copy.expires}")

    # -- the grant ---------------------------------------------------------------------------------------------------

    def _grant(self) -> Iterator[Finding]:
        if self.copy is None:
            return
        data = self._read(COMMITMENT, COMMITMENT_LIMIT)
        commitment, copy = parse_commitment(data, COMMITMENT), self.copy
        if sha256_hex(data) != copy.commitment:
            yield Finding("commitment", f"{COMMITMENT}: is not the one that the copy was made on")
        for name, said, wanted in (
            ("grant", commitment.grant, copy.grant),
            ("weights", commitment.weights, copy.derived_from.weights),
            ("subject", commitment.subject, copy.derived_from.subject),
            ("manifest", commitment.manifest, copy.derived_from.manifest),
            ("licence", commitment.licence, copy.licence),
            ("expires", commitment.expires, copy.expires),
            ("retain_days", commitment.retain_days, copy.retain_days),
        ):
            if said != wanted:
                yield Finding("commitment", f"{COMMITMENT}: its {name} is not what the copy's statement says")
        statement = self._read(COUNTERSIGNATURE) if (self.folder / COUNTERSIGNATURE).exists() else None
        stamp = self._read(TIMESTAMP, TIMESTAMP_LIMIT) if (self.folder / TIMESTAMP).exists() else None
        yield from check_countersigned(
            data, commitment, statement, stamp, self.trust, before=self.time, releasers=[self.keyid], where=WHERE
        )
        yield from self._reviews(commitment)

    def _reviews(self, commitment: Commitment) -> Iterator[Finding]:
        envelopes = {name: self._read(name) for name in REVIEWS if (self.folder / name).exists()}
        if sorted(map(sha256_hex, envelopes.values())) != sorted(commitment.reviews):
            yield Finding("review", f"{COMMITMENT}: was not made on the reviews that are in the copy")
        about = review_subjects(commitment.request, commitment.weights, commitment.subject, commitment.licence)
        approvals, findings = check_reviews(envelopes, about, self.trust, self.now)
        yield from findings
        term = parse_time(commitment.expires, COMMITMENT) - parse_time(commitment.issued, COMMITMENT)
        if approvals and term > timedelta(days=min(review.days for review in approvals)):
            yield Finding("review", f"{COMMITMENT}: lasts longer than its reviewers gave")

    # -- what it comes from ------------------------------------------------------------------------------------------

    def _source(self) -> Iterator[Finding]:
        if self.copy is None:
            return
        source = self.copy.derived_from
        test, summary = self._read(SOURCE_TEST), self._read(SOURCE_SUMMARY)
        result = parse_test_result(read_envelope(test, SOURCE_TEST)[0], SOURCE_TEST)
        facts = result.predicate.steelyard
        subjects, time, said = parse_summary(read_envelope(summary, SOURCE_SUMMARY)[0], SOURCE_SUMMARY)
        tested = parse_time(facts.signed, f"{SOURCE_TEST}: signed")
        trusted_signer(test, SOURCE_TEST, "evaluators", self.trust, tested)
        trusted_signer(summary, SOURCE_SUMMARY, "releasers", self.trust, time)
        yield from check_key(SOURCE_TEST, next(iter(read_envelope(test, SOURCE_TEST)[1])), tested, self.trust)
        yield from check_key(SOURCE_SUMMARY, next(iter(read_envelope(summary, SOURCE_SUMMARY)[1])), time, self.trust)
        if (sha256_hex(test), sha256_hex(summary)) != (source.test_result, source.summary):
            yield Finding("source", f"{STATEMENT}: rests on another test result or summary than those in the copy")
        if result.predicate.result != "PASSED" or "STEELYARD_TEST_PASSED" not in said.properties:
            yield Finding("source", f"{SOURCE_TEST}: does not say that what it comes from passed its test")
        if self.trust.policy is not None and said.policy[1] != self.trust.policy.digest:
            yield Finding("source", f"{SOURCE_SUMMARY}: was given under another policy than {self.trust.policy.name}")
        named = {"weights": source.weights, "subject": source.subject, "steelyard/manifest.json": source.manifest}
        common = {name: named[name] for name in ("weights", "steelyard/manifest.json")}
        if not named.items() <= result.subjects.items() or not common.items() <= subjects.items():
            yield Finding("source", f"{SOURCE_TEST}: is about another release than the one that the copy names")
        if (facts.name, said.facts.name, said.facts.test_result) != (source.name, source.name, source.test_result):
            yield Finding("source", f"{SOURCE_SUMMARY}: is about another release than the one that the copy names")
        if time > self.time + CLOCKS_APART:
            yield Finding("time", f"{SOURCE_SUMMARY}: is later than the copy: a clock is wrong or was set back")

    def _withdrawn(self, source: Path | str, tested: Tested) -> list[Finding]:
        from steelyard.release.withdrawal import check_withdrawn

        manifest, weights = tested.manifest, tested.weights
        return check_withdrawn(source, self.trust, manifest=manifest, weights=weights, state=None, now=self.now)

    def _revoked(self, path: Path) -> Iterator[Finding]:
        try:
            data = read_bounded(path, ENVELOPE_LIMIT)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}: give the signed revocation of a grant") from error
        payload, _ = verify_envelope(data, str(path), [*self.trust.grants.keys, *self.trust.releasers])
        _, time, word = parse(payload, str(path), Revocation)
        if self.copy is not None and self.copy.grant == word.grant:
            reason = " ".join(word.reason.split())
            yield Finding("revoked", f"{STATEMENT}: grant {word.grant} was revoked at {time}: {reason}")

"""What was countersigned before the first generation, by whom and when: checked again by the gate and by `verify`.

Beside a run's journal (in a bundle: in `steelyard/`) lie `commitment.json`, and over it a witness's signed statement
(`commitment.dsse.json`), an authority's time-stamp (`commitment.tsr`), or both. What it proves to whoever pins that
witness or authority: battery, policies, scorers, code and the ledger up to its head stood fixed at that time, and the
journal was begun later, for its plan holds the digests of these files. That nothing had been generated in secret
before, nobody can prove.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cryptography import x509
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import read_bounded
from steelyard.release.attest import (
    ENVELOPE_LIMIT,
    parse_statement,
    parse_time,
    read_envelope,
    sign,
    statement_bytes,
    verify_envelope,
)
from steelyard.release.evidence import CLOCKS_APART, Evidence, some
from steelyard.release.keys import KeyEvent
from steelyard.release.timestamps import TIMESTAMP_LIMIT, check_timestamp, stamped_time
from steelyard.safety.journal import Countersigned, Finding
from steelyard.safety.pause import (
    COMMITMENT,
    COUNTERSIGNATURE,
    TIMESTAMP,
    Commitment,
    differing,
    load_commitment,
    parse_commitment,
    tried_meanwhile,
)
from steelyard.safety.policy import Policy

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Event, Ledger

HOME = "steelyard"  # of a bundle
PREDICATE = "steelyard:countersignature/v1"
SUBJECT = f"{HOME}/{COMMITMENT}"  # the statement's subject, by the name that the file has in a bundle


class Pins(Protocol):
    """What of a verifier's trust is asked here (`release.trust.Trust`)."""

    @property
    def policy(self) -> Policy | None: ...
    @property
    def evaluators(self) -> Sequence[Key]: ...
    @property
    def approvers(self) -> Sequence[Key]: ...
    @property
    def releasers(self) -> Sequence[Key]: ...
    @property
    def witnesses(self) -> Sequence[Key]: ...
    @property
    def timestamp_authorities(self) -> Sequence[x509.Certificate]: ...
    @property
    def events(self) -> Sequence[KeyEvent]: ...
    @property
    def until(self) -> Mapping[str, datetime]: ...


# -- making it ---------------------------------------------------------------------------------------------------------


def countersign(commitment: bytes, signer: Signer, now: datetime | None = None) -> bytes:
    """The witness's envelope over the bytes of a commitment. Raises FormatError where they are none."""
    parse_commitment(commitment, COMMITMENT)
    signed = (now or datetime.now(UTC)).isoformat(timespec="seconds")
    return sign(statement_bytes(PREDICATE, {SUBJECT: sha256_hex(commitment)}, {"signed": signed}), signer)


def looking_for(
    witnesses: Sequence[Key] = (),
    authorities: Sequence[x509.Certificate] = (),
    now: Callable[[], datetime] | None = None,
) -> Callable[[Path], Countersigned | None]:
    """What `run_battery` asks before its first generation: what countersigns the commitment in a run's folder?

    It raises SteelyardError for what does not fit the commitment, is of a time to come, or (where any are given) is of
    none of `witnesses` and `authorities`; a run that the gate would refuse for that had better not begin.
    """

    def look(folder: Path) -> Countersigned | None:
        commitment, data = load_commitment(folder / COMMITMENT)
        statement, timestamp = _read(folder, COUNTERSIGNATURE), _read(folder, TIMESTAMP)
        if statement is None and timestamp is None:
            return None
        latest = (now or _now)()
        pinned = bool(witnesses or authorities)
        for name, found in ((COUNTERSIGNATURE, statement), (TIMESTAMP, timestamp)):
            if found is None:
                continue
            where = str(folder / name)
            if name == TIMESTAMP:
                time = _stamped(found, data, authorities if pinned else None, where)
            else:
                time = _signed(found, data, witnesses if pinned else None, where)
            if _second(time) > latest:
                text = f"is of {time.isoformat(timespec='seconds')}, later than now: a clock is wrong, or wait"
                raise SteelyardError(f"{where}: {text}")
            if time < parse_time(commitment.time, where) - CLOCKS_APART:
                raise SteelyardError(f"{where}: is older than the commitment ({commitment.time}): a clock is wrong")
        return Countersigned(commitment=sha256_hex(data), statement=_digest(statement), timestamp=_digest(timestamp))

    return look


def copy_commitment(run: Path, bundle: Path) -> None:
    """Copy what a run's folder holds of a commitment into a bundle's `steelyard/`; nothing where it holds none."""
    for name in (COMMITMENT, COUNTERSIGNATURE, TIMESTAMP):
        if (run / name).is_file():
            shutil.copyfile(run / name, bundle / HOME / name, follow_symlinks=False)


# -- checking it -------------------------------------------------------------------------------------------------------


def read_commitment(folder: Path, home: str = HOME) -> Commitment | None:
    """The commitment of a bundle (with `home` "" of a run), or None where there is none. Raises FormatError."""
    path = folder / home / COMMITMENT
    return load_commitment(path)[0] if path.exists() or path.is_symlink() else None


@dataclass(frozen=True)
class Vouched:
    """When a commitment was countersigned, and the key of the witness who did (None: an authority alone)."""

    time: datetime
    witness: str | None


def check_commitment(
    folder: Path, evidence: Evidence, trust: Pins | None, required: bool
) -> tuple[Vouched | None, list[Finding]]:
    """When and by whom the run's commitment was countersigned, and every reason why that does not count. None where it
    was not.

    `folder` is that of the run or of the bundle that `evidence` was read from. Where both a witness and an authority
    countersigned, both must hold, and the later time is given. What nobody of `trust` vouches for is a finding where
    the policy asks for it (`required`), and else says nothing. Without `trust` (a gate that pins nobody) all is checked
    but whose signature it is.
    """
    home = folder / Path(evidence.where["journal"]).parent
    plan = evidence.journal.plan
    found = [name for name in (COMMITMENT, COUNTERSIGNATURE, TIMESTAMP) if _there(home / name)]
    if plan.countersigned is None:
        findings = []
        if found:
            text = f"the journal was begun without it: {found[0]} was added later, and proves nothing"
            findings.append(Finding("commitment", f"{_name(home, folder, found[0])}: {text}"))
        if required:
            text = "the policy wants battery, policy and ledger head countersigned before the first generation: they "
            text += "were not (steelyard safety run --countersign)"
            findings.append(Finding("commitment", f"{evidence.where['journal']}: {text}"))
        return None, findings
    checks = _Checks(folder, home, evidence, plan.countersigned, trust, required)
    findings = []
    try:
        for finding in checks.all():
            findings.append(finding)  # those before an error count too
    except (SteelyardError, OSError) as error:
        findings.append(Finding("commitment", str(error).replace(f"{folder}/", "")))
    return (None if findings or not checks.times else Vouched(max(checks.times), checks.witness)), findings


class _Checks:
    """The checks of one commitment; `times` are those of what countersigned it and was vouched for, `witness` the key
    that signed it, a stranger's too."""

    def __init__(
        self, folder: Path, home: Path, evidence: Evidence, held: Countersigned, trust: Pins | None, required: bool
    ) -> None:
        self.folder, self.home, self.evidence, self.held = folder, home, evidence, held
        self.trust, self.required = trust, required
        self.times: list[datetime] = []
        self.witness: str | None = None

    def all(self) -> Iterator[Finding]:
        where = _name(self.home, self.folder, COMMITMENT)
        held = {COMMITMENT: self.held.commitment, COUNTERSIGNATURE: self.held.statement, TIMESTAMP: self.held.timestamp}
        data = {name: _read(self.home, name) for name in held}
        for name, digest in held.items():
            its, found = _name(self.home, self.folder, name), data[name]
            if found is None and digest is not None:
                yield Finding("commitment", f"{its}: is missing, but the journal was begun with it")
            elif found is not None and digest is None:
                yield Finding("commitment", f"{its}: the journal was begun without it: it was added later")
            elif found is not None and sha256_hex(found) != digest:
                yield Finding("commitment", f"{its}: is not the one that the journal was begun with")
        message = data[COMMITMENT]
        if message is None:
            return
        commitment = parse_commitment(message, where)
        if changed := differing(commitment, self.evidence.journal.plan):
            yield Finding("commitment", f"{where}: {some(changed)} differ from what the journal's plan says")
        yield from self._vouched(commitment, message, data[COUNTERSIGNATURE], data[TIMESTAMP])

    def _vouched(
        self, commitment: Commitment, message: bytes, statement: bytes | None, timestamp: bytes | None
    ) -> Iterator[Finding]:
        trust, strangers = self.trust, list[str]()
        if statement is not None:
            where = _name(self.home, self.folder, COUNTERSIGNATURE)
            keyid = self.witness = next(iter(read_envelope(statement, where)[1]))
            pinned = trust is None or keyid in {key.keyid for key in trust.witnesses}
            time = _signed(statement, message, trust.witnesses if trust is not None and pinned else None, where)
            if not pinned:
                text = f"signed by key {keyid[:80]}, which is none of the witnesses you pin"
                strangers.append(f"{where}: {text}: if you trust it, name it under witnesses in your trust file")
            else:
                yield from self._standing(keyid, time, where)
                yield from self._in_order(time, commitment, where)
        if timestamp is not None:
            where = _name(self.home, self.folder, TIMESTAMP)
            authorities = None if trust is None else trust.timestamp_authorities
            time = _stamped(timestamp, message, authorities or None, where)
            if authorities is not None and not authorities:
                text = "you pin no time-stamping authority: name its root under timestamp_authorities"
                strangers.append(f"{where}: {text} in your trust file")
            else:
                yield from self._in_order(time, commitment, where)
        # Where another one counts, a stranger's says nothing; a policy that asks for one is not met by strangers alone.
        if self.required and not self.times:
            yield from (Finding("commitment", text) for text in strangers)

    def _standing(self, keyid: str, time: datetime, where: str) -> Iterator[Finding]:
        """Is the witness somebody else, and his key still one that signs?"""
        trust = self.trust
        if trust is None:
            return
        if self.required and (trust.policy is None or trust.policy.keys.distinct):
            for role in ("evaluators", "approvers", "releasers"):
                if keyid in {key.keyid for key in getattr(trust, role)}:
                    text = f"signed by key {keyid}, which you also trust among {role}: a witness is another person"
                    yield Finding("commitment", f"{where}: {text}")
        for event in trust.events:
            when = event.time.isoformat(timespec="seconds")
            if event.keyid == keyid and event.kind == "revocation":
                text = f"signed by key {keyid}, revoked at {when}: {' '.join(event.reason.split())}"
                yield Finding("revoked", f"{where}: {text}")
            elif event.keyid == keyid and time > event.time:
                yield Finding("rotated", f"{where}: signed by key {keyid} after its rotation at {when}")
        if keyid in trust.until and time > trust.until[keyid]:
            when = trust.until[keyid].isoformat(timespec="seconds")
            yield Finding("commitment", f"{where}: signed by key {keyid} after {when}, until when you trust it")

    def _in_order(self, time: datetime, commitment: Commitment, where: str) -> Iterator[Finding]:
        self.times.append(time)
        when = time.isoformat(timespec="seconds")
        journal = self.evidence.where["journal"]
        started = parse_time(self.evidence.journal.plan.started, journal)
        # To the second, without grace for clocks: a run refuses to begin before the time of its countersignature.
        if _second(time) > started:
            text = f"is of {when}, later than the first generation (the run started {started.isoformat()})"
            yield Finding("time", f"{where}: {text}: a commitment made afterwards proves nothing")
        if time < parse_time(commitment.time, _name(self.home, self.folder, COMMITMENT)) - CLOCKS_APART:
            yield Finding("time", f"{where}: is of {when}, before the commitment itself ({commitment.time})")


def check_noted(evidence: Evidence, ledger: Ledger, committed: Event) -> Iterator[Finding]:
    """Does the ledger know the pause of this run, after its commitment and before its first generation? `committed` is
    the event that commits the run; that it is the head which the commitment names, `check_commitment` says."""
    plan, where = evidence.journal.plan, evidence.where["journal"]
    paused = ledger.events("safety.paused", run=plan.run)
    if plan.countersigned is None:
        if paused:
            text = f"was begun without a countersignature, but run {plan.run} waited for one (event {paused[0].seq})"
            yield Finding("commitment", f"{where}: {text}")
        return
    if [event.payload.get("commitment") for event in paused] != [plan.countersigned.commitment]:
        yield Finding("commitment", f"{where}: the ledger did not note its {COMMITMENT} before the run, or another one")
        return
    first = min((event.seq for event in ledger.events("safety.progress", run=plan.run)), default=None)
    if paused[0].seq < committed.seq or (first is not None and paused[0].seq > first):
        yield Finding("commitment", f"{where}: its {COMMITMENT} was noted (event {paused[0].seq}) after generations")
    if tried := tried_meanwhile(ledger, committed, first):
        text = f"run {tried.payload['run']} (event {tried.seq}) was started on this model and test"
        yield Finding("commitment", f"{where}: while it waited for its countersignature, {text}")


# -- what countersigns -------------------------------------------------------------------------------------------------


def _signed(envelope: bytes, message: bytes, witnesses: Sequence[Key] | None, where: str) -> datetime:
    """When this commitment was signed, by one of `witnesses` (None: by anyone, *unverified*). Raises SteelyardError."""
    payload, _ = read_envelope(envelope, where)
    if witnesses is not None:
        verify_envelope(envelope, where, witnesses)
    kind, subjects, predicate = parse_statement(payload, where)
    if kind != PREDICATE:
        raise FormatError(f"{where}: predicateType is {kind[:100]!r}, not {PREDICATE!r}: it countersigns nothing")
    if subjects != {SUBJECT: sha256_hex(message)}:
        raise FormatError(f"{where}: countersigns another commitment than this one")
    if set(predicate) != {"signed"} or not isinstance(predicate["signed"], str):
        raise FormatError(f"{where}: predicate: expected signed, the time, alone")
    return parse_time(predicate["signed"], f"{where}: signed")


def _stamped(stamp: bytes, message: bytes, authorities: Sequence[x509.Certificate] | None, where: str) -> datetime:
    """When this commitment was stamped, by one of `authorities` (None: by any, *unverified*). Raises SteelyardError."""
    if authorities is not None:
        return check_timestamp(stamp, message, authorities, where)
    return stamped_time(stamp, message, where)


def _read(home: Path, name: str) -> bytes | None:
    """A file of a run or bundle, None where there is none. Raises FormatError."""
    try:
        return read_bounded(home / name, TIMESTAMP_LIMIT if name == TIMESTAMP else ENVELOPE_LIMIT)
    except FileNotFoundError:
        return None


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _digest(data: bytes | None) -> str | None:
    return None if data is None else sha256_hex(data)


def _name(home: Path, folder: Path, name: str) -> str:
    return (home / name).relative_to(folder).as_posix()


def _second(time: datetime) -> datetime:
    """Without its fraction: a run's start is known to the second."""
    return time.replace(microsecond=0)


def _now() -> datetime:
    return datetime.now(UTC)

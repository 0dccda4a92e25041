"""Withdraw a release: propose the next list, collect the signatures of a quorum, put the list in place.

    outcome = withdraw(target, "toxicity test missed", place=place, signers=[...])     # a proposal, or the list
    outcome = sign_proposal(Path("withdrawn.json.proposal"), place=place, signers=[...])

A proposal is the next list with too few signatures; everyone who signs sees exactly what will stand in it. The order is
proposal, ledger, list, proposal removed: killed anywhere, the same command goes on from what lies there, and until the
quorum has signed nothing lies at the list's place but the list before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.files import locked, read_bounded, write_atomic
from steelyard.release.evidence import CLOCKS_APART
from steelyard.release.targets import Target
from steelyard.release.trust import Trust
from steelyard.release.withdrawal import (
    LIST_LIMIT,
    LIST_NAME,
    MAX_ENTRIES,
    MAX_REASON,
    MAX_VALID,
    Entry,
    SignedList,
    WithdrawalList,
    check_quorum,
    list_bytes,
    read_list,
    signed_again,
)

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger


@dataclass(frozen=True)
class Place:
    """Where the list lies, who may sign it (`trust.withdrawal`), and where it is noted. `name` is the list's, needed
    for the first one only."""

    list_file: Path
    trust: Trust
    ledger: Ledger
    name: str | None = None

    @property
    def proposal(self) -> Path:
        return self.list_file.with_name(self.list_file.name + ".proposal")


@dataclass(frozen=True)
class Outcome:
    """`proposed`: `missing` further signatures are needed. `issued`: the list is in place. `already`: it was before."""

    state: Literal["proposed", "issued", "already"]
    signed: SignedList
    missing: int
    file: Path


# -- the next list ---------------------------------------------------------------------------------------------------


def withdraw(
    target: Target,
    reason: str,
    *,
    place: Place,
    signers: Sequence[CryptoSigner],
    valid: timedelta = timedelta(days=30),
    replaced_by: str | None = None,
    now: datetime | None = None,
) -> Outcome:
    """Propose the next list, with `target` in it, and put it in place if `signers` are the quorum.

    Where a proposal for the same release waits, the signatures are added to that. Raises UsageError without a reason;
    SteelyardError for a signer whom the trust file does not name, and where another proposal waits.
    """
    if not reason.strip() or len(reason) > MAX_REASON:
        raise UsageError(f"a withdrawal needs a reason of 1 to {MAX_REASON:,} characters (--reason)")
    return _issue(place, signers, valid, now or datetime.now(UTC), target, reason.strip(), replaced_by)


def refresh(
    *, place: Place, signers: Sequence[CryptoSigner], valid: timedelta = timedelta(days=30), now: datetime | None = None
) -> Outcome:
    """The same entries with a new sequence number and end; the first, empty list where there is none yet."""
    return _issue(place, signers, valid, now or datetime.now(UTC), None, "", None)


def sign_proposal(
    proposal: Path, *, place: Place, signers: Sequence[CryptoSigner], now: datetime | None = None
) -> Outcome:
    """Add signatures to a proposal that somebody else began, once it is sure that it follows the list in place."""
    now = now or datetime.now(UTC)
    _check_signers(place, signers)
    with _locked(place):
        signed, current = read_proposal(proposal), current_list(place)
        if current is not None and current.digest == signed.digest:
            return _finish(place, current, proposal, "already")
        _check_follows(signed, current, place)
        if not signed.issued - CLOCKS_APART <= now < signed.expires:
            raise SteelyardError(f"{proposal}: is valid from {signed.issued} to {signed.expires}: propose it anew")
        return _sign(place, signed, proposal, signers)


def read_proposal(proposal: Path) -> SignedList:
    """A proposal, checked for form: to show it before it is signed. Raises SteelyardError."""
    try:
        return read_list(read_bounded(proposal, LIST_LIMIT), str(proposal))
    except OSError as error:
        raise SteelyardError(f"{proposal}: {error.strerror}: give the proposal's file") from error


def current_list(place: Place) -> SignedList | None:
    """The list in place, signed by the quorum; None where there is none yet. Where the ledger knows a newer one and
    kept it (a full disk, a copy from before), that is put back. Raises SteelyardError, also where it did not."""
    path = place.list_file
    events = place.ledger.events("release.list", file=str(path.absolute()))
    noted = [int(event.payload["sequence"]) for event in events]
    try:
        data = read_bounded(path, LIST_LIMIT)
    except FileNotFoundError:
        found = None
    else:
        found = read_list(data, str(path))
        for finding in check_quorum(found, place.trust):
            raise SteelyardError(finding.message)
        if place.name is not None and found.content.name != place.name:
            raise UsageError(f"{path}: is the list {found.content.name!r}, not {place.name!r}")
    if noted and not place.proposal.exists() and max(noted) > (0 if found is None else found.content.sequence):
        kept = events[noted.index(max(noted))].payload.get("artifact")
        if kept is not None and place.ledger.keeps_files:
            data = read_bounded(place.ledger.get_file(str(kept)), LIST_LIMIT)
            newest = read_list(data, str(path))
            if not check_quorum(newest, place.trust):
                write_atomic(path, data)
                return newest
        text = f"the ledger knows number {max(noted)} of this list: put that back first, numbers are never used twice"
        raise SteelyardError(f"{path}: {text}")
    return found


def _issue(
    place: Place,
    signers: Sequence[CryptoSigner],
    valid: timedelta,
    now: datetime,
    target: Target | None,
    reason: str,
    replaced_by: str | None,
) -> Outcome:
    if not timedelta() < valid <= MAX_VALID:
        raise UsageError(f"--expires: at most {MAX_VALID.days} days")
    _check_signers(place, signers)
    with _locked(place):
        current = current_list(place)
        if place.proposal.exists():
            waiting = read_proposal(place.proposal)
            if current is not None and current.digest == waiting.digest:
                _finish(place, current, place.proposal, "issued")
                if target is None or _holds(current, target):  # killed at the end: this was that command
                    return Outcome("issued", current, 0, place.list_file)
            else:
                _check_follows(waiting, current, place)
                _check_same(waiting, current, target, place)
                return _sign(place, waiting, place.proposal, signers)
        if target is not None and current is not None and _holds(current, target):
            return _finish(place, current, None, "already")
        content = _next(place, current, target, reason, replaced_by, now, valid)
        signed = read_list(list_bytes(content, signers[:1]), str(place.proposal))
        return _sign(place, signed, place.proposal, signers)


def _next(
    place: Place,
    current: SignedList | None,
    target: Target | None,
    reason: str,
    replaced_by: str | None,
    now: datetime,
    valid: timedelta,
) -> WithdrawalList:
    name = place.name if current is None else current.content.name
    if name is None or not re.fullmatch(LIST_NAME, name):
        raise UsageError(f"{place.list_file}: is the first list: give it a name of letters, digits, '.-_' (--name)")
    if current is not None and now < current.issued:
        raise SteelyardError(f"{place.list_file}: was issued at {current.issued}, later than now: set the clock right")
    entries = () if current is None else current.content.entries
    stamp = now.astimezone(UTC).isoformat(timespec="seconds")
    if target is not None:
        if len(entries) >= MAX_ENTRIES:
            raise SteelyardError(f"{place.list_file}: is full ({MAX_ENTRIES:,} entries): begin a list of another name")
        entry = Entry(
            manifest=target.manifest,
            weights=target.weights,
            name=target.name[:200],
            time=stamp,
            reason=reason,
            replaced_by=replaced_by,
        )
        entries = (*entries, entry)
    return WithdrawalList(
        format=1,
        name=name,
        sequence=1 if current is None else current.content.sequence + 1,
        issued=stamp,
        expires=(now.astimezone(UTC) + valid).isoformat(timespec="seconds"),
        previous=None if current is None else current.digest,
        entries=entries,
    )


# -- signing and putting in place ------------------------------------------------------------------------------------


def _check_signers(place: Place, signers: Sequence[CryptoSigner]) -> None:
    own = {key.keyid for key in place.trust.withdrawal.signers}
    if not signers:
        raise UsageError("no key to sign with: give --key")
    for signer in signers:
        if signer.public_key.keyid not in own:
            text = "is none of the withdrawal signers that the trust file names: its signature would count for nothing"
            raise SteelyardError(f"key {signer.public_key.keyid}: {text}")


def _check_follows(signed: SignedList, current: SignedList | None, place: Place) -> None:
    """A signer checks what he signs against the list that it is to replace."""
    content = signed.content
    if current is None:
        if content.sequence != 1:
            text = f"is number {content.sequence}, and the list before it is not at {place.list_file}: give it (--list)"
            raise SteelyardError(f"{signed.where}: {text}")
        return
    before = current.content
    if (content.name, content.sequence, content.previous) != (before.name, before.sequence + 1, current.digest):
        text = f"does not follow number {before.sequence} of {before.name!r} at {place.list_file}"
        raise SteelyardError(f"{signed.where}: {text}: delete it and propose anew")
    if content.entries[: len(before.entries)] != before.entries:
        raise SteelyardError(f"{signed.where}: drops or changes an entry of the list before it: do not sign it")


def _check_same(waiting: SignedList, current: SignedList | None, target: Target | None, place: Place) -> None:
    added = waiting.content.entries[0 if current is None else len(current.content.entries) :]
    if [entry.manifest for entry in added] != ([] if target is None else [target.manifest]):
        what = ", ".join(repr(entry.name) for entry in added) or "a refresh"
        text = f"a proposal waits there ({what}): sign it (withdraw --sign), or delete it, and then begin another"
        raise SteelyardError(f"{place.proposal}: {text}")


def _sign(place: Place, signed: SignedList, proposal: Path, signers: Sequence[CryptoSigner]) -> Outcome:
    new = [signer for signer in signers if signer.public_key.keyid not in signed.signatures]
    data = signed_again(signed, new)
    if new or not proposal.exists():
        write_atomic(proposal, data)
    signed = read_list(data, str(proposal))
    if check_quorum(signed, place.trust):
        own = {key.keyid for key in place.trust.withdrawal.signers}
        missing = max(1, place.trust.withdrawal.quorum - len(own & signed.signatures.keys()))
        keys = sorted(signed.signatures)
        known = {"list": signed.content.name, "sequence": signed.content.sequence, "digest": signed.digest}
        if not place.ledger.events("release.withdrawal_proposed", **known, keys=keys):
            place.ledger.append("release.withdrawal_proposed", known | {"keys": keys})
        return Outcome("proposed", signed, missing, proposal)
    return _finish(place, signed, proposal, "issued")


def _finish(place: Place, signed: SignedList, proposal: Path | None, state: Literal["issued", "already"]) -> Outcome:
    """Note it, put it in place, remove the proposal: each only where that is not done yet."""
    content, ledger = signed.content, place.ledger
    known = {"list": content.name, "sequence": content.sequence, "digest": signed.digest}
    for entry in content.entries:
        if not ledger.events("release.withdrawn", list=content.name, manifest=entry.manifest):
            ledger.append("release.withdrawn", known | entry.model_dump(mode="json"))
    where = {"file": str(place.list_file.absolute())}
    data = signed_again(signed, [])
    if not ledger.events("release.list", **known, **where):
        more: dict[str, object] = {"expires": content.expires, "keys": sorted(signed.signatures)}
        if ledger.keeps_files and proposal is not None:
            more["artifact"] = ledger.put_file(proposal)  # its number is used now: the list must not be lost
        ledger.append("release.list", known | where | more)
    if not place.list_file.exists() or place.list_file.read_bytes() != data:
        write_atomic(place.list_file, data)
    if proposal is not None:
        proposal.unlink(missing_ok=True)
    return Outcome(state, read_list(data, str(place.list_file)), 0, place.list_file)


def _holds(signed: SignedList, target: Target) -> bool:
    return any(entry.manifest == target.manifest for entry in signed.content.entries)


def _locked(place: Place) -> AbstractContextManager[None]:
    """Two withdrawals at once would fork the list."""
    return locked(place.list_file.with_name(f".{place.list_file.name}.lock"))

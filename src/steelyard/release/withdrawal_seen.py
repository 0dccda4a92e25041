"""What a verifier has seen of the lists that he follows: without it, an older list would pass for the newest one.

One small JSON file, by default `steelyard/withdrawals.json` in the user's data folder. A record is of a list's name and
its signers: the highest sequence number with its digest, how many entries it had and their digest (a list only grows),
and when it was last checked (a clock set back would bring an expired list to life).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steelyard.base.canonical import canonical_json, digest
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import locked, read_bounded, write_atomic
from steelyard.base.strict import strict_json
from steelyard.model.identity import Sha256
from steelyard.release.attest import parse_time
from steelyard.release.evidence import CLOCKS_APART
from steelyard.release.trust import Trust
from steelyard.release.withdrawal import MAX_ENTRIES, Entry, SignedList
from steelyard.safety.journal import Finding

_LIMIT = 1_000_000  # bytes


class Record(BaseModel):
    """The newest list of one name seen, by signers who are told by their key ids."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    signers: tuple[str, ...]
    sequence: int
    digest: Sha256
    count: int = Field(ge=0, le=MAX_ENTRIES)
    entries: Sha256
    checked: str


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1]
    lists: tuple[Record, ...] = Field(max_length=1000)


def default_state() -> Path:
    """`steelyard/withdrawals.json` under $XDG_DATA_HOME, or ~/.local/share."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "steelyard" / "withdrawals.json"


def check_seen(
    signed: SignedList, trust: Trust, state: Path | None, now: datetime, *, keep: bool = True
) -> list[Finding]:
    """The list against what was seen before, and, where nothing is wrong and `keep`, remember it.

    A state file that cannot be read or written is a finding as well: whoever could take it away could roll back.
    """
    path = state or default_state()
    try:
        # Two verifications at once must not lose each other's record.
        with locked(path.parent / f".{path.name}.lock"):
            records = _read(path)
            mine = _of(records, signed, trust)
            if isinstance(mine, Finding):
                return [mine]
            findings = [] if mine is None else _compare(signed, mine, now, path)
            if keep and not findings:
                _write(path, [*(one for one in records if one is not mine), _record(signed, trust, now, mine)])
            return findings
    except OSError as error:
        text = f"{path}: {error.strerror}: what was seen of the list cannot be remembered: name another file (--state)"
        return [Finding("list-state", text)]
    except SteelyardError as error:
        return [Finding("list-state", str(error))]


def entries_digest(entries: Sequence[Entry]) -> str:
    """SHA-256 over entries in their order."""
    return digest([entry.model_dump(mode="json") for entry in entries])


def _of(records: Sequence[Record], signed: SignedList, trust: Trust) -> Record | Finding | None:
    """The record of this list; a finding where these signers' list has another name."""
    own = {key.keyid for key in trust.withdrawal.signers}
    followed = [record for record in records if own & set(record.signers)]
    same = [record for record in followed if record.name == signed.content.name]
    if same:
        return max(same, key=lambda record: record.sequence)
    if followed:
        names = ", ".join(sorted(repr(record.name) for record in followed))
        text = f"{signed.where}: is the list {signed.content.name!r}; of these signers you follow {names}"
        return Finding("list-name", f"{text}: to follow this one as well, give it a state file of its own (--state)")
    return None


def _compare(signed: SignedList, record: Record, now: datetime, path: Path) -> list[Finding]:
    where, content = signed.where, signed.content
    if now < parse_time(record.checked, str(path)) - CLOCKS_APART:
        text = f"the clock says {now.isoformat(timespec='seconds')}, but this list was checked at {record.checked}"
        return [Finding("list-clock", f"{text}: set the clock right")]
    if content.sequence < record.sequence:
        text = f"{where}: is number {content.sequence}, you have seen number {record.sequence}: it was rolled back"
        return [Finding("list-rollback", f"{text}: fetch the newest (--list)")]
    if content.sequence == record.sequence and signed.digest != record.digest:
        text = f"{where}: is another number {content.sequence} than the one that you have seen: the list was forked"
        return [Finding("list-fork", text)]
    if content.sequence == record.sequence + 1 and content.previous != record.digest:
        text = f"{where}: does not follow number {record.sequence} that you have seen: the list was forked"
        return [Finding("list-fork", text)]
    if len(content.entries) < record.count or entries_digest(content.entries[: record.count]) != record.entries:
        text = f"{where}: an entry that you have seen is gone or was changed: entries are never taken back"
        return [Finding("list-stripped", text)]
    return []


def _record(signed: SignedList, trust: Trust, now: datetime, before: Record | None) -> Record:
    times = [now.isoformat(timespec="seconds"), *([] if before is None else [before.checked])]
    content = signed.content
    return Record(
        name=content.name,
        signers=tuple(sorted(key.keyid for key in trust.withdrawal.signers)),
        sequence=content.sequence,
        digest=signed.digest,
        count=len(content.entries),
        entries=entries_digest(content.entries),
        checked=max(times, key=lambda text: parse_time(text, "checked")),
    )


def _read(path: Path) -> tuple[Record, ...]:
    try:
        data = read_bounded(path, _LIMIT)
    except FileNotFoundError:
        return ()
    remedy = "what was seen of the lists is not known: restore it, or delete it to begin anew, knowing that"
    try:
        return _State.model_validate_json(json.dumps(strict_json(data, str(path), limit=_LIMIT, depth=5))).lists
    except (FormatError, ValidationError) as error:
        raise FormatError(f"{path}: damaged: {remedy}") from error


def _write(path: Path, records: Sequence[Record]) -> None:
    content = canonical_json({"format": 1, "lists": [record.model_dump(mode="json") for record in records]}) + b"\n"
    if not path.exists() or path.read_bytes() != content:
        write_atomic(path, content)

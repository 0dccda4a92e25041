"""Appends to a journal: one block, one write, one fsync."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import write_atomic
from steelyard.safety.battery import Battery
from steelyard.safety.journal.lines import (
    CanaryLine,
    End,
    Entry,
    Generated,
    Generation,
    Plan,
    Scored,
    ScoreLine,
    Stopped,
    dump_line,
    key_of,
)
from steelyard.safety.journal.planned import expected_keys
from steelyard.safety.journal.reading import Journal, read_journal


class JournalWriter:
    """Appends blocks to a journal. Holds a lock on the file: two processes cannot write one journal.

    `batch` is the next batch to work on; `generations` are its generations where they are there and only its scores are
    missing (else None); `done` where nothing is left to write.
    """

    def __init__(self, path: Path, journal: Journal, handle: int) -> None:
        self.path, self.plan, self._handle = path, journal.plan, handle
        self._take(journal)

    def _take(self, journal: Journal) -> None:
        self._found = journal
        self._running = hashlib.sha256(b"".join(line + b"\n" for line in journal.raw))
        self.entries: list[Entry] = list(journal.entries)
        self.done = journal.finished is not None
        self.batch = sum(isinstance(entry, Scored) for entry in self.entries)
        self.generations: list[Generation] | None = None
        if self.entries and isinstance(self.entries[-1], Generated):
            size = len(self.plan.batches[self.batch])
            self.generations = [entry for entry in self.entries[-1 - size : -1] if isinstance(entry, Generation)]

    @classmethod
    def create(cls, path: Path, plan: Plan) -> JournalWriter:
        """Start a journal with its plan. Raises SteelyardError where there is one already."""
        if path.exists():
            raise SteelyardError(f"{path} exists already: resume it, or give a new run folder")
        line = dump_line(plan)
        write_atomic(path, line)
        return cls(path, Journal(plan, (), (line[:-1],), False), _locked(path))

    @classmethod
    def resume(cls, path: Path, plan: Plan, battery: Battery, *, measured: bool = False) -> JournalWriter:
        """Go on with a journal: cut it back to its last closing line.

        `plan` is what would be planned now; run id, ledger event, attempt and start are the journal's own, and with
        `measured` all but what decides tokens and scores. Raises SteelyardError naming what differs, FormatError where
        a line before the torn block is damaged or out of place.
        """
        handle = _locked(path)
        try:
            journal = read_journal(path)
            differing = journal.plan.differences(plan, measured=measured)
            if differing:
                raise SteelyardError(
                    f"{path}: this run was started with another {', '.join(differing)}: go on with what it was started "
                    "with, or give a new run folder"
                )
            entries = list(journal.entries)
            while entries and not isinstance(entries[-1], Generated | Scored | Stopped | End):
                entries.pop()
            keys = [key_of(entry) for entry in entries if not isinstance(entry, Stopped)]
            for number, (found, wanted) in enumerate(zip(keys, expected_keys(journal.plan, battery), strict=False), 2):
                if found != wanted:
                    raise FormatError(f"{path}:{number}: not the line that the plan calls for: give a new run folder")
            raw = journal.raw[: len(entries) + 1]
            os.ftruncate(handle, sum(len(line) + 1 for line in raw))
            os.fsync(handle)
            return cls(path, Journal(journal.plan, tuple(entries), raw, False), handle)
        except BaseException:
            os.close(handle)
            raise

    @property
    def mark(self) -> tuple[int, str]:
        """How many lines there are, and the SHA-256 (hex) of the file up to here."""
        return len(self.entries) + 1, self._running.hexdigest()

    @property
    def plan_line(self) -> bytes:
        """Line 1 of the journal that was found, newline included."""
        return self._found.raw[0] + b"\n"

    @property
    def found_root(self) -> str:
        """The Merkle root of the journal that was found."""
        return self._found.root

    def back_to(self, lines: int, digest: str) -> None:
        """Cut the journal that was found back to its first `lines` lines, those noted elsewhere when they were written.

        At most one block may lie behind them, written but not noted before a crash. Raises SteelyardError where there
        is more, or `digest` is not that of these lines: somebody edited it.
        """
        raw, entries = self._found.raw[:lines], self._found.entries[: lines - 1]
        data = b"".join(line + b"\n" for line in raw)
        behind = self._found.entries[lines - 1 :]
        blocks = sum(isinstance(entry, Generated | Scored | Stopped | End) for entry in behind)
        if len(raw) != lines or hashlib.sha256(data).hexdigest() != digest or blocks > 1:
            raise SteelyardError(
                f"{self.path}: edited since the run was stopped: not the {lines:,} lines that the ledger noted: give a "
                "new run folder"
            )
        os.ftruncate(self._handle, len(data))
        os.fsync(self._handle)
        self._take(Journal(self.plan, entries, raw, False))

    def generated(self, generations: Sequence[Generation]) -> None:
        """Write the generations of the present batch as one durable block."""
        self._write([*generations, Generated(batch=self.batch)])
        self.generations = list(generations)

    def scored(self, lines: Sequence[ScoreLine | CanaryLine]) -> None:
        """Write the scores of the present batch as one durable block; the next batch becomes the present one."""
        self._write([*lines, Scored(batch=self.batch)])
        self.generations = None
        self.batch += 1

    def end(self, finished: str) -> None:
        """Close a whole run. `finished` is ISO 8601."""
        self._write([End(finished=finished)])
        self.done = True

    def stop(self, reason: str, finished: str) -> None:
        """Close a run that no committed policy could pass any more."""
        self._write([Stopped(reason=reason, finished=finished)])
        self.done = True

    def _write(self, lines: Iterable[Entry]) -> None:
        lines = list(lines)
        data = b"".join(map(dump_line, lines))
        block = memoryview(data)
        while block:
            block = block[os.write(self._handle, block) :]
        os.fsync(self._handle)
        self._running.update(data)
        self.entries.extend(lines)

    def close(self) -> None:
        os.close(self._handle)

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _locked(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise SteelyardError(f"{path}: another process is writing this run: wait for it to end") from error
    return handle

"""A journal in memory, and how it is read: bounded in lines, in length and in depth."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from steelyard.base.canonical import merkle_root
from steelyard.base.errors import FormatError
from steelyard.base.files import open_regular
from steelyard.safety.journal.lines import (
    End,
    Entry,
    Generated,
    Generation,
    Plan,
    Scored,
    Stopped,
    parse_line,
)

MAX_LINES = 4_000_000  # at .7 kB of memory each; 100,000 generations are 122,000 lines
MAX_FIRST_LINE = 16 * 2**20  # the plan names every probe: 70 kB for the largest battery
MAX_LINE = 4 * 2**20


@dataclass(frozen=True)
class Journal:
    """A journal in memory. `entries[i]` is line i + 2 of the file; `torn` where the file ends within a line."""

    plan: Plan
    entries: tuple[Entry, ...]
    raw: tuple[bytes, ...]
    torn: bool

    @cached_property
    def root(self) -> str:
        """Merkle root (hex) over all complete lines, as bytes without their newline."""
        return merkle_root(self.raw)

    @property
    def finished(self) -> str | None:
        """When the run ended (ISO 8601), or None where it did not."""
        last = self.entries[-1] if self.entries else None
        return last.finished if isinstance(last, End | Stopped) else None

    def marks(self) -> list[dict[str, Any]]:
        """What a run notes in the ledger after each block: batch, block (generated, scored), the number of lines up to
        its closing one, and the SHA-256 (hex) of the file up to there."""
        running, marks = hashlib.sha256(self.raw[0] + b"\n"), []
        for lines, (entry, raw) in enumerate(zip(self.entries, self.raw[1:], strict=True), 2):
            running.update(raw + b"\n")
            if isinstance(entry, Generated | Scored):
                marks.append({"batch": entry.batch, "block": entry.kind, "lines": lines, "root": running.hexdigest()})
        return marks

    def generations(self) -> list[Generation]:
        return [entry for entry in self.entries if isinstance(entry, Generation)]


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines with their newline (the last may lack one), bounded in length and number."""
    with open_regular(path) as file:
        for number in range(1, MAX_LINES + 2):
            limit = MAX_FIRST_LINE if number == 1 else MAX_LINE
            line = file.readline(limit + 1)
            if not line:
                return
            if len(line) > limit:
                raise FormatError(f"{path}:{number}: line longer than {limit:,} bytes: not a journal, or edited")
            yield line
    raise FormatError(f"{path}: more than {MAX_LINES:,} lines: not a journal")


def read_journal(path: Path) -> Journal:
    """Read and validate every line; whether the journal is complete is `check_journal`'s question.

    Raises FormatError naming file and line number.
    """
    plan: Plan | None = None
    entries: list[Entry] = []
    raw: list[bytes] = []
    torn = False
    try:
        for number, line in enumerate(_raw_lines(path), 1):
            if not line.endswith(b"\n"):
                torn = True
                break
            line = line[:-1]
            entry = parse_line(line, f"{path}:{number}")
            if isinstance(entry, Plan) != (number == 1):
                raise FormatError(f"{path}:{number}: a journal has its plan in line 1, and there alone")
            if isinstance(entry, Plan):
                plan = entry
            else:
                entries.append(entry)
            raw.append(line)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}: give the folder of a run") from error
    if plan is None:
        raise FormatError(f"{path}: holds no plan: not a journal, or empty")
    return Journal(plan, tuple(entries), tuple(raw), torn)


def read_plan(path: Path) -> Plan:
    """The plan alone, line 1. Raises FormatError."""
    try:
        line = next(_raw_lines(path), b"")
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}: give the folder of a run") from error
    plan = parse_line(line[:-1], f"{path}:1") if line.endswith(b"\n") else None
    if not isinstance(plan, Plan):
        raise FormatError(f"{path}: holds no plan: not a journal, or empty")
    return plan

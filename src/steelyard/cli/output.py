"""How results look on a terminal: one table style, one way to print JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import one_line as one_line

if TYPE_CHECKING:
    from steelyard.release.gate import Decision
    from steelyard.safety.pause import Paused


def print_json(value: Any) -> None:
    """Machine-readable output: one JSON document on standard output, in ASCII: a terminal may be where it ends, and a
    stranger's text in it."""
    print(json.dumps(value, indent=2, sort_keys=True))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; numbers are right-aligned by being in the columns after the first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(one_line(title)), box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in (0, len(columns) - 1) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    console = Console(width=None if os.isatty(1) else 150)
    console.print(table)


def print_criteria(title: str, criteria: Sequence[Mapping[str, Any]]) -> None:
    """One line a criterion: its bounds, threshold, sample and verdict. `criteria` as in a decision's JSON."""
    rows = [
        (c["name"], _bound(c["lower"]), _bound(c["upper"]), f"{c['threshold']:.3f}", str(c["n"]), c["status"])
        for c in criteria
    ]
    print_table(title, ("criterion", "lower 95%", "upper 95%", "threshold", "n", "verdict"), rows)


def print_decision(decision: Decision, bundle: Path | None, *, as_json: bool) -> None:
    """The gate's verdict with everything that led to it."""
    found = decision.model_dump(mode="json", exclude={"report"}) | {"bundle": str(bundle) if bundle else None}
    if as_json:
        print_json(found)
        return
    print_criteria(f"{decision.verdict} under policy {decision.policy}", found["criteria"])
    for finding in decision.findings:
        print(one_line(f"{finding.code}: {finding.message}"))
    for criterion in decision.criteria:
        if criterion.status in ("FAIL", "INCONCLUSIVE"):  # INCOMPLETE is a finding
            print(one_line(f"{criterion.status}: {criterion.reason}"))
    print(f"attempt: {decision.attempt or 'unknown'} on this model and test")
    print(one_line(f"probes in the training data: {decision.training_data}"))
    print(f"subject: {decision.subject}")
    print(f"bundle:  {bundle}" if bundle else "bundle:  none: only PASS opens the door")


def print_paused(paused: Paused, *, as_json: bool) -> None:
    """Which runs wait to be countersigned, and how they go on."""
    if as_json:
        print_json({"paused": {run: str(commitment) for run, commitment in paused.waiting.items()}})
    else:
        print(one_line(str(paused)))


def _bound(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def agree(yes: bool, question: str) -> None:
    """Ask on a terminal, unless it is a `yes` already. Raises SteelyardError for a no, UsageError without terminal."""
    if yes:
        return
    if not os.isatty(0):
        raise UsageError("no terminal to ask on: read the above, then give --yes")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise SteelyardError("not done: the answer was no")


def passphrase(file: Path | None, *, confirm: bool = False) -> bytes:
    """A key's passphrase: from `--passphrase-file`, else STEELYARD_PASSPHRASE, else a prompt on a terminal."""
    if file is not None:
        try:
            return file.read_bytes().rstrip(b"\r\n")
        except OSError as error:
            raise UsageError(f"--passphrase-file {file}: {error.strerror}") from error
    if value := os.environ.get("STEELYARD_PASSPHRASE"):
        return os.fsencode(value)
    if not os.isatty(0):
        raise UsageError("no passphrase: give --passphrase-file, set STEELYARD_PASSPHRASE, or run on a terminal")
    from getpass import getpass

    first = getpass("Passphrase: ")
    if confirm and getpass("Passphrase again: ") != first:
        raise UsageError("the two passphrases differ")
    return first.encode()

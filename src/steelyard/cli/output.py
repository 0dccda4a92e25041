"""How results look on a terminal: one table style, one way to print JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steelyard.base.errors import UsageError


def print_json(value: Any) -> None:
    """Machine-readable output: one JSON document on standard output."""
    print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; numbers are right-aligned by being in the columns after the first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in (0, len(columns) - 1) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(width=None if os.isatty(1) else 150)
    console.print(table)


def passphrase(file: Path | None, *, confirm: bool = False) -> bytes:
    """A key's passphrase: from `--passphrase-file`, else STEELYARD_PASSPHRASE, else a prompt on a terminal."""
    if file is not None:
        try:
            return file.read_bytes().rstrip(b"\r\n")
        except OSError as error:
            raise UsageError(f"--passphrase-file {file}: {error.strerror}") from error
    if value := os.environ.get("STEELYARD_PASSPHRASE"):
        return value.encode()
    if not os.isatty(0):
        raise UsageError("no passphrase: give --passphrase-file, set STEELYARD_PASSPHRASE, or run on a terminal")
    from getpass import getpass

    first = getpass("Passphrase: ")
    if confirm and getpass("Passphrase again: ") != first:
        raise UsageError("the two passphrases differ")
    return first.encode()

"""`steelyard ledger`: what happened, and whether anyone changed the record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steelyard.base.errors import UsageError
from steelyard.cli.options import WORKSPACE, AsJSON, Workspace
from steelyard.cli.output import print_json, print_table

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger

app = typer.Typer(no_args_is_help=True, help="Show and verify the hash-chained event log.", rich_markup_mode=None)


@app.command()
def show(
    kind: Annotated[str | None, typer.Option(help="Only events of this kind.")] = None,
    workspace: Workspace = WORKSPACE,
    as_json: AsJSON = False,
) -> None:
    """List the events, oldest first."""
    with _open(workspace) as ledger:
        events = ledger.events(kind)
    if as_json:
        print_json([vars(event) for event in events])
        return
    rows = [(str(e.seq), e.time, e.hash[:12], e.kind, _brief(e.payload)) for e in events]
    print_table("Ledger", ("seq", "time", "hash", "kind", "payload (whole with --json)"), rows)


def _brief(payload: Mapping[str, Any]) -> str:
    """A line for people: digests by their first digits, lists and objects by their sizes."""

    def brief(value: Any) -> str:
        if isinstance(value, list | dict):
            return f"({len(value)})"
        return value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else str(value)

    return ", ".join(f"{key} {brief(value)}" for key, value in payload.items())[:160]


@app.command()
def head(workspace: Workspace = WORKSPACE) -> None:
    """Print SEQ:HASH of the last event: note it elsewhere, and truncation will show."""
    with _open(workspace) as ledger:
        event = ledger.head()
    if event is None:
        raise UsageError("the ledger is empty: it has no head yet")
    print(f"{event.seq}:{event.hash}")


@app.command()
def verify(
    head: Annotated[str | None, typer.Option(help="SEQ:HASH noted elsewhere; must still be there.")] = None,
    workspace: Workspace = WORKSPACE,
) -> None:
    """Find any edit, deletion or reorder; with --head also truncation."""
    with _open(workspace) as ledger:
        count = ledger.verify(expected_head=head)
    print(f"{count} events, chain intact" + (f", head {head} present" if head else ""))


def _open(workspace: Path) -> Ledger:
    from steelyard.ledger.ledger import Ledger

    path = workspace / "ledger.sqlite"
    if not path.exists():
        raise UsageError(f"{path}: no ledger here: give --workspace")
    return Ledger(path, read_only=True)

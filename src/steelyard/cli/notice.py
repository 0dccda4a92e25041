"""`steelyard notice`: the dossier about a copy that was sighted, for a person to sign, and what became of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steelyard.base.errors import UsageError
from steelyard.cli.options import WORKSPACE, AsJSON, Workspace
from steelyard.cli.output import one_line, print_json


def notice(
    sighting: Annotated[str, typer.Argument(help="A sighting's number in the ledger, or its event's hash.")],
    kind: Annotated[str | None, typer.Option(help="takedown, withdrawal or abuse.")] = None,
    reason: Annotated[str, typer.Option(help="Why it was withdrawn, or what the abuse is; stands in the notice.")] = "",
    location: Annotated[
        list[str] | None,
        typer.Option(
            help="A place of the copy (a URL, a magnet link, an address) that the sighting lacks; may be repeated."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the notices.")] = Path("notices"),
    step: Annotated[
        str | None, typer.Option(help="Instead: note what became of it: sent, answered, removed, refused or closed.")
    ] = None,
    note: Annotated[str, typer.Option(help="With --step: a word on it, such as the host's case number.")] = "",
    workspace: Workspace = WORKSPACE,
    as_json: AsJSON = False,
) -> None:
    """Write a notice about a sighted copy, as HTML and Markdown, for a person to complete, sign and send. It names
    nobody's identity, and each step is noted in the ledger."""
    from steelyard.ledger.ledger import Ledger
    from steelyard.trace.notices import PAGE, find_sighting, record_step, write_notice

    if (kind is None) == (step is None):
        raise UsageError("give --kind to write a notice, or --step to note what became of one")
    path = workspace / "ledger.sqlite"
    if not path.exists():
        raise UsageError(f"{path}: no ledger here: give --workspace")
    with Ledger(path) as ledger:
        found = find_sighting(ledger, sighting)
        if step is not None:
            event = record_step(ledger, found, step, note)  # type: ignore[arg-type]  # checked there
            print_json({"noted": event.mark}) if as_json else print(f"noted: {step} (ledger event {event.mark})")
            return
        place = write_notice(ledger, found, str(kind), out, reason=reason, locations=location or ())  # type: ignore[arg-type]
    if as_json:
        print_json({"folder": str(place), "sighting": found.event.mark})
        return
    print(one_line(f"{place / PAGE}: unsigned: a person completes, signs and sends it"))

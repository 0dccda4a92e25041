"""`steelyard uncensored`: has a sighted copy lost the release's refusals, and how?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steelyard.base.errors import UsageError
from steelyard.cli.options import WORKSPACE, AsJSON, Workspace, existing_folder
from steelyard.cli.output import one_line, print_json


def uncensored(
    sighting: Annotated[str, typer.Argument(help="The copy's sighting: its number in the ledger, or its hash.")],
    suspect: Annotated[Path, typer.Argument(help="The copy: a model folder, a safetensors file or a GGUF.")],
    release: Annotated[Path, typer.Option(help="The release it was made from.", callback=existing_folder)],
    base: Annotated[
        Path | None, typer.Option(help="What the release was tuned from, if known.", callback=existing_folder)
    ] = None,
    scorer: Annotated[str, typer.Option(help="The scorer that hears refusals.")] = "embedded:refusal",
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Let neither model answer a prompt.")] = False,
    workspace: Workspace = WORKSPACE,
    as_json: AsJSON = False,
) -> None:
    """Compare a sighted copy with its release: is the refusal direction gone from its weights, and does it still
    decline what the release declines? The verdict is noted in the ledger."""
    from steelyard.base.progress import default_progress
    from steelyard.ledger.ledger import Ledger
    from steelyard.scorers.registry import open_scorer
    from steelyard.trace.examine import examine
    from steelyard.trace.notices import find_sighting

    if not suspect.exists():
        raise UsageError(f"{suspect}: no such file or folder")
    path = workspace / "ledger.sqlite"
    if not path.exists():
        raise UsageError(f"{path}: no ledger here: give --workspace")
    heard = None if weights_only else open_scorer(scorer)
    with Ledger(path) as ledger:
        found = examine(
            ledger,
            find_sighting(ledger, sighting),
            release,
            suspect,
            base=base,
            scorer=heard,
            progress=default_progress(as_json=as_json),
        )
    if as_json:
        print_json(found.event.payload | {"event": found.event.mark})
        return
    print(one_line(f"{found.judgement.verdict}: {found.judgement.why}"))
    if (answers := found.behaviour) is not None:
        said = f"of {answers.prompts} prompts the release declines {answers.release}, the copy {answers.suspect}"
        print(one_line(f"  {said}; {answers.lost} lost, {answers.gained} gained, p {answers.p_value:.2g}"))
    for said in (*found.undone, *found.limits):
        print(one_line(f"  {said}"))
    print(f"ledger event {found.event.mark}")

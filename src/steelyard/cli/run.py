"""`steelyard run RECIPE`: the recipe's stages in order, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steelyard.cli.options import WORKSPACE, AsJSON, PassphraseFile, Workspace
from steelyard.cli.output import passphrase, print_criteria, print_decision, print_json, print_paused, print_table


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe's .yaml.")],
    force: Annotated[list[str] | None, typer.Option(help="Do this stage again; may be repeated.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, with what is cached, and stop.")] = False,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """Do what the recipe says; what is done already and unchanged is checked and reused."""
    from steelyard.base.progress import default_progress
    from steelyard.recipe.runner import run_recipe
    from steelyard.release.refused import Refused
    from steelyard.safety.pause import Paused

    try:
        results = run_recipe(
            recipe,
            workspace=workspace,
            force=set(force or ()),
            until=until,
            dry_run=dry_run,
            progress=default_progress(as_json=as_json),
            passphrase=lambda _name: passphrase(passphrase_file),
        )
    except Refused as refused:
        print_decision(refused.decision, None, as_json=as_json)
        print(f"report: {refused.run / 'report.html'}")
        raise
    except Paused as paused:
        print_paused(paused, as_json=as_json)
        return
    if as_json:
        print_json(
            [
                {
                    "stage": result.name,
                    "kind": result.kind,
                    "status": result.status,
                    "why": result.why,
                    "path": str(result.path) if result.path else None,
                    "seconds": round(result.seconds, 3),
                    "summary": result.summary,
                }
                for result in results
            ]
        )
        return
    rows = [(r.name, r.status, f"{r.seconds:.1f}", str(r.path or ""), r.why) for r in results]
    print_table(recipe.name, ("stage", "state", "seconds", "made", "why"), rows)
    for result in results:
        if result.kind == "release" and result.summary:
            found = result.summary
            print_criteria(f"{found['verdict']} under policy {found['policy']}", found["criteria"])
            print(f"subject: {found['subject']}\nreport:  {found['report']}\nbundle:  {found['bundle']}")
            print(f"verify:  steelyard verify {found['bundle']} --key {found['public_key']}")
    if not dry_run and all(result.status == "cached" for result in results):
        print("nothing to do: every stage is cached, and its files were hashed again")

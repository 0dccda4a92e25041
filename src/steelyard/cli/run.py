"""`steelyard run RECIPE`: the recipe's stages in order, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steelyard.cli.options import WORKSPACE, AsJSON, Workspace
from steelyard.cli.output import print_decision, print_json, print_table


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe's .yaml.")],
    force: Annotated[list[str] | None, typer.Option(help="Do this stage again; may be repeated.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, with what is cached, and stop.")] = False,
    workspace: Workspace = WORKSPACE,
    as_json: AsJSON = False,
) -> None:
    """Do what the recipe says; what is done already and unchanged is checked and reused."""
    from steelyard.base.progress import default_progress
    from steelyard.recipe.runner import run_recipe
    from steelyard.recipe.stages import Refused

"""`steelyard scorer`: train the embedded scorers and print their cards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steelyard.cli.options import AsJSON
from steelyard.cli.output import print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Train scorers and print their cards.", rich_markup_mode=None)

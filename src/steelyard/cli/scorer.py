"""`steelyard scorer`: train the embedded scorers and print their cards."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="Train scorers and print their cards.", rich_markup_mode=None)

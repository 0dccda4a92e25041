"""Options that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Workspace = Annotated[
    Path, typer.Option(help="Where the ledger, imported models, runs and the cache live.", envvar="STEELYARD_WORKSPACE")
]
AsJSON = Annotated[bool, typer.Option("--json", help="Machine-readable output; progress as JSON lines on stderr.")]
PassphraseFile = Annotated[
    Path | None, typer.Option(help="File holding the key's passphrase (else STEELYARD_PASSPHRASE, else a prompt).")
]
Keys = Annotated[Path | None, typer.Option(help="Folder of the keys; default: keys/ in the workspace.")]

WORKSPACE = Path(".steelyard")

"""Options that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steelyard.base.errors import UsageError


def existing_folder(path: Path | None) -> Path | None:
    """A callback for arguments and options that name a folder to read. Raises UsageError."""
    if path is not None and not path.is_dir():
        raise UsageError(f"{path}: {'is not a folder' if path.exists() else 'no such folder'}")
    return path


def existing_file(path: Path | None) -> Path | None:
    """The same for files."""
    if path is not None and not path.is_file():
        raise UsageError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
    return path


ModelFolder = Annotated[Path, typer.Argument(help="A model folder.", callback=existing_folder)]
Workspace = Annotated[
    Path, typer.Option(help="Where the ledger, imported models, runs and the cache live.", envvar="STEELYARD_WORKSPACE")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; needed where there is no terminal.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Machine-readable output; progress as JSON lines on stderr.")]
PassphraseFile = Annotated[
    Path | None, typer.Option(help="File holding the key's passphrase (else STEELYARD_PASSPHRASE, else a prompt).")
]
Keys = Annotated[Path | None, typer.Option(help="Folder of the keys; default: keys/ in the workspace.")]

WORKSPACE = Path(".steelyard")

"""`steelyard countersign`: another hand under what a run is about to do, before its first generation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.cli.options import WORKSPACE, Keys, PassphraseFile, Workspace, Yes, existing_folder
from steelyard.cli.output import agree, one_line, passphrase


def countersign(
    run: Annotated[Path, typer.Argument(help="The folder of the waiting run (or the commitment.json in it).")],
    key: Annotated[str | None, typer.Option(help="Name of the witness's key.")] = None,
    timestamp_url: Annotated[
        str | None, typer.Option(help="Address of an RFC 3161 authority, to stamp it instead of signing.")
    ] = None,
    timestamp_authority: Annotated[
        list[Path] | None, typer.Option(help="That authority's root certificate (PEM); may be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Default: commitment.dsse.json or commitment.tsr beside the commitment.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The model folder, if you have it: is it the committed one?", callback=existing_folder),
    ] = None,
    yes: Yes = False,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Show in words what a waiting run commits to, then sign it as its witness, or have it time-stamped."""
    from steelyard.base.files import new_file
    from steelyard.base.progress import default_progress
    from steelyard.model.identity import subject_of
    from steelyard.release.commitment import countersign as sign
    from steelyard.release.commitment_words import in_words
    from steelyard.release.keys import load_signer
    from steelyard.release.timestamps import ask, load_roots
    from steelyard.safety.pause import COMMITMENT, COUNTERSIGNATURE, TIMESTAMP, load_commitment

    if (key is None) == (timestamp_url is None):
        raise UsageError("give --key NAME (you are the witness), or --timestamp-url URL (an authority is)")
    path = run / COMMITMENT if run.is_dir() else run
    found, data = load_commitment(path)
    target = out or path.parent / (COUNTERSIGNATURE if key is not None else TIMESTAMP)
    if target.exists() or target.is_symlink():
        raise SteelyardError(f"{target} exists already: remove it or choose another place")
    for line in in_words(found, path.parent):
        print(one_line(line))
    if model is not None:
        if subject_of(model, default_progress()).digest != found.subject:
            raise SteelyardError(f"{model}: is not the model that is committed to, subject {found.subject}")
        print(one_line(f"the model in {model} is that subject"))
    agree(yes, "Countersign this?")
    if key is not None:
        made = sign(data, load_signer(keys or workspace / "keys", key, passphrase(passphrase_file)))
    else:
        assert timestamp_url is not None
        roots = [root for file in timestamp_authority or [] for root in load_roots(file)]
        made = ask(timestamp_url, data, roots)
    with new_file(target) as file:
        file.write_bytes(made)
    print(one_line(f"countersigned: {target}; it belongs beside the run's {COMMITMENT}, and then the run can go on"))

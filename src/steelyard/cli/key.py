"""`steelyard key`: the signing keys, encrypted at rest."""

from __future__ import annotations

from typing import Annotated

import typer

from steelyard.cli.options import WORKSPACE, AsJSON, Keys, PassphraseFile, Workspace
from steelyard.cli.output import passphrase, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Make, show, rotate and revoke signing keys.", rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="Name of the key.")]


@app.command()
def new(
    name: Name,
    throwaway: Annotated[bool, typer.Option(help="For trying things out; the public policy refuses it.")] = False,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make a P-256 key, encrypted with a passphrase of at least 12 characters."""
    from steelyard.release.keys import new_key

    folder = keys or workspace / "keys"
    info = new_key(folder, name, passphrase(passphrase_file, confirm=True), throwaway=throwaway)
    print(f"{info.name}: {info.keyid}\npublic key: {folder / (name + '.pub.pem')}")


@app.command()
def show(keys: Keys = None, workspace: Workspace = WORKSPACE, as_json: AsJSON = False) -> None:
    """List the keys and their state."""
    from steelyard.release.keys import list_keys

    infos = list_keys(keys or workspace / "keys")
    if as_json:
        print_json([info.model_dump(mode="json") for info in infos])
    else:
        rows = [(info.name, info.kind, info.status, info.created, info.keyid) for info in infos]
        print_table("Keys", ("name", "kind", "state", "created", "key id"), rows)


@app.command()
def rotate(
    name: Name,
    new_name: Annotated[str, typer.Argument(help="Name of the key that takes over.")],
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make a successor; the old key signs a statement naming it and signs nothing after that."""
    from steelyard.release.keys import rotate_key

    info = rotate_key(keys or workspace / "keys", name, new_name, passphrase(passphrase_file))
    print(f"{name} is succeeded by {info.name}: {info.keyid}")


@app.command()
def revoke(
    name: Name,
    reason: Annotated[str, typer.Option(help="Why; it stands in the signed revocation.")],
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign a revocation: give the printed file to everyone who verifies (`verify --revocations FILE`)."""
    from steelyard.release.keys import revoke_key

    print(revoke_key(keys or workspace / "keys", name, passphrase(passphrase_file), reason=reason))

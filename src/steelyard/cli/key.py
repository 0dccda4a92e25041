"""`steelyard key`: the signing keys, encrypted at rest. See docs/keys.md."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from steelyard.base.errors import UsageError
from steelyard.cli.options import WORKSPACE, AsJSON, Keys, PassphraseFile, Workspace
from steelyard.cli.output import passphrase, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Make, show, back up, rotate, revoke signing keys.", rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="Name of the key.")]


class Type(StrEnum):
    """Types of keys."""

    p256 = "p256"
    ed25519 = "ed25519"


@app.command()
def new(
    name: Name,
    key_type: Annotated[
        Type, typer.Option("--type", help="p256 signs everything; ed25519 signs statements, but no model signature.")
    ] = Type.p256,
    throwaway: Annotated[bool, typer.Option(help="For trying things out; the public policy refuses it.")] = False,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make a key, encrypted with a passphrase of at least 12 characters, and a revocation to be kept apart from it."""
    from steelyard.release.keys import new_key, spare_of

    folder = keys or workspace / "keys"
    info = new_key(
        folder, name, passphrase(passphrase_file, confirm=True), throwaway=throwaway, key_type=key_type.value
    )
    print(f"{info.name}: {info.keyid}\npublic key: {folder / (name + '.pub.pem')}")
    print(f"spare revocation: {spare_of(folder, name)} (move it to another place; it ends the key, see docs/keys.md)")


@app.command()
def show(keys: Keys = None, workspace: Workspace = WORKSPACE, as_json: AsJSON = False) -> None:
    """List the keys and their state."""
    from steelyard.release.keys import list_keys

    infos = list_keys(keys or workspace / "keys")
    if as_json:
        print_json([info.model_dump(mode="json") for info in infos])
    else:
        rows = [(info.name, info.type, info.kind, info.status, info.created, info.keyid) for info in infos]
        print_table("Keys", ("name", "type", "kind", "state", "created", "key id"), rows)


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
    reason: Annotated[str | None, typer.Option(help="Why; it stands in the signed revocation.")] = None,
    spare: Annotated[
        Path | None, typer.Option(help="The revocation made with the key: for a key that nobody can open any more.")
    ] = None,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign a revocation: give the printed file to everyone who verifies (`verify --revocations FILE`)."""
    from steelyard.release.keys import revoke_key, revoke_with_spare

    folder = keys or workspace / "keys"
    if (reason is None) == (spare is None):
        raise UsageError("give --reason, or --spare FILE with the revocation made with the key (not both)")
    if spare is not None:
        print(revoke_with_spare(folder, name, spare))
    elif reason is not None:
        print(revoke_key(folder, name, passphrase(passphrase_file), reason=reason))


@app.command()
def export(
    name: Name,
    out: Annotated[Path, typer.Argument(help="New file for the public key; with --private a new folder.")],
    private: Annotated[bool, typer.Option("--private", help="A backup: the private key, still encrypted.")] = False,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Write the public key for those who verify, or a backup of the whole key."""
    from steelyard.release.key_backup import export_backup, export_public_key

    folder = keys or workspace / "keys"
    if private:
        print(export_backup(folder, name, out, passphrase(passphrase_file)))
    else:
        print(export_public_key(folder, name, out))


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A backup's folder, or a PEM file with an encrypted private key.")],
    name: Annotated[str | None, typer.Option(help="Name of the key; default: the backup's.")] = None,
    throwaway: Annotated[bool, typer.Option(help="Of a PEM file: for trying things out.")] = False,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Take over a key; what ended a key in a backup ends it here too."""
    from steelyard.release.key_backup import import_key

    given = passphrase(passphrase_file)
    info = import_key(keys or workspace / "keys", source, given, name=name, throwaway=throwaway)
    print(f"{info.name}: {info.keyid}, {info.status}")

"""What the commands of `steelyard grant` share: options, the ledger and book of a workspace, keys, questions."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steelyard.base.errors import UsageError
from steelyard.cli.options import existing_file, existing_folder
from steelyard.cli.output import passphrase, print_table

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

    from steelyard.ledger.ledger import Ledger
    from steelyard.release.grant_book import Book, Grant, Request
    from steelyard.release.grant_request import Sealed
    from steelyard.release.keys import KeyInfo

RequestId = Annotated[str, typer.Argument(metavar="REQUEST", help="Id of a request: r-...")]
GrantId = Annotated[str, typer.Argument(metavar="GRANT", help="Id of a grant: g-...")]
Bundle = Annotated[
    Path, typer.Option("--release", help="The bundle that access is granted to.", callback=existing_folder)
]
Licence = Annotated[
    Path | None,
    typer.Option(help="The licence's text; default: LICENSE in the bundle.", callback=existing_file),
]
OwnTrust = Annotated[
    Path, typer.Option(help="Your trust file, with grants: {reviewers: [...], needed: 2}.", callback=existing_file)
]
SigningKey = Annotated[str, typer.Option("--key", help="Name of the signing key.")]
SigningPassphrase = Annotated[
    Path | None, typer.Option(help="File holding the signing key's passphrase; default: that of the grants' keys.")
]
Retain = Annotated[int, typer.Option("--retain", help="Days to keep the identity, after the grant's end.")]


def open_ledger(workspace: Path, *, read_only: bool = False) -> Ledger:
    """The workspace's ledger. Raises UsageError where there is none: a grant belongs where its release was made."""
    from steelyard.ledger.ledger import Ledger

    path = workspace / "ledger.sqlite"
    if not path.exists():
        raise UsageError(f"{path}: no ledger here: give the --workspace in which the release was made")
    return Ledger(path, read_only=read_only)


def book_of(workspace: Path, ledger: Ledger) -> Book:
    """The grants of a workspace."""
    from steelyard.release.grant_book import Book

    return Book(workspace / "grants", ledger)


def opened(workspace: Path, ledger: Ledger, request: str, file: Path | None) -> tuple[Book, Request, Sealed]:
    """A request and what it says."""
    from steelyard.release.grant_keys import load_identity_key

    book = book_of(workspace, ledger)
    found = book.request(request, datetime.now(UTC))
    return book, found, book.open(found, load_identity_key(book.keys, passphrase(file)))


def licence_text(bundle: Path, file: Path | None) -> bytes:
    """The licence that recipients accept."""
    from steelyard.release.grant_copy import licence_of

    return licence_of(bundle, file)


def signing(folder: Path, name: str, file: Path | None) -> tuple[CryptoSigner, KeyInfo]:
    """A signing key, and its card."""
    from steelyard.release.keys import load_signer, show_key

    card = show_key(folder, name)
    return load_signer(folder, name, passphrase(file)), card


def print_request(request: Request, sealed: Sealed) -> None:
    """Who asks, for what."""
    rows: list[tuple[str, str]] = [("weights", sealed.wanted.weights), ("subject", sealed.wanted.subject)]
    fields: dict[str, Any] = {} if sealed.person is None else sealed.person.model_dump(exclude_none=True)
    rows += [(name, str(value)) for name, value in fields.items()] or [("recipient", sealed.who())]
    rows.append(("erased", f"{request.retain.days} days after the grant's end"))
    print_table(f"Request {request.id}", ("what", "value"), rows)


def print_grant(grant: Grant) -> None:
    """What a witness countersigns; nothing of who asked."""
    rows = [("weights", grant.wanted.weights), ("subject", grant.wanted.subject), ("request", grant.request)]
    rows += [("code's commitment", grant.code), ("commitment", grant.commitment)]
    rows += [("issued", f"{grant.issued:%Y-%m-%d %H:%M:%SZ}"), ("expires", f"{grant.expires:%Y-%m-%d}")]
    print_table(f"Grant {grant.id}", ("what", "value"), rows)

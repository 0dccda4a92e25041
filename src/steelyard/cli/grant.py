"""`steelyard grant`: access case by case. Requests, reviews, grants; `granted` has what is done with copies."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steelyard.base.errors import UsageError
from steelyard.cli import granted
from steelyard.cli.granting import (
    Bundle,
    GrantId,
    Licence,
    OwnTrust,
    RequestId,
    Retain,
    SigningKey,
    SigningPassphrase,
    book_of,
    licence_text,
    open_ledger,
    opened,
    print_grant,
    print_request,
    signing,
)
from steelyard.cli.options import WORKSPACE, AsJSON, Keys, PassphraseFile, Workspace, Yes, existing_file
from steelyard.cli.output import agree, one_line, passphrase, print_json, print_table

if TYPE_CHECKING:
    from steelyard.release.grant_request import Sealed

app = typer.Typer(
    no_args_is_help=True,
    help="Grant access case by case, by marked copies that name their grant. See docs/grants.md.",
    rich_markup_mode=None,
)
key_app = typer.Typer(no_args_is_help=True, help="The keys of granting.", rich_markup_mode=None)
app.add_typer(key_app, name="key")


class Decision(StrEnum):
    """A reviewer's word."""

    approve = "approve"
    refuse = "refuse"


@key_app.command("new")
def key_new(workspace: Workspace = WORKSPACE, passphrase_file: PassphraseFile = None) -> None:
    """Make the two keys of granting, encrypted: what copies are marked with, and what identities are read with."""
    from steelyard.release.grant_keys import new_grant_keys

    with open_ledger(workspace) as ledger:
        folder = workspace / "grants" / "keys"
        made = new_grant_keys(folder, passphrase(passphrase_file, confirm=True), ledger)
    print(f"mark key: {made} (its fingerprint)")
    print(f"in {folder}: keep a copy of it apart; without it no copy can be traced or made again")


@key_app.command("recipient")
def key_recipient(
    stem: Annotated[Path, typer.Argument(metavar="NAME", help="NAME.key.pem and NAME.pub.pem are written.")],
    passphrase_file: PassphraseFile = None,
) -> None:
    """For who asks for access: make a key that a copy is sealed to; the .pub.pem goes into the request."""
    from steelyard.release.grant_sealed import new_recipient

    new_recipient(stem, passphrase(passphrase_file, confirm=True))
    print(one_line(f"public key, for the request (encrypts_to): {stem}.pub.pem"))


@app.command()
def request(
    file: Annotated[Path, typer.Option("--from", help="The request, JSON or YAML.", callback=existing_file)],
    release: Bundle,
    licence: Licence = None,
    retain: Retain = 365,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """Enter a request for access. Who asks is sealed; the ledger gets an id, digests and times."""
    from steelyard.release.grant_copy import wanted_of
    from steelyard.release.grant_request import Sealed, read_person

    sealed = Sealed.new(wanted_of(release), read_person(file))
    _enter(sealed, release, licence, retain, workspace, passphrase_file, as_json)


@app.command()
def public(
    release: Bundle,
    licence: Licence = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """Ask for the public's copy, which is reviewed like any other: then mark it, test it whole, and release it."""
    from steelyard.release.grant_copy import wanted_of
    from steelyard.release.grant_request import Sealed

    _enter(Sealed.new(wanted_of(release), None), release, licence, 365, workspace, passphrase_file, as_json)


def _enter(
    sealed: Sealed,
    release: Path,
    licence: Path | None,
    retain: int,
    workspace: Path,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    from steelyard.base.canonical import sha256_hex
    from steelyard.release.grant_keys import load_identity_key
    from steelyard.release.grants import enter

    with open_ledger(workspace) as ledger:
        book = book_of(workspace, ledger)
        private = load_identity_key(book.keys, passphrase(passphrase_file))
        digest = sha256_hex(licence_text(release, licence))
        found = enter(book, sealed, licence=digest, private=private, retain=timedelta(days=retain))
    if as_json:
        print_json({"request": found.id, "digest": found.digest, "erase_at": found.due.isoformat()})
    else:
        print(f"request {found.id}; erased {retain} days after its end (steelyard grant forget --due)")
        print(f"next, by two reviewers: steelyard grant review {found.id} --key NAME --trust trust.yaml")


@app.command("import")
def import_(
    repository: Annotated[str, typer.Argument(help="A gated repository of yours: hf://ORG/NAME.")],
    release: Bundle,
    licence: Licence = None,
    retain: Retain = 365,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """Take over the requests that wait on the Hub; they stay pending there."""
    from steelyard.base.canonical import sha256_hex
    from steelyard.base.progress import default_progress
    from steelyard.release.grant_copy import wanted_of
    from steelyard.release.grant_hub import import_requests
    from steelyard.release.grant_keys import load_identity_key
    from steelyard.release.hub_client import HubClient
    from steelyard.release.publish import parse_destination

    where = parse_destination(repository)
    if where.repository is None:
        raise UsageError(f"{repository}: give a repository on the Hub: hf://ORG/NAME")
    with open_ledger(workspace) as ledger, HubClient(where.repository, default_progress(as_json=as_json)) as client:
        book = book_of(workspace, ledger)
        found = import_requests(
            book,
            client,
            wanted_of(release),
            licence=sha256_hex(licence_text(release, licence)),
            private=load_identity_key(book.keys, passphrase(passphrase_file)),
            retain=timedelta(days=retain),
        )
    if as_json:
        left = [{"id": one, "reason": reason} for one, reason in found.left_out]
        print_json({"entered": [one.id for one in found.entered], "already": found.already, "left_out": left})
        return
    print(f"entered: {', '.join(one.id for one in found.entered) or 'none'}; there already: {found.already}")
    for one, reason in found.left_out:
        print(one_line(f"left out: {one}: {reason}"))


@app.command("list")
def list_(workspace: Workspace = WORKSPACE, as_json: AsJSON = False) -> None:
    """All requests and grants, by id: what the ledger knows."""
    now = datetime.now(UTC)
    with open_ledger(workspace, read_only=True) as ledger:
        book = book_of(workspace, ledger)
        requests, grants = book.requests(now), {grant.id: grant for grant in book.grants(now)}
    rows = []
    for one in requests:
        grant = grants.get(one.grant or "")
        state = one.state if grant is None else grant.state
        rows.append(
            {
                "request": one.id,
                "grant": one.grant,
                "state": state,
                "since": one.time.isoformat(timespec="seconds"),
                "until": None if grant is None else grant.expires.isoformat(),
                "erase_at": None if one.state == "forgotten" else one.due.isoformat(timespec="seconds"),
                "forgotten": one.state == "forgotten",
                "weights": one.wanted.weights,
                "public": one.public,
            }
        )
    if as_json:
        print_json(rows)
        return
    columns = ("request", "grant", "since", "until", "state")
    shown = []
    for row in rows:
        who = f"erased at {row['erase_at']}" if row["erase_at"] else "forgotten"
        shown.append([*(str(row[name] or "") for name in columns), who])
    print_table("Grants", (*columns, "who asked"), shown)


@app.command()
def show(
    request: RequestId,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """Who asks, for what: for reviewers, and whoever must find out whose grant (g-...) a mark names."""
    with open_ledger(workspace, read_only=True) as ledger:
        if request.startswith("g-"):
            request = book_of(workspace, ledger).grant(request, datetime.now(UTC)).request
        _, found, sealed = opened(workspace, ledger, request, passphrase_file)
    if as_json:
        print_json(sealed.model_dump(mode="json", exclude={"salt"}))
    else:
        print_request(found, sealed)


@app.command()
def review(
    request: RequestId,
    key: SigningKey,
    trust: OwnTrust,
    decision: Annotated[Decision, typer.Option(help="Your word.")] = Decision.approve,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the grant may last; the fewest count.")] = 365,
    yes: Yes = False,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    signing_passphrase_file: SigningPassphrase = None,
) -> None:
    """A reviewer's part: show the request, and sign your word on it. One key is one person."""
    from steelyard.release.grants import review as add_review
    from steelyard.release.trust import load_trust

    mine = load_trust(trust)
    with open_ledger(workspace) as ledger:
        book, found, sealed = opened(workspace, ledger, request, passphrase_file)
        print_request(found, sealed)
        agree(yes, f"{decision.value} this, for {days} days?")
        signer, card = signing(keys or workspace / "keys", key, signing_passphrase_file or passphrase_file)
        path = add_review(book, found, sealed, decision.value, days=days, signer=signer, card=card, trust=mine)
    print(one_line(f"reviewed: {path}"))


@app.command()
def issue(
    request: RequestId,
    trust: OwnTrust,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """Make a grant of a request with enough approvals, and the commitment to its code."""
    from steelyard.release.grant_keys import load_mark_key
    from steelyard.release.grants import issue as make
    from steelyard.release.trust import load_trust

    mine = load_trust(trust)
    with open_ledger(workspace) as ledger:
        book, found, sealed = opened(workspace, ledger, request, passphrase_file)
        grant = make(book, found, sealed, load_mark_key(book.keys, passphrase(passphrase_file)), mine)
        path = book.grant_folder(grant.id) / "commitment.json"
    if as_json:
        print_json({"grant": grant.id, "expires": grant.expires.isoformat(), "commitment": str(path)})
    else:
        print(one_line(f"grant {grant.id}, until {grant.expires:%Y-%m-%d}; commitment: {path}"))
        print(f"next, by a witness: steelyard grant countersign {grant.id} --key NAME --trust trust.yaml")


@app.command()
def countersign(
    grant: GrantId,
    trust: OwnTrust,
    key: Annotated[str | None, typer.Option(help="Name of the witness's key.")] = None,
    timestamp_url: Annotated[
        str | None, typer.Option(help="Address of an RFC 3161 authority, to stamp it instead of signing.")
    ] = None,
    yes: Yes = False,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
) -> None:
    """A witness's part: show what a grant commits to and sign it, or have it time-stamped, before the copy is made."""
    from steelyard.release.grants import countersign as add
    from steelyard.release.trust import load_trust

    if (key is None) == (timestamp_url is None):
        raise UsageError("give --key NAME (you are the witness), or --timestamp-url URL (an authority is)")
    mine = load_trust(trust)
    with open_ledger(workspace) as ledger:
        book = book_of(workspace, ledger)
        print_grant(book.grant(grant, datetime.now(UTC)))
        agree(yes, "Countersign this?")
        if key is not None:
            path = add(book, grant, trust=mine, signer=signing(keys or workspace / "keys", key, passphrase_file)[0])
        else:
            path = add(book, grant, trust=mine, url=timestamp_url or "")
    print(one_line(f"countersigned: {path}"))


@app.command()
def revoke(
    grant: GrantId,
    key: SigningKey,
    trust: OwnTrust,
    reason: Annotated[str, typer.Option(help="Goes into the signed statement, not into the ledger.")],
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
) -> None:
    """End a grant now; writes a signed statement for all who check its copies."""
    from steelyard.release.grants import revoke as end
    from steelyard.release.trust import load_trust

    mine = load_trust(trust)
    signer, _ = signing(keys or workspace / "keys", key, passphrase_file)
    with open_ledger(workspace) as ledger:
        path = end(book_of(workspace, ledger), grant, reason, signer=signer, trust=mine)
    print(one_line(f"revoked: {path}; hand it to whoever checks copies (steelyard grant verify --revoked)"))


@app.command()
def forget(
    request: Annotated[str | None, typer.Argument(metavar="REQUEST", help="Id of a request: r-...")] = None,
    due: Annotated[bool, typer.Option("--due", help="All whose time of retention is over.")] = False,
    workspace: Workspace = WORKSPACE,
) -> None:
    """Erase who asked. The ids, the reviews and the grant stay; nothing says any more whose they were."""
    from steelyard.release.grants import forget as erase

    if (request is None) != due:
        raise UsageError("give the id of one request, or --due")
    with open_ledger(workspace) as ledger:
        erased = erase(book_of(workspace, ledger), request)
    print(f"forgotten: {', '.join(erased) or 'none'}")


for _command in (granted.deliver, granted.mark, granted.verify, granted.receipt, granted.name):
    app.command()(_command)
app.command("open")(granted.open_)

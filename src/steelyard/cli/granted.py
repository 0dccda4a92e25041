"""`steelyard grant deliver`, `mark`, `open`, `verify`, `receipt`, `name`: what is done with the copies of grants."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steelyard.base.errors import UsageError
from steelyard.cli.granting import (
    Bundle,
    GrantId,
    Licence,
    OwnTrust,
    SigningKey,
    SigningPassphrase,
    book_of,
    open_ledger,
    signing,
)
from steelyard.cli.options import WORKSPACE, AsJSON, Keys, PassphraseFile, Workspace, existing_file, existing_folder
from steelyard.cli.output import one_line, passphrase, print_json, print_table

if TYPE_CHECKING:
    from steelyard.release.grant_verify import CopyVerification

Copy = Annotated[Path, typer.Argument(help="The folder of a marked copy.", callback=existing_folder)]


def deliver(
    grant: GrantId,
    release: Bundle,
    to: Annotated[Path, typer.Option(help="The copy to write; must not exist.")],
    key: SigningKey,
    trust: OwnTrust,
    licence: Licence = None,
    text: Annotated[
        Path | None, typer.Option(help="Measure perplexity on this text (needs torch).", callback=existing_file)
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="A finished safety run on this copy with the release as predecessor.", callback=existing_folder
        ),
    ] = None,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    signing_passphrase_file: SigningPassphrase = None,
    as_json: AsJSON = False,
) -> None:
    """The releaser's part: write the marked copy, attested as derived from the tested release; one sealed file where
    the request names a key."""
    from steelyard.base.progress import default_progress
    from steelyard.release.grant_deliver import Keys as Hands
    from steelyard.release.grant_deliver import Measure
    from steelyard.release.grant_deliver import deliver as write_copy
    from steelyard.release.grant_keys import load_identity_key, load_mark_key
    from steelyard.release.trust import load_trust

    mine, secret = load_trust(trust), passphrase(passphrase_file)
    signer, card = signing(keys or workspace / "keys", key, signing_passphrase_file or passphrase_file)
    with open_ledger(workspace) as ledger:
        book = book_of(workspace, ledger)
        hands = Hands(load_mark_key(book.keys, secret), load_identity_key(book.keys, secret), signer, card)
        done = write_copy(
            book,
            grant,
            release,
            to,
            keys=hands,
            trust=mine,
            licence=licence,
            measure=Measure(text, run),
            progress=default_progress(as_json=as_json),
        )
    if as_json:
        copy = done.copy.model_dump(mode="json", by_alias=True, exclude_none=True)
        print_json({"place": str(done.place), "sealed": done.sealed, "copy": copy})
        return
    change = done.copy.bound.relative_change
    print(one_line(f"delivered: {done.place}{' (sealed to the recipient)' if done.sealed else ''}"))
    print(f"derived from tested subject {done.copy.derived_from.subject}, relative change {change:.3g}; not a release")


def mark(
    grant: GrantId,
    release: Bundle,
    to: Annotated[Path, typer.Option(help="The model folder to write; must not exist.")],
    trust: OwnTrust,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """Write the marked model alone, which nothing attests: to measure it, or to test and release the public's copy."""
    from steelyard.base.progress import default_progress
    from steelyard.release.grant_deliver import mark_only
    from steelyard.release.grant_keys import load_mark_key
    from steelyard.release.trust import load_trust

    mine = load_trust(trust)
    with open_ledger(workspace) as ledger:
        book = book_of(workspace, ledger)
        secret = load_mark_key(book.keys, passphrase(passphrase_file))
        progress = default_progress(as_json=as_json)
        change = mark_only(book, grant, release, to, mark=secret, trust=mine, progress=progress)
    if as_json:
        print_json({"place": str(to), "relative_change": change})
    else:
        print(one_line(f"marked: {to}, relative change {change:.3g}; nothing of it was tested"))


def open_(
    sealed: Annotated[Path, typer.Argument(help="The file that was delivered.", callback=existing_file)],
    key_file: Annotated[Path, typer.Option("--key-file", help="Your NAME.key.pem.", callback=existing_file)],
    to: Annotated[Path, typer.Option(help="The folder to write; must not exist.")],
    passphrase_file: PassphraseFile = None,
) -> None:
    """The recipient's part: open a sealed copy. Then verify it, and sign its receipt."""
    from steelyard.release.grant_sealed import load_recipient
    from steelyard.release.grant_transport import unpack

    unpack(sealed, load_recipient(key_file, passphrase(passphrase_file)), to)
    print(one_line(f"opened: {to}; check it: steelyard grant verify {to} --trust trust.yaml"))


def verify(
    copy: Copy,
    trust: OwnTrust,
    revoked: Annotated[
        list[Path] | None, typer.Option(help="A signed revocation of a grant; may be repeated.", callback=None)
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Check a marked copy offline, with your own trust file. It is never a tested release."""
    from steelyard.base.progress import default_progress
    from steelyard.release.grant_verify import verify_copy
    from steelyard.release.trust import load_trust

    found = verify_copy(copy, load_trust(trust), revoked=revoked or [], progress=default_progress(as_json=as_json))
    if as_json:
        print_json(found.model_dump(mode="json", by_alias=True, exclude_none=True))
    else:
        _print(copy, found)
    if not found.ok:
        raise typer.Exit(1)


def receipt(
    copy: Annotated[Path | None, typer.Argument(help="The folder of the copy.", callback=existing_folder)] = None,
    key: Annotated[str | None, typer.Option(help="Name of the key that the request named (signs_with).")] = None,
    trust: Annotated[
        Path | None, typer.Option(help="Your trust file, to check the copy.", callback=existing_file)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The receipt to write; must not exist.")] = None,
    check: Annotated[
        Path | None, typer.Option("--check", help="Check a receipt instead, and keep it.", callback=existing_file)
    ] = None,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
) -> None:
    """The recipient signs that a copy arrived whole; the releaser checks that with --check."""
    from steelyard.base.files import new_file
    from steelyard.release.grant_keys import load_identity_key
    from steelyard.release.grant_transport import check_receipt
    from steelyard.release.grant_transport import receipt as sign_receipt
    from steelyard.release.grant_verify import verify_copy
    from steelyard.release.trust import load_trust

    if check is not None:
        if copy is not None or key is not None:
            raise UsageError("--check takes the receipt alone")
        with open_ledger(workspace) as ledger:
            book = book_of(workspace, ledger)
            grant = check_receipt(book, check, load_identity_key(book.keys, passphrase(passphrase_file)))
        print(f"receipt of grant {grant}: signed by the key that its request named")
        return
    if copy is None or key is None or trust is None or out is None:
        raise UsageError("give COPY, --key, --trust and --out to sign a receipt, or --check FILE to check one")
    signer, _ = signing(keys or workspace / "keys", key, passphrase_file)
    made = sign_receipt(verify_copy(copy, load_trust(trust)), signer)
    with new_file(out) as file:
        file.write_bytes(made)
    print(one_line(f"receipt: {out}; send it back"))


def name(
    suspect: Annotated[Path, typer.Argument(help="A folder, safetensors or GGUF that was found.")],
    release: Bundle,
    out: Annotated[Path, typer.Option(help="The folder to write evidence.json and evidence.md to; must not exist.")],
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """Whose copy is it? Names a grant only where an innocent one would be named once in 10^9, else nobody."""
    from steelyard.base.files import new_folder
    from steelyard.base.progress import default_progress
    from steelyard.release.grant_keys import load_mark_key
    from steelyard.release.grant_name import name_grant

    with open_ledger(workspace) as ledger, new_folder(out) as folder:
        book = book_of(workspace, ledger)
        secret = load_mark_key(book.keys, passphrase(passphrase_file))
        progress = default_progress(as_json=as_json)
        found = name_grant(book, suspect, release, secret, now=datetime.now(UTC), progress=progress)
        (folder / "evidence.json").write_bytes(found.to_json())
        (folder / "evidence.md").write_bytes(found.to_markdown().encode())
        for one in found.named:
            (folder / one.grant.id).mkdir()
            for name, data in one.papers.items():
                (folder / one.grant.id / name).write_bytes(data)
    if as_json:
        print_json(found.to_dict() | {"sighting": found.sighting})
    elif found.named:
        print(one_line(f"named: {', '.join(one.grant.id for one in found.named)}; evidence: {out}"))
        print(f"sighting {found.sighting}; next: steelyard notice {found.sighting} --kind takedown --location URL")
    else:
        print(one_line(f"nobody named, of {found.grants:,} grants; evidence: {out}"))


def _print(copy: Path, found: CopyVerification) -> None:
    said = found.copy_
    if said is not None:
        bound, rows = said.bound, [("grant", said.grant), ("until", said.expires)]
        rows += [("who asked", f"erased {said.retain_days} days after its end")]
        rows += [("derived from", f"{said.derived_from.name}, subject {said.derived_from.subject}")]
        rows += [("relative change", f"{bound.relative_change:.3g}")]
        if bound.perplexity is not None:
            rows += [("perplexity", f"{bound.perplexity.copy_:.4f}, was {bound.perplexity.original:.4f}")]
        if bound.battery is not None:
            rows += [(one.metric, f"{one.copy_:.4f}, was {one.original:.4f}") for one in bound.battery.differences]
        print_table(str(copy), ("what", "value"), rows)
    for finding in found.findings:
        print(one_line(f"{finding.code}: {finding.message}"))
    ended = {finding.code for finding in found.findings}
    bad = " AND ".join(sorted(ended)).upper() if ended <= {"expired", "revoked"} else "DOES NOT VERIFY"
    print(one_line(f"CHECKED: {found.says()}; not a release" if found.ok else f"{bad}: {copy}"))

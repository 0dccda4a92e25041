"""`steelyard withdraw` and `steelyard releases`: the signed list that reaches everyone, and what became of all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.cli.options import WORKSPACE, AsJSON, Keys, Workspace, existing_file
from steelyard.cli.output import one_line, passphrase, print_json, print_table

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

    from steelyard.base.progress import Progress
    from steelyard.release.takedown import Outcome as Taken
    from steelyard.release.takedown_hub import Access
    from steelyard.release.trust import Trust
    from steelyard.release.withdraw import Outcome, Place
    from steelyard.release.withdrawal import SignedList


def withdraw(
    release: Annotated[
        str | None, typer.Argument(help="A bundle's folder, the SHA-256 of its manifest, or a name in the ledger.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why; it stands in the signed list and in the notice.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="Name of a signing key; may be repeated.")] = None,
    list_file: Annotated[Path, typer.Option("--list", help="The list; serve it from any static host.")] = Path(
        "withdrawn.json"
    ),
    trust: Annotated[
        Path | None,
        typer.Option(
            help="Trust file whose withdrawal.signers and quorum count; without: all of --key.", callback=existing_file
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The list's name; needed for the first one.")] = None,
    expires: Annotated[
        str, typer.Option(help="How long the list holds, such as 30d or 12h: refresh it before.")
    ] = "30d",
    replaced_by: Annotated[str | None, typer.Option(help="The release to use instead, named like RELEASE.")] = None,
    weights: Annotated[str | None, typer.Option(help="Its weights root, where the ledger does not hold it.")] = None,
    sign: Annotated[
        Path | None, typer.Option(help="Add your signature to this proposal.", callback=existing_file)
    ] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Issue the same entries anew, with a new end.")] = False,
    notices: Annotated[
        Path | None, typer.Option(help="Folder for the notices; default: notices/ beside the list.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Where the list is served, for the notice.")] = None,
    hub: Annotated[str, typer.Option(help="What a repository on the Hub becomes: private, or gated.")] = "private",
    delete: Annotated[
        bool,
        typer.Option("--delete", help="Delete what published folders held of the release; else it is moved aside."),
    ] = False,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: Annotated[
        list[Path] | None, typer.Option(help="A file with the passphrase; one for all keys, or one for each in order.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Withdraw a release: a signed list, a notice, and what we published is taken down. Where the trust file asks for
    several signers, this writes a proposal, which the others sign with --sign; the last signature puts the list in
    place. Run the same command again after that, or after an interruption: it does what is left."""
    from steelyard.base.progress import default_progress
    from steelyard.ledger.ledger import Ledger
    from steelyard.release import withdraw as room
    from steelyard.release.targets import find_release

    if sum((release is not None, sign is not None, refresh)) != 1:
        raise UsageError("name a release to withdraw, or a proposal (--sign), or --refresh: one of the three")
    if release is not None and not (reason or "").strip():
        raise UsageError("a withdrawal needs a reason: give --reason")
    access = _access(hub)
    valid, chosen = _duration(expires), key or []
    if not chosen:
        raise UsageError("no key to sign with: give --key")
    mine = _trust(trust, keys or workspace / "keys", chosen)
    progress = default_progress(as_json=as_json)
    with Ledger(workspace / "ledger.sqlite") as ledger:
        place = room.Place(list_file, mine, ledger, name)
        if sign is not None:
            if not as_json:
                _show_proposal(room.read_proposal(sign))
            signers = _signers(keys or workspace / "keys", chosen, passphrase_file)
            outcome = room.sign_proposal(sign, place=place, signers=signers)
        elif refresh:
            signers = _signers(keys or workspace / "keys", chosen, passphrase_file)
            outcome = room.refresh(place=place, signers=signers, valid=valid)
        else:
            target = find_release(str(release), ledger, weights=weights, progress=progress)
            instead = None if replaced_by is None else find_release(replaced_by, ledger, progress=progress).manifest
            if instead == target.manifest:
                raise UsageError("--replaced-by: is the release that is withdrawn")
            signers = _signers(keys or workspace / "keys", chosen, passphrase_file)
            outcome = room.withdraw(target, str(reason), place=place, signers=signers, valid=valid, replaced_by=instead)
        taken: list[Taken] = []
        if outcome.state != "proposed":
            taken = _after(outcome, place, notices or list_file.parent / "notices", url, access, delete, progress)
    _print(outcome, taken, trusted=trust is not None, as_json=as_json)
    if not all(one.done for one in taken):
        raise typer.Exit(1)


def releases(
    list_file: Annotated[
        str | None,
        typer.Option(
            "--list", help="The signed list of withdrawn releases: a file or URL; default: the trust file's own."
        ),
    ] = None,
    trust: Annotated[
        Path | None, typer.Option(help="Trust file with the list's signers, and where it lies.", callback=existing_file)
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="A policy of your own, for the age at which a candidate expires.")
    ] = None,
    workspace: Workspace = WORKSPACE,
    as_json: AsJSON = False,
) -> None:
    """Show all releases of the workspace with their state: candidate, expired, released, published, withdrawn."""
    from datetime import UTC, datetime

    from steelyard.ledger.ledger import Ledger
    from steelyard.release.releases import releases as all_releases
    from steelyard.safety.policy import load_policy

    now = datetime.now(UTC)
    signed = _read(list_file, trust)
    path = workspace / "ledger.sqlite"
    if not path.exists():
        raise UsageError(f"{path}: no ledger here: give --workspace")
    policies = [load_policy(one) for one in ("preview", "public", *(policy or []))]
    with Ledger(path, read_only=True) as ledger:
        found = all_releases(ledger, signed, policies, now)
    if as_json:
        print_json([one.model_dump(mode="json") for one in found])
        return
    rows = [
        (one.name, one.manifest[:16], one.released or one.attested or "", ", ".join(one.published), one.state)
        for one in found
    ]
    print_table("Releases", ("name", "manifest", "since", "published to", "state"), rows)
    for one in found:
        if one.withdrawn is not None:
            print(one_line(f"{one.name} {one.manifest[:16]}: withdrawn at {one.withdrawn}: {one.reason}"))
        if one.publishing:
            print(one_line(f"{one.name} {one.manifest[:16]}: half published to {', '.join(one.publishing)}"))
        left = [place for place in one.published if one.withdrawn is not None and place not in one.taken_down]
        if left:
            print(one_line(f"{one.name} {one.manifest[:16]}: withdrawn, not taken down yet: {', '.join(left)}"))
    if signed is not None and signed.expires <= now:
        print(one_line(f"the list: expired at {signed.content.expires}: issue it anew (steelyard withdraw --refresh)"))


def _read(list_file: str | None, trust: Path | None) -> SignedList | None:
    """The list that was named, or else the one that the trust file names; None where neither does."""
    from steelyard.release.trust import load_trust
    from steelyard.release.withdrawal import LIST_LIMIT, check_quorum, read_list
    from steelyard.release.withdrawal_source import read_source

    if list_file is None and trust is None:
        return None
    if trust is None:
        raise UsageError("--list: give --trust as well, whose withdrawal.signers the list must be signed by")
    mine = load_trust(trust)
    source = list_file or mine.withdrawal.source
    if source is None:
        raise UsageError(f"{trust}: names no list (withdrawal.list): give --list")
    signed = read_list(*read_source(source, LIST_LIMIT))
    for finding in check_quorum(signed, mine):
        raise SteelyardError(finding.message)
    return signed


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,4})([dh])", text)
    if match is None or not int(match[1]):
        raise UsageError(f"--expires {text!r}: write a number of days or hours, such as 30d or 12h")
    return timedelta(hours=int(match[1]) * (24 if match[2] == "d" else 1))


def _access(hub: str) -> Access:
    if hub == "private":
        return "private"
    if hub == "gated":
        return "gated"
    raise UsageError(f"--hub {hub!r}: private or gated")


def _trust(path: Path | None, folder: Path, names: Sequence[str]) -> Trust:
    """The trust file; without one, all the keys named must sign."""
    from steelyard.release.keys import load_public_key, show_key
    from steelyard.release.trust import Withdrawal, load_trust, one_key

    if path is not None:
        return load_trust(path)
    public = {}
    for name in names:
        show_key(folder, name)
        loaded = load_public_key(folder / f"{name}.pub.pem")
        public[loaded.keyid] = loaded
    keys = tuple(public.values())
    return one_key(keys, None, withdrawal=Withdrawal(keys, len(keys)))


def _signers(folder: Path, names: Sequence[str], files: Sequence[Path] | None) -> list[CryptoSigner]:
    from steelyard.release.keys import load_signer, show_key

    given = list(files or [])
    if len(given) not in (0, 1, len(names)):
        raise UsageError(f"--passphrase-file: give one, or one for each of the {len(names)} keys")
    signers = {}
    for index, name in enumerate(names):
        show_key(folder, name)
        file = None if not given else given[index % len(given)]
        signer = load_signer(folder, name, passphrase(file))
        signers[signer.public_key.keyid] = signer
    return list(signers.values())


def _after(
    outcome: Outcome,
    place: Place,
    notices: Path,
    url: str | None,
    access: Access,
    delete: bool,
    progress: Progress,
) -> list[Taken]:
    """Notices of all that is withdrawn, and whatever of it is still up is taken down."""
    from steelyard.base.files import write_atomic
    from steelyard.release.notice import Notice, notice_html, notice_markdown
    from steelyard.release.takedown import take_down

    taken: list[Taken] = []
    for entry in outcome.signed.content.entries:
        notice = Notice.of(entry, url)
        write_atomic(notices / f"{notice.stem}.html", notice_html(notice).encode())
        write_atomic(notices / f"{notice.stem}.md", notice_markdown(notice).encode())
        taken += take_down(notice, ledger=place.ledger, delete=delete, access=access, progress=progress)
    return taken


def _show_proposal(signed: SignedList) -> None:
    content = signed.content
    print(one_line(f"{content.name}, number {content.sequence}, issued {content.issued}, until {content.expires}"))
    rows = [(entry.name, entry.manifest, entry.time, entry.reason) for entry in content.entries]
    print_table("Withdrawn by this list", ("name", "manifest", "time", "reason"), rows)


def _print(outcome: Outcome, taken: Sequence[Taken], *, trusted: bool, as_json: bool) -> None:
    content = outcome.signed.content
    if as_json:
        found: dict[str, Any] = {
            "state": outcome.state,
            "file": str(outcome.file),
            "missing": outcome.missing,
            "list": content.model_dump(mode="json"),
            "digest": outcome.signed.digest,
            "taken_down": [vars(one) for one in taken],
        }
        print_json(found)
        return
    if outcome.state == "proposed":
        print(
            one_line(f"proposal: {outcome.file}, needs {outcome.missing} more signature(s); nothing is withdrawn yet")
        )
        to = str(outcome.file).removesuffix(".proposal")
        print(
            one_line(
                f"the others sign it: steelyard withdraw --sign {outcome.file} --list {to} --key NAME --trust FILE"
            )
        )
        return
    names = ", ".join(entry.name for entry in content.entries) or "none"
    said = "is in place already" if outcome.state == "already" else "is in place"
    print(one_line(f"list {content.name}, number {content.sequence}, {said}: {outcome.file}"))
    print(
        one_line(f"withdrawn: {names}; holds until {content.expires}: refresh it before (steelyard withdraw --refresh)")
    )
    if not trusted:
        print("signed by the keys given: whoever asks for other signers or more of them will refuse it (--trust)")
    for one in taken:
        print(one_line(f"{'NOT taken down' if one.state == 'failed' else one.state}: {one.destination}: {one.detail}"))

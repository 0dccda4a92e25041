"""`steelyard release`, `attest`, `approve`, `seal`, `verify`: the gate, the people who sign, the stranger's check."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steelyard.cli.options import WORKSPACE, AsJSON, Keys, PassphraseFile, Workspace, existing_file, existing_folder
from steelyard.cli.output import one_line, passphrase, print_decision, print_json, print_table

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

    from steelyard.release.bundle import Released
    from steelyard.release.keys import KeyInfo
    from steelyard.release.signers import Signing
    from steelyard.release.verify import Verification

Run = Annotated[Path, typer.Argument(help="The folder of a finished safety run.", callback=existing_folder)]
Model = Annotated[Path, typer.Option(help="The model folder that was tested.", callback=existing_folder)]
Candidate = Annotated[Path, typer.Argument(help="The folder that attest wrote.", callback=existing_folder)]
SigningKey = Annotated[str, typer.Option(help="Name of the signing key.")]
PolicyName = Annotated[str, typer.Option(help="preview, public, or a policy's .yaml.")]
OwnTrust = Annotated[
    Path, typer.Option(help="Your trust file: whose keys may evaluate, approve and release.", callback=existing_file)
]
MaybeTrust = Annotated[
    Path | None, typer.Option(help="Your trust file: whose countersignature counts.", callback=existing_file)
]
LicenseId = Annotated[
    str | None,
    typer.Option("--license", help="apache-2.0, mit, ..., or other; default: what the model's README.md states."),
]
LicenseName = Annotated[str | None, typer.Option(help="With --license other: its name.")]
LicenseLink = Annotated[str | None, typer.Option(help="With --license other: https://..., or the file LICENSE.")]
BaseModel = Annotated[str | None, typer.Option(help="The base model's id on the Hub, for the model card.")]
Repository = Annotated[str | None, typer.Option(help="The id on the Hub that it will have, for the model card.")]
Certificates = Annotated[
    Path | None,
    typer.Option(help="PEM: your certificate, then those up to the root that others pin.", callback=existing_file),
]
Sigstore = Annotated[
    bool, typer.Option("--sigstore", help="Have Sigstore sign the files instead of the key (needs the network).")
]
Predecessor = Annotated[
    Path | None, typer.Option(help="The predecessor's model folder; needed only where a server answered for it.")
]


def release(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The bundle to write; must not exist.")],
    model: Model,
    key: SigningKey,
    policy: PolicyName = "preview",
    predecessor: Predecessor = None,
    trust: MaybeTrust = None,
    license_: LicenseId = None,
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    base_model: BaseModel = None,
    repository: Repository = None,
    certificates: Certificates = None,
    sigstore: Sigstore = False,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """Let the gate decide; write the signed bundle on PASS, and nothing on anything else (exit code 1). One person's
    way: where the policy wants several, attest, approve and seal."""
    from steelyard.release.bundle import write_bundle
    from steelyard.release.signers import Signing

    _put_to_the_gate(
        write_bundle,
        run,
        out,
        model,
        policy=policy,
        predecessor=predecessor,
        trust=trust,
        stated=(license_, license_name, license_link, base_model, repository),
        how=Signing(certificates, sigstore),
        signing=(keys or workspace / "keys", key, passphrase_file),
        workspace=workspace,
        as_json=as_json,
    )


def attest(
    run: Run,
    candidate: Annotated[Path, typer.Argument(help="The candidate to write; must not exist.")],
    model: Model,
    key: SigningKey,
    policy: PolicyName = "public",
    name: Annotated[
        str | None, typer.Option(help="What the release will be called; default: the name of the candidate's folder.")
    ] = None,
    predecessor: Predecessor = None,
    trust: MaybeTrust = None,
    license_: LicenseId = None,
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    base_model: BaseModel = None,
    repository: Repository = None,
    certificates: Certificates = None,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """The evaluator's part of a release: let the gate decide, and on PASS write a candidate, which does not verify
    until it is approved and sealed."""
    from steelyard.release.bundle import attest as write_candidate
    from steelyard.release.signers import Signing

    _put_to_the_gate(
        partial(write_candidate, name=name),
        run,
        candidate,
        model,
        policy=policy,
        predecessor=predecessor,
        trust=trust,
        stated=(license_, license_name, license_link, base_model, repository),
        how=Signing(certificates),
        signing=(keys or workspace / "keys", key, passphrase_file),
        workspace=workspace,
        as_json=as_json,
    )


def _put_to_the_gate(
    write: Callable[..., Released],
    run: Path,
    out: Path,
    model: Path,
    *,
    policy: str,
    predecessor: Path | None,
    trust: Path | None,
    stated: tuple[str | None, str | None, str | None, str | None, str | None],
    how: Signing,
    signing: tuple[Path, str, Path | None],
    workspace: Path,
    as_json: bool,
) -> None:
    """Have `write` ask the gate and write `out` on PASS; print the decision, and exit with 1 on any other. `stated` as
    `about_model` takes it, `signing` as `_signing` does."""
    from steelyard.base.progress import default_progress
    from steelyard.ledger.ledger import Ledger
    from steelyard.release.refused import Refused
    from steelyard.release.trust import load_trust
    from steelyard.release.writing import about_model
    from steelyard.safety.policy import load_policy

    chosen, mine = load_policy(policy), None if trust is None else load_trust(trust)
    about = about_model(*stated)
    signer, card = _signing(*signing)
    with Ledger(workspace / "ledger.sqlite") as ledger:
        try:
            decision = write(
                run=run,
                model=model,
                policy=chosen,
                ledger=ledger,
                signer=signer,
                key=card,
                predecessor=predecessor,
                trust=mine,
                about=about,
                how=how,
                out=out,
                progress=default_progress(as_json=as_json),
            ).decision
        except Refused as refused:
            decision = refused.decision
    print_decision(decision, out if decision.verdict == "PASS" else None, as_json=as_json)
    if decision.verdict != "PASS":
        raise typer.Exit(1)


def approve(
    candidate: Candidate,
    key: SigningKey,
    trust: OwnTrust,
    certificates: Certificates = None,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """An approver's part of a release: check the candidate with your own trust file, and add your signed approval."""
    from steelyard.base.progress import default_progress
    from steelyard.release.bundle import approve as add_approval
    from steelyard.release.signers import Signing
    from steelyard.release.trust import load_trust

    mine = load_trust(trust)
    signer, card = _signing(keys or workspace / "keys", key, passphrase_file)
    progress = default_progress(as_json=as_json)
    how = Signing(certificates)
    added = add_approval(candidate, signer=signer, key=card, trust=mine, how=how, progress=progress)
    if as_json:
        print_json({"approval": str(added)})
    else:
        print(one_line(f"approved: {added}"))


def seal(
    candidate: Candidate,
    out: Annotated[Path, typer.Argument(help="The bundle to write, under the name attested; must not exist.")],
    key: SigningKey,
    trust: OwnTrust,
    certificates: Certificates = None,
    sigstore: Sigstore = False,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """The releaser's part: check candidate and approvals with your own trust file, sign the summary and the files, and
    write the bundle, which has verified. The workspace should be the one it was tested in, whose ledger notes it."""
    from steelyard.base.progress import default_progress
    from steelyard.ledger.ledger import Ledger
    from steelyard.release.bundle import seal as write_sealed
    from steelyard.release.signers import Signing
    from steelyard.release.trust import load_trust

    mine = load_trust(trust)
    signer, card = _signing(keys or workspace / "keys", key, passphrase_file)
    progress = default_progress(as_json=as_json)
    with Ledger(workspace / "ledger.sqlite") as ledger:
        how = Signing(certificates, sigstore)
        found = write_sealed(
            candidate, out, signer=signer, key=card, trust=mine, ledger=ledger, how=how, progress=progress
        )
    _print_verification(out, found, as_json=as_json)


def verify(
    bundle: Annotated[Path, typer.Argument(help="A released folder.", callback=existing_folder)],
    key: Annotated[
        list[Path] | None,
        typer.Option(help="A public key of your own choosing (PEM), which may hold every role; may be repeated."),
    ] = None,
    trust: Annotated[
        Path | None, typer.Option(help="Your trust file, in the place of --key.", callback=existing_file)
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="The policy you hold it to; default: the trust file's, else the packaged one of its name."),
    ] = None,
    revocations: Annotated[list[Path] | None, typer.Option(help="A signed revocation; may be repeated.")] = None,
    withdrawn: Annotated[
        str | None, typer.Option("--list", help="The signed list of withdrawn releases: a file or an https URL.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Where the last list seen is remembered; default: in your data folder.")
    ] = None,
    replay: Annotated[int, typer.Option(min=0, help="Regenerate this many random journal entries (needs torch).")] = 0,
    as_json: AsJSON = False,
) -> None:
    """Check a bundle offline, without torch; every mismatch is named. Without --key or --trust: list what is there,
    exit 1."""
    from steelyard.base.progress import default_progress
    from steelyard.release.verify import verify_bundle

    result = verify_bundle(
        bundle,
        keys=key or [],
        trust=trust,
        policy=policy,
        revocations=revocations or [],
        withdrawn=withdrawn,
        state=state,
        replay=replay,
        progress=default_progress(as_json=as_json),
    )
    _print_verification(bundle, result, as_json=as_json)
    if not result.ok:
        raise typer.Exit(1)


def _signing(folder: Path, name: str, passphrase_file: Path | None) -> tuple[CryptoSigner, KeyInfo]:
    from steelyard.release.keys import load_signer, show_key

    card = show_key(folder, name)
    return load_signer(folder, name, passphrase(passphrase_file)), card


def _print_verification(bundle: Path, result: Verification, *, as_json: bool) -> None:
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    said = "value" if result.ok else "what it says of itself: claimed, not verified"
    print_table(str(bundle), ("what", said), result.seen)
    for finding in result.findings:
        print(one_line(f"{finding.code}: {finding.message}"))
    if any(finding.code == "copy" for finding in result.findings):
        print("NOT A RELEASE")
    else:
        print("VERIFIED" if result.ok else "NOT VERIFIED")

"""`steelyard release` and `steelyard verify`: the gate, the bundle, and the stranger's check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steelyard.cli.options import WORKSPACE, AsJSON, Keys, PassphraseFile, Workspace, existing_folder
from steelyard.cli.output import one_line, passphrase, print_decision, print_json, print_table


def release(
    run: Annotated[Path, typer.Argument(help="The folder of a finished safety run.", callback=existing_folder)],
    out: Annotated[Path, typer.Argument(help="The bundle to write; must not exist.")],
    model: Annotated[Path, typer.Option(help="The model folder that was tested.", callback=existing_folder)],
    key: Annotated[str, typer.Option(help="Name of the signing key.")],
    policy: Annotated[str, typer.Option(help="preview, public, or a policy's .yaml.")] = "preview",
    predecessor: Annotated[
        Path | None, typer.Option(help="The predecessor's model folder; needed only where a server answered for it.")
    ] = None,
    keys: Keys = None,
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJSON = False,
) -> None:
    """Let the gate decide; write the signed bundle on PASS, and nothing on anything else (exit code 1)."""
    from steelyard.base.progress import default_progress
    from steelyard.ledger.ledger import Ledger
    from steelyard.release.bundle import write_bundle
    from steelyard.release.keys import load_signer, show_key
    from steelyard.release.refused import Refused
    from steelyard.safety.policy import load_policy

    folder, progress = keys or workspace / "keys", default_progress(as_json=as_json)
    chosen = load_policy(policy)
    card = show_key(folder, key)
    signer = load_signer(folder, key, passphrase(passphrase_file))
    with Ledger(workspace / "ledger.sqlite") as ledger:
        try:
            decision = write_bundle(
                run=run,
                model=model,
                policy=chosen,
                ledger=ledger,
                signer=signer,
                key=card,
                predecessor=predecessor,
                out=out,
                progress=progress,
            ).decision
        except Refused as refused:
            decision = refused.decision
    print_decision(decision, out if decision.verdict == "PASS" else None, as_json=as_json)
    if decision.verdict != "PASS":
        raise typer.Exit(1)


def verify(
    bundle: Annotated[Path, typer.Argument(help="A released folder.", callback=existing_folder)],
    key: Annotated[
        list[Path] | None, typer.Option(help="A public key of your own choosing (PEM); may be repeated.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="The policy you hold it to; default: the packaged one of the bundle's name.")
    ] = None,
    revocations: Annotated[list[Path] | None, typer.Option(help="A signed revocation; may be repeated.")] = None,
    replay: Annotated[int, typer.Option(min=0, help="Regenerate this many random journal entries (needs torch).")] = 0,
    as_json: AsJSON = False,
) -> None:
    """Check a bundle offline, without torch; every mismatch is named. Without --key: list what is there, exit 1."""
    from steelyard.base.progress import default_progress
    from steelyard.release.verify import verify_bundle

    result = verify_bundle(
        bundle,
        keys=key or [],
        policy=policy,
        revocations=revocations or [],
        replay=replay,
        progress=default_progress(as_json=as_json),
    )
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        print_table(str(bundle), ("what", "value"), result.seen)
        for finding in result.findings:
            print(one_line(f"{finding.code}: {finding.message}"))
        print("VERIFIED" if result.ok else "NOT VERIFIED")
    if not result.ok:
        raise typer.Exit(1)

"""`steelyard publish`: a verified bundle, to a folder or to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from steelyard.base.errors import UsageError
from steelyard.cli.options import WORKSPACE, AsJSON, Workspace, existing_folder
from steelyard.cli.output import print_json


def publish(
    bundle: Annotated[Path, typer.Argument(help="A released folder.", callback=existing_folder)],
    to: Annotated[str, typer.Option(help="The folder to make, or hf://ORG/NAME.")],
    trust: Annotated[Path | None, typer.Option(help="Your trust.yaml: whom you trust, for what.")] = None,
    key: Annotated[
        list[Path] | None, typer.Option(help="In its place: a public key that you trust (PEM); may be repeated.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="The policy that the bundle must hold to.")] = None,
    revocations: Annotated[list[Path] | None, typer.Option(help="A signed revocation; may be repeated.")] = None,
    withdrawn: Annotated[
        str | None, typer.Option("--list", help="The signed list of withdrawn releases: a file or a URL.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Where the last list seen is remembered; default: in the workspace.")
    ] = None,
    gated: Annotated[
        Literal["auto", "manual"] | None,
        typer.Option(help="Who wants the repository must ask: granted at once, or by you."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Keep the repository private; else it is public once it is whole.")
    ] = False,
    recipient: Annotated[str | None, typer.Option(help="Publish to the private repository ORG/NAME-RECIPIENT.")] = None,
    workspace: Workspace = WORKSPACE,
    as_json: AsJSON = False,
) -> None:
    """Publish a bundle that verifies. Interrupted, the same command goes on; half of a release never verifies.

    A token for the Hub is taken from HF_TOKEN or `hf auth login`, as the Hub's own tools do.
    """
    from dataclasses import asdict

    from steelyard.base.progress import default_progress
    from steelyard.ledger.ledger import Ledger
    from steelyard.release.publish import parse_destination
    from steelyard.release.publish import publish as publish_bundle
    from steelyard.release.verify import Verification, verify_bundle

    if (trust is None) == (not key):
        raise UsageError("whom do you trust? Give --trust FILE, or --key PEM (not both)")
    parse_destination(to, recipient)
    progress = default_progress(as_json=as_json)

    def check(folder: Path) -> Verification:
        return verify_bundle(
            folder,
            keys=key or [],
            policy=policy,
            trust=trust,
            revocations=revocations or [],
            withdrawn=withdrawn,
            state=state or workspace / "lists.json",
            progress=progress,
        )

    with Ledger(workspace / "ledger.sqlite") as ledger:
        published = publish_bundle(
            bundle,
            to,
            check=check,
            ledger=ledger,
            gated=gated,
            private=private,
            recipient=recipient,
            progress=progress,
        )
    if as_json:
        print_json(asdict(published))
        return
    print(f"{'was published already' if published.already else 'published'}: {published.destination}")
    print(f"manifest: {published.manifest}")
    if published.tag is not None:
        print(f"tag:      {published.tag} at {published.commit}")

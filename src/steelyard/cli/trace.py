"""`steelyard trace`: is this our model? And `steelyard trace register`: what suspects are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from steelyard.base.errors import FormatError, UsageError
from steelyard.cli.options import WORKSPACE, AsJSON, PassphraseFile, Workspace, existing_folder
from steelyard.cli.output import one_line, print_json, print_table

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Event
    from steelyard.trace.lineage import Answer


class _Group(typer.core.TyperGroup):
    """`steelyard trace SUSPECT` besides `steelyard trace register`: what is no command is a suspect."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["suspect", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help",):
            args = ["suspect", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Recognise copies: `steelyard trace SUSPECT`, or register what suspects are compared with.",
)


@app.command()
def suspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="SUSPECT",
            help="A model folder, safetensors, GGUF, .bin or .pt, a tree of them, a torrent, a Hub listing (.json).",
        ),
    ],
    full: Annotated[
        bool | None,
        typer.Option("--full/--sampled", help="Hash every tensor, or small ones only; default: up to 1 GiB every one."),
    ] = None,
    workspace: Workspace = WORKSPACE,
    as_json: AsJSON = False,
) -> None:
    """Compare a suspect with every registered model. `steelyard trace SUSPECT` is short for it."""
    from steelyard.base.progress import default_progress
    from steelyard.ledger.ledger import Ledger
    from steelyard.trace.lineage import UNREADABLE
    from steelyard.trace.registry import Registry
    from steelyard.trace.sightings import record
    from steelyard.trace.suspects import trace_all

    if not path.exists() and not path.is_symlink():
        raise UsageError(f"{path}: no such file or folder")
    database = workspace / "ledger.sqlite"
    if not database.exists():
        raise UsageError(f"{database}: no ledger here: give --workspace, or register a model first")
    with Ledger(database) as ledger:
        references = Registry.load(ledger).references
        if not references:
            raise UsageError(f"{database}: no model is registered: steelyard trace register MODEL --name NAME")
        answers = trace_all(path, references, full=full, progress=default_progress(as_json=as_json))
        sightings = [record(ledger, answer, references) for answer in answers]
    if as_json:
        numbers = [seen and seen.seq for seen in sightings]
        print_json([asdict(one) | {"sighting": number} for one, number in zip(answers, numbers, strict=True)])
    else:
        _print(answers, sightings)
    if all(one.verdict == UNREADABLE for one in answers):
        raise FormatError(answers[0].reason if len(answers) == 1 else f"{path}: none of its suspects can be read")


@app.command()
def register(
    model: Annotated[Path, typer.Argument(help="A model folder.", callback=existing_folder)],
    name: Annotated[str, typer.Option(help="What the model is called in answers.")],
    kind: Annotated[str, typer.Option(help="release: ours; base: a public model that ours was made from.")] = "release",
    workspace: Workspace = WORKSPACE,
    as_json: AsJSON = False,
) -> None:
    """Register a model: its digests, sampled rows and signatures are kept, and the ledger says since when."""
    from steelyard.base.progress import default_progress
    from steelyard.ledger.ledger import Ledger
    from steelyard.trace.registry import register as keep

    with Ledger(workspace / "ledger.sqlite") as ledger:
        event = keep(model, name, kind=kind, ledger=ledger, progress=default_progress(as_json=as_json))
    if as_json:
        print_json(vars(event))
    else:
        print(one_line(f"{name}: registered as {kind}, event {event.seq}, subject {event.payload['subject']}"))


@app.command()
def shuffle(
    model: Annotated[Path, typer.Argument(help="A model folder, before its test.", callback=existing_folder)],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    workspace: Workspace = WORKSPACE,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Put a model's neurons in a secret order, which makes the p-values of its copies exact. It computes the same, but
    is another subject: test and release the shuffled one. The order follows from the grants' key."""
    from steelyard.base.progress import default_progress
    from steelyard.cli.output import passphrase
    from steelyard.ledger.ledger import Ledger
    from steelyard.model.identity import subject_of
    from steelyard.release.grant_book import Book
    from steelyard.release.grant_keys import load_mark_key
    from steelyard.trace.transforms import order_commitment, permute_folder

    progress = default_progress()
    with Ledger(workspace / "ledger.sqlite") as ledger:
        key = load_mark_key(Book(workspace / "grants", ledger).keys, passphrase(passphrase_file))
        commitment = order_commitment(key.secret)
        permute_folder(model, out, key.secret, progress)
        before, after = subject_of(model, progress), subject_of(out, progress)
        said = {"from": before.digest, "subject": after.digest, "weights": after.weights, "order": commitment}
        ledger.append("trace.shuffled", said)
    print(one_line(f"shuffled: {out}, subject {after.digest}; order committed as {commitment}: test this one"))


def _print(answers: Sequence[Answer], sightings: Sequence[Event | None]) -> None:
    from steelyard.trace.lineage import UNRELATED

    if len(answers) > 1:
        rows = [
            (*_row(one), "" if seen is None else str(seen.seq)) for one, seen in zip(answers, sightings, strict=True)
        ]
        print_table("Suspects", ("suspect", "p", "MB read", "s", "verdict", "sighting"), rows)
        return
    answer = answers[0]
    rows = [
        (one.name, "" if one.distance is None else f"{one.distance:.4f}", _probability(one.log10_p), _verdict(one))
        for one in answer.relations
    ]
    if rows:
        print_table(answer.suspect, ("registered model", "distance", "p", "verdict"), rows)
    if any(one.log10_p < 0 for one in answer.relations):
        print(
            "p: of such evidence from an unrelated model, all tries counted; what it takes for granted: docs/tracing.md"
        )
    for one in answer.relations:
        if one.verdict != UNRELATED:
            print(one_line(f"{one.name}: " + "; ".join(one.evidence)))
    best = answer.nearest
    said = _verdict(best) + f" of {best.name}" if best is not None else answer.verdict
    print(one_line(f"{said}; {answer.bytes_read / 1e6:,.1f} MB read in {answer.seconds:.1f} s"))
    if (seen := sightings[0]) is not None:
        print(f"sighting {seen.seq}; next: steelyard notice {seen.seq} --kind takedown --location URL")


def _row(answer: Answer) -> tuple[str, ...]:
    best = answer.nearest
    said = answer.reason or answer.verdict if best is None else f"{_verdict(best)} of {best.name}"
    p = "" if best is None else _probability(best.log10_p)
    return answer.suspect, p, f"{answer.bytes_read / 1e6:,.1f}", f"{answer.seconds:.1f}", said


def _verdict(relation: Any) -> str:
    more = relation.changes and relation.changes != (relation.verdict,)
    said: str = relation.verdict + (f" ({', '.join(relation.changes)})" if more else "")
    return said


def _probability(log10_p: float) -> str:
    return "1" if log10_p >= 0 else f"{10**log10_p:.2g}" if log10_p > -4 else f"1e{log10_p:.0f}"

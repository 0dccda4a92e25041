"""`steelyard measure`: how two models differ on prompts and texts of one's own. It decides nothing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steelyard.cli.options import AsJSON, ModelFolder, existing_file, existing_folder
from steelyard.cli.output import print_json, print_table

if TYPE_CHECKING:
    from steelyard.safety.measure import Answer

app = typer.Typer(no_args_is_help=True, help="Compare two models' answers and perplexity.", rich_markup_mode=None)

Predecessor = Annotated[
    Path | None, typer.Option(help="The model folder to compare with, on the same prompts.", callback=existing_folder)
]


@app.command("compliance")
def compliance(
    model: ModelFolder,
    out: Annotated[Path, typer.Argument(help="Folder for the answers and the figures; a stopped run goes on there.")],
    prompts: Annotated[
        list[str], typer.Option(help="NAME=FILE:FIELD, or NAME=FILE:FIELD:OTHER=VALUE to choose rows; CSV or JSONL.")
    ],
    predecessor: Predecessor = None,
    gap: Annotated[
        str | None, typer.Option(help="HIGH,LOW: two sets whose rates of full refusal are compared.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    limit: Annotated[int | None, typer.Option(min=2, help="Prompts of a set, evenly spread over it.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Answer the prompts as the models ship, judge every answer, and give rates and paired differences."""
    from steelyard.base.errors import UsageError
    from steelyard.base.files import write_atomic
    from steelyard.base.progress import default_progress
    from steelyard.safety.measure import difference, read_prompts, sample, summarise

    progress = default_progress(as_json=as_json)
    sets = [sample(read_prompts(spec), limit) for spec in prompts]
    names = gap.split(",") if gap else []
    if gap and (len(names) != 2 or not set(names) <= {one.name for one in sets}):
        raise UsageError(f"--gap {gap}: give two of the sets, as HIGH,LOW (sets: {', '.join(s.name for s in sets)})")
    before = None if predecessor is None else _answers(predecessor, sets, max_tokens, out / "before.jsonl", progress)
    after = _answers(model, sets, max_tokens, out / "after.jsonl", progress)
    found: dict[str, Any] = {"sets": summarise(after, before)}
    if names:
        for side, answers in (("after", after), ("before", before)):
            if answers is not None:
                high, low = ([a.verdict == "refused" for a in answers if a.id.startswith(f"{n}/")] for n in names)
                found[f"gap_{side}"] = asdict(difference(high, low))
    import json

    write_atomic(out / "compliance.json", json.dumps(found, indent=2, sort_keys=True).encode())
    if as_json:
        print_json(found)
        return
    _show(found, names)


def _answers(folder: Path, sets: Any, max_tokens: int, path: Path, progress: Any) -> list[Answer]:
    from dataclasses import replace

    from steelyard.model.identity import subject_of
    from steelyard.safety.measure import answer_sets
    from steelyard.safety.shipped import shipped_sampling

    subject = subject_of(folder, progress)
    sampling = replace(shipped_sampling(folder), max_tokens=max_tokens)
    from steelyard.inference.local import LocalEndpoint

    return answer_sets(LocalEndpoint.open(folder), subject.digest, sets, sampling, path, progress)


def _show(found: dict[str, Any], gap: list[str]) -> None:
    from steelyard.safety.judge import VERDICTS
    from steelyard.safety.measure import Interval

    def cell(value: dict[str, float]) -> str:
        return Interval(**value).text

    rows = [
        (name, str(part["n"]), side, *(cell(part[side][verdict]) for verdict in VERDICTS))
        for name, part in found["sets"].items()
        for side in ("before", "after")
        if side in part
    ]
    print_table("answers by kind, 95% intervals", ("prompts", "n", "model", *VERDICTS), rows)
    changes = [
        (name, kind, cell(change["difference"]), cell(change["relative_fall"]) if "relative_fall" in change else "-")
        for name, part in found["sets"].items()
        for kind, change in part.get("change", {}).items()
    ]
    if changes:
        print_table("change on the same prompts", ("prompts", "kind", "difference", "relative fall"), changes)
    for side in ("before", "after"):
        if f"gap_{side}" in found:
            print(f"full refusals, {gap[0]} over {gap[1]}, {side}: {cell(found[f'gap_{side}'])}")


@app.command("perplexity")
def perplexity(
    model: ModelFolder,
    text: Annotated[Path, typer.Argument(help="A UTF-8 text file, or .gz.", callback=existing_file)],
    predecessor: Predecessor = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens read at once.")] = 1024,
    stride: Annotated[int, typer.Option(min=1, help="Tokens between windows: the others are context.")] = 512,
    as_json: AsJSON = False,
) -> None:
    """Perplexity per token and bits per byte, by sliding window, and how far they rose."""
    from steelyard.base.progress import default_progress
    from steelyard.safety.perplexity import perplexity as measured
    from steelyard.safety.perplexity import relative_rise

    progress = default_progress(as_json=as_json)
    sides = {"before": predecessor, "after": model}
    found = {
        side: measured(folder, text, progress, window=window, stride=stride)
        for side, folder in sides.items()
        if folder is not None
    }
    rise = relative_rise(found["before"], found["after"]) if len(found) == 2 else None
    if as_json:
        shown: dict[str, Any] = {side: asdict(one) | {"windows": len(one.windows)} for side, one in found.items()}
        print_json(shown | ({"relative_rise": asdict(rise)} if rise else {}))
        return
    rows = [
        (side, f"{one.tokens:,}", f"{one.per_token:.3f}", f"{one.bits_per_byte:.4f}", str(sides[side]))
        for side, one in found.items()
    ]
    print_table(f"{text.name}", ("model", "tokens", "perplexity", "bits/byte", "folder"), rows)
    if rise:
        print(f"perplexity rose by {rise.text}")


@app.command("draw")
def draw(
    out: Annotated[Path, typer.Argument(help="The folder of a measured comparison.")],
    sheet: Annotated[Path, typer.Argument(help="Where to write the sheet (JSON lines).")],
    count: Annotated[int, typer.Option(min=1, help="Answers of each model.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Draw answers for a person to read: shuffled, without the model's name or the judge's verdict."""
    from steelyard.safety.judge import VERDICTS
    from steelyard.safety.labels import draw_sheet

    lines = draw_sheet(_measured(out), count, seed, sheet)
    print(f"{sheet}: {lines} answers; fill in each label with one of: {', '.join(VERDICTS)}")


@app.command("agreement")
def agreement(
    out: Annotated[Path, typer.Argument(help="The folder of a measured comparison.")],
    sheet: Annotated[Path, typer.Argument(help="The sheet, labels filled in.")],
    as_json: AsJSON = False,
) -> None:
    """How far the judge agrees with the labels of a filled sheet."""
    from steelyard.safety.labels import score_sheet

    found = score_sheet(_measured(out), sheet)
    if as_json:
        print_json({model: asdict(one) for model, one in found.items()})
        return
    rows = [
        (model, str(one.n), f"{100 * one.agreement:.1f}%", "-" if one.kappa is None else f"{one.kappa:.2f}")
        for model, one in found.items()
    ]
    print_table("judge and labels", ("model", "n", "agreement", "kappa"), rows)
    table = [
        (label, ", ".join(f"{verdict} {count}" for verdict, count in row.items()))
        for label, row in found["all"].table.items()
    ]
    print_table("what the judge says of each label", ("label", "verdicts"), table)


def _measured(out: Path) -> dict[str, list[Answer]]:
    from steelyard.base.errors import UsageError
    from steelyard.safety.measure import read_answers

    found = {
        side: read_answers(out / f"{side}.jsonl") for side in ("before", "after") if (out / f"{side}.jsonl").exists()
    }
    if not found:
        raise UsageError(f"{out}: holds no answers: run steelyard measure compliance first")
    return found

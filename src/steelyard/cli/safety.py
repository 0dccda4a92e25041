"""`steelyard safety`: run the test, read its report again, draw completions for people to label."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steelyard.base.errors import UsageError
from steelyard.cli.options import WORKSPACE, AsJSON, ModelFolder, Workspace, existing_folder
from steelyard.cli.output import one_line, print_criteria, print_json, print_paused, print_table

if TYPE_CHECKING:
    from steelyard.safety.report import Report

app = typer.Typer(
    no_args_is_help=True,
    help="Run a battery on a model; report on a run; search its training data.",
    rich_markup_mode=None,
)


@app.command("battery")
def show_battery(
    name: Annotated[str, typer.Argument(help="quick, release, or a battery's .yaml.")], as_json: AsJSON = False
) -> None:
    """What a battery asks, and the digest by which a policy pins it."""
    from steelyard.safety.battery import load_battery

    battery = load_battery(name)
    rows = [
        (one.name, one.mode, len(one.probes), len({p.family for p in one.probes}), one.samples) for one in battery.sets
    ]
    if as_json:
        keys = ("name", "mode", "probes", "families", "samples")
        print_json(
            {
                "name": battery.name,
                "version": battery.version,
                "tier": battery.tier,
                "digest": battery.digest,
                "scorers": battery.scorers,
                "sets": [dict(zip(keys, row, strict=True)) for row in rows],
                "metrics": [metric.id for metric in battery.metrics],
            }
        )
        return
    print(f"{battery.name} version {battery.version}, tier {battery.tier}, digest {battery.digest}")
    print_table(
        "sets", ("set", "mode", "probes", "families", "samples"), [tuple(str(value) for value in row) for row in rows]
    )
    print(f"metrics: {', '.join(metric.id for metric in battery.metrics)}")


@app.command("run")
def run(
    model: ModelFolder,
    out: Annotated[Path, typer.Argument(help="The run's folder; a run that was stopped there is resumed.")],
    battery: Annotated[str, typer.Option(help="quick, or a battery's .yaml.")] = "quick",
    policy: Annotated[
        list[str] | None, typer.Option(help="preview, public, or a policy's .yaml; may be repeated. Default: preview.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible server that answers in the model's place.")
    ] = None,
    endpoint_model: Annotated[str, typer.Option(help="The model's name at that server.")] = "default",
    predecessor: Annotated[
        Path | None,
        typer.Option(
            help="The model folder it comes after: tested beside it, same prompts, same seeds.",
            callback=existing_folder,
        ),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            help="Also test these, each a subject of its own: int8, bf16, f16, f32, q4_0, q4_1, q5_0, q5_1, q8_0, "
            "NAME=FOLDER or NAME=FILE.gguf, with @http://HOST/v1 where a server answers; separated by commas.",
        ),
    ] = None,
    fail_fast: Annotated[bool, typer.Option(help="Stop as soon as the model has certainly failed.")] = False,
    countersign: Annotated[
        bool,
        typer.Option(
            "--countersign",
            help="Commit, and wait before the first generation until a witness has countersigned (steelyard "
            "countersign); then the same command goes on. Variants wait in their turn, all of them together.",
        ),
    ] = False,
    witness: Annotated[
        list[Path] | None,
        typer.Option(help="A witness's public key (PEM) to check the countersignature with now; may be repeated."),
    ] = None,
    timestamp_authority: Annotated[
        list[Path] | None,
        typer.Option(help="A time-stamping authority's root certificate (PEM), likewise; may be repeated."),
    ] = None,
    workspace: Workspace = WORKSPACE,
    as_json: AsJSON = False,
) -> None:
    """Commit battery and policy to the ledger, generate, score, journal, report. Resumes after a kill."""
    from steelyard.base.progress import default_progress
    from steelyard.inference.endpoint import Endpoint
    from steelyard.ledger.ledger import Ledger
    from steelyard.model.identity import subject_of
    from steelyard.release.commitment import looking_for
    from steelyard.release.keys import load_public_key
    from steelyard.release.timestamps import load_roots
    from steelyard.safety.battery import battery_folder, load_battery
    from steelyard.safety.pause import Paused
    from steelyard.safety.policy import load_policy
    from steelyard.safety.run import Job, Tested, run_battery
    from steelyard.safety.shipped import shipped_sampling
    from steelyard.safety.variant_models import parse_variants, run_variants
    from steelyard.scorers.registry import open_scorer

    progress = default_progress(as_json=as_json)
    look = None
    if countersign:
        roots = [root for file in timestamp_authority or [] for root in load_roots(file)]
        look = looking_for([load_public_key(file) for file in witness or []], roots)
    elif witness or timestamp_authority:
        raise UsageError("--witness and --timestamp-authority say who may countersign: give --countersign as well")
    others = () if variants is None else parse_variants(variants)
    chosen = load_battery(battery)
    policies = [load_policy(name) for name in policy or ["preview"]]
    folders = [model] if predecessor is None else [model, predecessor]
    subjects = [subject_of(folder, progress) for folder in folders]  # first: an unsafe folder is refused before torch

    def answering(folder: Path) -> Endpoint:
        if endpoint is None or folder != model:
            from steelyard.inference.local import LocalEndpoint

            return LocalEndpoint.open(folder)
        from steelyard.inference.openai import OpenAIEndpoint

        return OpenAIEndpoint(endpoint, endpoint_model)

    tested = [
        Tested(answering(folder), subject, shipped_sampling(folder))
        for folder, subject in zip(folders, subjects, strict=True)
    ]
    job = Job(
        candidate=tested[0],
        predecessor=tested[1] if predecessor is not None else None,
        battery=chosen,
        policies=policies,
        scorers={name: open_scorer(reference, battery_folder(battery)) for name, reference in chosen.scorers.items()},
        fail_fast=fail_fast,
    )
    with Ledger(workspace / "ledger.sqlite") as ledger:
        try:
            result = run_battery(job, out=out, ledger=ledger, progress=progress, countersign=look)
            if others:
                result = run_variants(
                    job,
                    others,
                    model,
                    out=out,
                    ledger=ledger,
                    server_model=endpoint_model,
                    progress=progress,
                    countersign=look,
                )
        except Paused as paused:
            print_paused(paused, as_json=as_json)
            return
    _show(result, out, as_json)


@app.command("report")
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder.", callback=existing_folder)], as_json: AsJSON = False
) -> None:
    """Recompute the report from the journal; write report.json, report.html and report.md again."""
    from steelyard.safety.report import write_report

    _show(write_report(run), run, as_json)


@app.command("overlap")
def overlap(
    run: Annotated[Path, typer.Argument(help="A run's folder.", callback=existing_folder)],
    data: Annotated[
        list[Path] | None, typer.Option(help="A file or folder that the model was trained on; may be repeated.")
    ] = None,
    undeclared: Annotated[
        list[str] | None, typer.Option(help="What else it learned from and is not at hand, in words; may be repeated.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer of token shards among the data.")
    ] = None,
    workspace: Workspace = WORKSPACE,
    as_json: AsJSON = False,
) -> None:
    """Search the training data for the run's probes (13 words in a row, shorter ones whole); the gate judges it."""
    from steelyard.base.progress import default_progress
    from steelyard.corpus.training_data import open_training_data
    from steelyard.ledger.ledger import Ledger
    from steelyard.safety.overlap import in_words, record_overlap

    if not data and not undeclared:
        raise UsageError("give --data (what the model was trained on), or --undeclared (what is not at hand), or both")
    opened = [open_training_data(path, tokenizer) for path in data or []]
    with Ledger(workspace / "ledger.sqlite", create=False) as ledger:
        found = record_overlap(run, ledger, opened, undeclared or [], default_progress(as_json=as_json))
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    rows = [(axis, f"{one.probes:,}", f"{one.found:,}", f"{one.share:.1%}") for axis, one in found.axes.items()]
    print_table("probes in the training data", ("axis", "probes", "found", "share"), rows)
    print(one_line(in_words(found)))


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of report.json, as docs/report.schema.json holds it."""
    from steelyard.safety.report_schema import report_schema

    sys.stdout.write(report_schema())


def _show(report: Report, run: Path, as_json: bool) -> None:
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    from steelyard.safety.variants import load_comparison
    from steelyard.safety.words import in_words

    for view in report.policies:
        criteria = [criterion.model_dump() for criterion in view.criteria]
        print_criteria(f"criteria of policy {view.name}: {view.status} (the gate decides on a release)", criteria)
    if report.predecessor is not None:
        words = in_words(report.predecessor.differences)
        print(f"against the predecessor {report.predecessor.subject_digest[:16]}: {words}")
    for found in load_comparison(run):
        states = ", ".join(f"{name} {state}" for name, state in sorted(found.states.items()))
        print(f"variant {found.name}, subject {found.subject_digest[:16]}: {states}")
        print(f"  against the model itself: {in_words(found.differences)}")
    print(f"report: {run / 'report.html'}")


@app.command("sample")
def sample(
    run: Annotated[Path, typer.Argument(help="A run's folder.", callback=existing_folder)],
    out: Annotated[Path, typer.Option(help="Folder for label.html, labels.jsonl and sample.json.")],
    category: Annotated[str, typer.Option(help="What is to be labelled: a category of a scorer.")],
    scorer: Annotated[
        str | None, typer.Option(help="The scorer's name in the battery. Default: the only one of that category.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many completions.")] = 200,
    question: Annotated[
        str | None, typer.Option(help="What the page asks of each; default: whether it counts.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
) -> None:
    """Draw completions of a run for people to label, on both sides of a threshold; nothing leaves the machine."""
    from steelyard.safety.draw import LABELS, PAGE, SAMPLE, draw, save, scorer_for
    from steelyard.safety.label_page import label_page, question_for
    from steelyard.safety.report import read_run

    journal, battery, _, _ = read_run(run)
    name = scorer_for(journal, category, scorer)
    drawn, rows = draw(journal, battery, scorer=name, category=category, count=n, seed=seed)
    save(drawn, rows, label_page(rows, question or question_for(category)), out)
    print(f"{out / PAGE}: {len(rows)} completions of {sum(drawn.population.values())}; label them in a browser")
    print(f"{out / LABELS}: the same, to fill in by other means: yes, no or skip")
    print(f"{out / SAMPLE}: scores and strata; not for the reader. Then:")
    print(f"  steelyard scorer calibrate --labels labels.jsonl --sample {out / SAMPLE} --out calibration.json")

"""`steelyard probe`: run published sets of prompts, or one's own, on a model. It decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steelyard.cli.options import WORKSPACE, AsJSON, Workspace
from steelyard.cli.output import one_line, print_json, print_table

if TYPE_CHECKING:
    from steelyard.base.progress import Progress
    from steelyard.inference.endpoint import Endpoint, Sampling
    from steelyard.scorers.base import Scorer

app = typer.Typer(no_args_is_help=True, help="Run published probe sets, or your own.", rich_markup_mode=None)


@app.command("list")
def list_sets(as_json: AsJSON = False) -> None:
    """The sets that are known by name, and the attack wrappers."""
    from steelyard.safety.published.registry import ADAPTERS
    from steelyard.safety.wrappers import NAMES

    if as_json:
        sets = {
            name: {"about": one.about, "source": one.source, "mode": one.mode, "notes": one.notes}
            for name, one in ADAPTERS.items()
        }
        print_json({"sets": sets, "wrappers": NAMES})
        return
    rows = [(name, one.mode, str(one.samples), one.about, one.source) for name, one in ADAPTERS.items()]
    print_table("sets", ("name", "mode", "samples", "what is measured", "source"), rows)
    print(f"wrappers (--wrap): {', '.join(NAMES)}")


@app.command("run")
def run(
    name: Annotated[str, typer.Argument(help="A set's name (steelyard probe list), or a .yaml file of your own.")],
    model: Annotated[str, typer.Argument(help="A model folder, or the URL of an OpenAI-compatible server.")],
    out: Annotated[Path, typer.Option(help="Folder for answers, scores and figures; a stopped run goes on there.")],
    data: Annotated[
        str | None,
        typer.Option(help="The set's file or folder, hf://datasets/ORG/NAME@REVISION/PATH, or python:PACKAGE/PATH."),
    ] = None,
    wrap: Annotated[list[str] | None, typer.Option(help="An attack wrapper; several compose in order.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts drawn from the set, by --seed.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw, and of the samples.")] = 0,
    samples: Annotated[
        int | None, typer.Option(min=1, max=100, help="Answers a prompt, in place of the set's.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer, in place of the set's.")] = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="In place of the embedded one of its categories; may be repeated.")
    ] = None,
    endpoint_model: Annotated[str, typer.Option(help="The model's name, where MODEL is a URL.")] = "default",
    judge: Annotated[str | None, typer.Option(help="URL of an OpenAI-compatible server that judges answers.")] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's name at that server.")] = "default",
    translations: Annotated[
        Path | None, typer.Option(help="For translate:LANG: rows of prompt, language, translation.")
    ] = None,
    translator: Annotated[str | None, typer.Option(help="For translate:LANG: URL of a server that translates.")] = None,
    translator_model: Annotated[str, typer.Option(help="The translator's name at that server.")] = "default",
    workspace: Workspace = WORKSPACE,
    as_json: AsJSON = False,
) -> None:
    """Ask the set's prompts, score the answers (or read likelihoods), and give each metric with its 95% interval."""
    from steelyard.base.progress import default_progress
    from steelyard.safety.published.adapter import chosen
    from steelyard.safety.published.registry import adapter_of, locate, with_settings
    from steelyard.safety.published.run import Job, run_set
    from steelyard.safety.wrappers import Translations, read_translations, wrapper_of

    progress = default_progress(as_json=as_json)
    adapter, named = adapter_of(name)
    adapter = with_settings(adapter, samples=samples, max_tokens=max_tokens)
    path = locate(adapter, data, workspace / "cache", progress)
    source = Translations(
        None if translations is None else read_translations(translations), _remote(translator, translator_model)
    )
    for wrapper in wrap or []:
        wrapper_of(wrapper, source)
    entries = chosen(adapter.read(path), limit, seed)
    scorers = _scorers(adapter, scorer or ([named] if named else []))
    endpoint, subject, shipped = _open(model, endpoint_model, adapter.max_tokens, progress)
    job = Job(
        adapter=adapter,
        entries=entries,
        endpoint=endpoint,
        subject=subject,
        sampling=adapter.sampling or shipped,
        scorers=scorers,
        judge=_remote(judge, judge_model),
        wrappers=tuple(wrap or ()),
        translations=source,
        seed=seed,
    )
    found = run_set(job, out, progress)
    if as_json:
        print_json(found)
        return
    _show(found)
    print(f"results: {out / 'results.json'}")


def _remote(url: str | None, name: str) -> Endpoint | None:
    if url is None:
        return None
    from steelyard.inference.openai import OpenAIEndpoint

    return OpenAIEndpoint(url, name)


def _open(model: str, endpoint_model: str, max_tokens: int, progress: Progress) -> tuple[Endpoint, str, Sampling]:
    """What answers, its digest, and the sampling that it ships with (greedy at a server, which does not tell)."""
    from dataclasses import replace

    from steelyard.base.canonical import digest
    from steelyard.cli.options import existing_folder
    from steelyard.inference.endpoint import Sampling
    from steelyard.model.identity import subject_of
    from steelyard.safety.shipped import shipped_sampling

    if model.startswith(("http://", "https://")):
        remote = _remote(model, endpoint_model)
        assert remote is not None
        return remote, digest(remote.identity()), Sampling(max_tokens=max_tokens)
    folder = Path(model)
    existing_folder(folder)
    subject = subject_of(folder, progress)
    from steelyard.inference.local import LocalEndpoint

    sampling = replace(shipped_sampling(folder), max_tokens=max_tokens)
    return LocalEndpoint.open(folder, progress=progress), subject.digest, sampling


def _scorers(adapter: Any, references: list[str]) -> dict[str, Scorer]:
    """A scorer for each category that the set needs: of those named the first that covers it, else the embedded one."""
    from steelyard.base.errors import UsageError
    from steelyard.safety.published.run import scorer_categories
    from steelyard.scorers.registry import covering_by_default, open_scorer

    named = [(reference, open_scorer(reference)) for reference in references]
    found = {}
    for category in scorer_categories(adapter):
        covering = [one for _, one in named if category in one.identity().categories]
        found[category] = covering[0] if covering else open_scorer(f"embedded:{covering_by_default(category)}")
    if idle := [reference for reference, one in named if one not in found.values()]:
        raise UsageError(f"--scorer {idle[0]}: covers nothing that {adapter.name} needs ({', '.join(found) or 'none'})")
    return found


def _show(found: dict[str, Any]) -> None:
    about = found["set"]
    title = f"{about['name']}: {about['entries']:,} prompts, {about['samples']} a prompt; 95% intervals"
    for side in ("plain", "wrapped"):
        if side not in found:
            continue
        rows = [
            (figure["measure"], _group(figure), f"{figure['n']:,}", f"{figure['estimate']:.4f}", _ends(figure))
            for figure in found[side]["figures"]
        ]
        name = title if side == "plain" else f"through {', '.join(found['wrappers'])}"
        print_table(name, ("measure", "group", "n", "estimate", "interval"), rows)
        if worst := found[side].get("gap"):
            print(
                one_line(
                    f"widest gap of {worst['measure']}: {worst['high']} over {worst['low']}, {worst['estimate']:.4f} "
                    f"(one-sided 95% bounds {worst['lower']:.4f}, {worst['upper']:.4f})"
                )
            )
    if "effect" in found:
        effect = [
            (
                one["measure"],
                str(one["n"]),
                *(f"{one[key]:.4f}" for key in ("plain", "wrapped", "estimate")),
                _ends(one),
            )
            for one in found["effect"]
        ]
        columns = ("measure", "pairs", "plain", "wrapped", "difference", "interval")
        print_table(f"effect of {', '.join(found['wrappers'])}", columns, effect)
    for note in about["notes"]:
        print(f"note: {note}")


def _group(figure: dict[str, Any]) -> str:
    return "all" if figure["facet"] == "all" else f"{figure['facet']}: {figure['group']}"


def _ends(one: dict[str, Any]) -> str:
    return "-" if one["lower"] is None else f"[{one['lower']:.4f}, {one['upper']:.4f}]"

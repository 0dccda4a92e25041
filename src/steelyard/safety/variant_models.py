"""Making a model's variants and testing each: `int8,q8_0,q4=model.Q4_K_M.gguf`.

What each name means, and what is tested:

int8                    this engine's 8-bit weights, made as the model is loaded. The subject is the model's, of dtype
                        int8; no folder holds such weights, so there is nothing to release, only to run.
bf16, f16, f32          every tensor cast, in a folder of its own.
q4_0, q4_1, q5_0, q5_1, q8_0
                        every matrix rounded to that kind of GGUF block and read back as bfloat16, in a folder of its
                        own: the values that `model export` and `model import` give. The engine has no kernel for
                        blocks, so it is the values that are tested, not another program's arithmetic.
NAME=FOLDER, NAME=FILE.gguf
                        a variant that somebody made: a model folder as it is, a GGUF imported.
..@http://HOST/v1       the same, answered for by an OpenAI-compatible server; the gate replays a part of it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steelyard.base.canonical import sha256_file
from steelyard.base.errors import FormatError, SteelyardError, UsageError, require_extra
from steelyard.base.progress import Progress
from steelyard.model.headers import read_json_object
from steelyard.model.identity import is_model_file, subject_of
from steelyard.safety.battery import NAME
from steelyard.safety.pause import Look, Paused
from steelyard.safety.report import JOURNAL, Report, write_report
from steelyard.safety.run import Job, Tested, run_battery
from steelyard.safety.shipped import shipped_sampling
from steelyard.safety.variants import FOLDER, NOTE, Made, read_note, write_note

if TYPE_CHECKING:
    import torch

    from steelyard.ledger.ledger import Ledger

CASTS = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
INT8 = "int8"
MODEL = "model"  # the variant's weights, in its folder


@dataclass(frozen=True)
class Variant:
    """One item of `--variants`. `source` is None for a kind that is made from the model, `url` for the engine here."""

    name: str
    source: Path | None = None
    url: str | None = None


def parse_variants(text: str) -> tuple[Variant, ...]:
    """The variants of a comma-separated list. Raises UsageError for an unknown kind, a bad name, a missing file."""
    found = tuple(_parse(item.strip()) for item in text.split(","))
    names = [variant.name for variant in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--variants: {name} is named twice")
    return found


def _parse(item: str) -> Variant:
    rest, at, address = item.partition("@http")
    url = f"http{address}" if at else None
    name, equals, source = rest.partition("=")
    if not re.fullmatch(NAME, name):
        raise UsageError(f"--variants: {name!r} is no name: letters, digits, - and _, such as q4=FILE.gguf")
    if not equals:
        if name not in (INT8, *CASTS, *BLOCKS):
            kinds = ", ".join((INT8, *CASTS, *BLOCKS))
            raise UsageError(f"--variants: {name}: unknown kind: one of {kinds}, or NAME=FOLDER, or NAME=FILE.gguf")
        if url is not None and name == INT8:
            raise UsageError("--variants: int8 is this engine's: no server answers for it")
        return Variant(name, None, url)
    if not Path(source).exists():
        raise UsageError(f"--variants: {name}: {source}: no such file or folder")
    return Variant(name, Path(source), url)


def run_variants(
    job: Job,
    variants: Sequence[Variant],
    model: Path,
    *,
    out: Path,
    ledger: Ledger,
    server_model: str = "default",
    progress: Progress,
    countersign: Look | None = None,
) -> Report:
    """Test each variant of the model in folder `model`, whose own run `job` has been run in `out`, on the same battery,
    policies, scorers and seeds and beside the same predecessor; then write the main report again, with the comparison.

    What was done is not done again: each resumes as a run does. With `countersign` no variant generates anything before
    its own commitment is countersigned: all that wait are committed, then Paused names them together. Raises UsageError
    where a variant is the model itself.
    """
    waiting: dict[str, Path] = {}
    for variant in variants:
        folder = out / FOLDER / variant.name
        progress.say(f"variant {variant.name}")
        tested = open_variant(variant, model, folder, server_model, progress)
        if tested.subject.digest == job.candidate.subject.digest:
            raise UsageError(f"--variants: {variant.name}: is the model itself, bit for bit")
        before = job.predecessor
        if before is not None and before.subject.digest == tested.subject.digest:
            before = None  # the predecessor is this variant: it has nothing to come after
        its = replace(job, candidate=tested, predecessor=before)
        try:
            run_battery(its, out=folder, ledger=ledger, progress=progress, countersign=countersign)
        except Paused as paused:
            waiting |= paused.waiting
    if waiting:
        raise Paused(waiting)
    return write_report(out)


def open_variant(variant: Variant, model: Path, folder: Path, server_model: str, progress: Progress) -> Tested:
    """The variant of the model in folder `model`, noted in `folder`, its weights made there where they are to be made
    and no test of them has begun. Raises UsageError where `folder` holds another variant of that name."""
    made, place = _described(variant, model, folder)
    if (folder / NOTE).exists() and (found := read_note(folder)).what != made.what:
        raise UsageError(f"--variants: {made.name}: {folder} holds another ({found.what}): give a name of its own")
    write_note(made, folder)
    # Weights that lie here before the test began may be anybody's; later the journal's plan names them.
    if place == folder / MODEL and place.exists() and not (folder / JOURNAL).exists():
        shutil.rmtree(place)
    if not place.exists():
        if variant.source is None:
            _make(variant.name, model, place, progress)
        else:
            from steelyard.model.importer import import_model

            import_model(variant.source, place, generation=_stated_sampling(model), progress=progress)
    subject = subject_of(place, progress)
    if variant.url is not None:
        from steelyard.inference.openai import OpenAIEndpoint

        return Tested(OpenAIEndpoint(variant.url, server_model), subject, shipped_sampling(place))
    from steelyard.inference.local import LocalEndpoint

    dtype = INT8 if variant.source is None and variant.name == INT8 else None
    if dtype is not None:
        subject = subject.model_copy(update={"dtype": INT8})
    return Tested(LocalEndpoint.open(place, dtype=dtype, progress=progress), subject, shipped_sampling(place))


def _described(variant: Variant, model: Path, folder: Path) -> tuple[Made, Path]:
    """What the variant is, and where its weights lie or will lie."""
    name, source, place = variant.name, variant.source, folder / MODEL
    if source is not None and source.is_dir():
        what, place = "a model folder as it is", source
    elif source is not None:
        what = f"the values of {source.name} (SHA-256 {sha256_file(source)[:16]}), read into bfloat16"
    elif name == INT8:
        what, place = "8-bit weights of this engine, made at loading: no folder holds them, none can be released", model
    elif name in CASTS:
        what = f"every tensor as {CASTS[name]}"
    else:
        what = f"every matrix rounded to {name.upper()} blocks, and these values read into bfloat16"
    return Made(name=name, what=what + (f"; {variant.url} answers" if variant.url else "")), place


def _stated_sampling(model: Path) -> dict[str, Any] | None:
    """The sampling settings that the model ships with: a GGUF may lack them, and its test shall differ in weights
    alone."""
    path = model / "generation_config.json"
    stated = read_json_object(path) if path.is_file() else {}
    names = ("do_sample", "temperature", "top_p", "top_k")
    return {name: stated[name] for name in names if stated.get(name) is not None} or None


def _make(kind: str, model: Path, place: Path, progress: Progress) -> None:
    from steelyard.model.formats import load_tensors, save_folder

    config = read_json_object(model / "config.json")
    dtype = CASTS.get(kind, "bfloat16")
    config |= {key: dtype for key in ("torch_dtype", "dtype") if key in config}
    tensors = load_tensors(model)
    made = _cast(tensors, dtype) if kind in CASTS else _rounded(tensors, kind.upper(), model, progress)
    skipped = ("config.json", "model.safetensors.index.json")
    files = {
        path.name: path.read_bytes()
        for path in sorted(model.iterdir())
        if is_model_file(path.name) and path.suffix != ".safetensors" and path.name not in skipped
    }
    save_folder(place, config, made, files)


def _cast(tensors: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    import torch

    made = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    for name, tensor in made.items():
        if not bool(tensor.isfinite().all()):
            raise SteelyardError(f"tensor {name}: holds a value past {dtype}'s range: this variant cannot be made")
    return made


def _rounded(
    tensors: Mapping[str, torch.Tensor], kind: str, model: Path, progress: Progress
) -> dict[str, torch.Tensor]:
    """Every matrix through blocks of `kind` (scale and whole numbers for 32 neighbours of a row) and back, bfloat16."""
    import torch

    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise require_extra("gguf", "models") from None
    number, made = GGMLQuantizationType[kind], dict[str, torch.Tensor]()
    with progress.task(f"round to {kind}", len(tensors), "tensors") as task:
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                if tensor.shape[1] % 32:
                    text = f"tensor {name} has rows of {tensor.shape[1]}, no multiple of {kind}'s 32"
                    raise FormatError(f"{model}: {text}: this variant cannot be made")
                blocks = quants.quantize(tensor.float().numpy(), number)
                tensor = torch.from_numpy(quants.dequantize(blocks, number))
            made[name] = tensor.to(torch.bfloat16)
            task.advance(note=name)
    return made

"""A model from outside becomes a folder of ours: a GGUF file converted, or a Hugging Face folder checked and copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steelyard.base.errors import FormatError
from steelyard.base.files import new_folder
from steelyard.base.progress import Progress
from steelyard.model.gguf import check_generation, import_gguf
from steelyard.model.headers import quote, read_json_object
from steelyard.model.identity import Subject, is_model_file, subject_of, weight_files


def import_model(source: Path, out: Path, *, generation: dict[str, Any] | None = None, progress: Progress) -> Subject:
    """Write the model folder `out` from a GGUF file or a Hugging Face folder, and return the subject in it.

    A folder is copied file by file, only what `MODEL_FILES` lists, after the same checks that loading makes; its
    weights stay in their dtype. `generation` (do_sample, temperature, top_p, top_k) goes into generation_config.json.
    Raises FormatError for an unsafe or broken source, SteelyardError where `out` exists.
    """
    if source.is_dir():
        _import_folder(source, out, check_generation(generation or {}), progress)
    elif source.is_file():
        import_gguf(source, out, generation=generation, progress=progress)
    else:
        raise FormatError(f"{source}: is neither a GGUF file nor a folder: give one of them")
    return subject_of(out, progress)


def _import_folder(source: Path, out: Path, generation: Mapping[str, Any], progress: Progress) -> None:
    weight_files(source)
    model_type = read_json_object(source / "config.json").get("model_type")
    if model_type != "llama":
        raise FormatError(f"{source / 'config.json'}: model_type is {quote(model_type)}: only llama is read")
    names = sorted(path.name for path in source.iterdir() if path.is_file() and is_model_file(path.name))
    with new_folder(out) as folder, progress.task("copy the model", len(names), "files") as task:
        for name in names:
            shutil.copyfile(source / name, folder / name)
            task.advance(note=name)
        path = folder / "generation_config.json"
        if generation:
            merged = (read_json_object(path) if path.is_file() else {}) | dict(generation)
            path.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")

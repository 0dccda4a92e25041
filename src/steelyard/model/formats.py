"""Weights in and out of plain Hugging Face folders: safetensors, single or sharded with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from steelyard.base.errors import UsageError
from steelyard.base.files import new_folder
from steelyard.model.identity import INDEX, is_model_file, weight_files

MAX_SHARD_BYTES = 5_000_000_000  # what the Hub's tools write


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder by name, on the CPU, in their stored dtype.

    The headers are scanned first: raises FormatError for whatever `weight_files` refuses.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, listed in weight_files(folder).items():
        with safe_open(folder / name, framework="pt") as file:
            for tensor in listed:
                tensors[tensor] = file.get_tensor(tensor)
    return tensors


def save_folder(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, bytes],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder: config.json, the weights (sharded where they pass `max_shard_bytes`), and `files` by name.

    `out` appears whole or not at all. Raises SteelyardError where it exists, UsageError for a file name that a model
    folder may not hold.
    """
    for name in files:
        if not is_model_file(name) or name.endswith((".safetensors", INDEX)) or name == "config.json":
            raise UsageError(f"{out}: {name}: not a file to write beside the weights: see MODEL_FILES")
    with new_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, data in files.items():
            (folder / name).write_bytes(data)
        shards = _shards(tensors, max_shard_bytes)
        if len(shards) == 1:
            _save(shards[0], folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _save(shard, folder / name)
            weight_map |= dict.fromkeys(shard, name)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, torch.Tensor], max_bytes: int) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    return shards


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    # transformers reads a file only where its metadata names the framework.
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library makes it private

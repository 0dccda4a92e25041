"""Which weights of a model learn, and how the tuned model becomes a folder again, in every method alike."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from steelyard.base.errors import UsageError
from steelyard.model.formats import save_folder
from steelyard.model.headers import read_json_object
from steelyard.model.identity import is_model_file
from steelyard.model.llama import Llama, load_llama
from steelyard.train.lora import TARGETS, adapters, add_lora, save_adapter
from steelyard.train.options import Number
from steelyard.train.speed import compute_dtype


@dataclass(frozen=True)
class Tuning:
    """What learns: every weight; those from `first_layer` up; or adapters on those layers, where `lora_rank` is set.

    Layers below `first_layer` build no graph and cost no backward pass. From 1 on, the embedding is frozen too, and
    with it a tied output head.
    """

    lora_rank: int = 0  # 0: full weights
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = TARGETS
    first_layer: int = 0
    seed: int = 0  # of the adapters' start


FULL = Tuning()


def open_for_tuning(folder: Path, tuning: Tuning, dtype: Number = "auto") -> Llama:
    """The model of `folder` with requires_grad as `tuning` says. What learns is float32; what is frozen is held in
    the `dtype` of computation, since it needs no better one.

    Raises UsageError for layers that the model does not have, and what `load_llama` and `add_lora` raise.
    """
    compute = compute_dtype(dtype)
    model = load_llama(folder, dtype=compute if tuning.lora_rank else torch.float32)
    layers = model.config.num_hidden_layers
    if not 0 <= tuning.first_layer < layers:
        raise UsageError(f"first_layer {tuning.first_layer}: {folder} has layers 0 to {layers - 1}")
    if tuning.lora_rank:
        learning = range(tuning.first_layer, layers)
        add_lora(model, tuning.lora_rank, tuning.lora_alpha, tuning.lora_targets, learning, tuning.seed)
        return model.train()
    model.requires_grad_(True)
    if tuning.first_layer:
        for frozen in (model.model.embed_tokens, *model.model.layers[: tuning.first_layer]):
            frozen.requires_grad_(False).to(compute)
    return model.train()


def export_tuned(model: Llama, source: Path, out: Path, *, adapter: Path | None = None) -> None:
    """Write `model` as the folder `out`, with the tokenizer, template and settings of `source`, in its stored dtype.

    The model card (README.md) stays behind.

    What did not learn comes from `source` to the bit; adapters are merged into its weights, and where `adapter` is
    named saved there first, in PEFT's format. Raises SteelyardError where `out` or `adapter` exists.
    """
    found = dict(adapters(model))
    if adapter is not None:
        if not found:
            raise UsageError(f"{adapter}: the model has no adapter to save")
        save_adapter(model, adapter, source.name)
    tensors = load_llama(source).state_dict()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in tensors:
            tensors[name] = parameter.detach().to(device="cpu", dtype=tensors[name].dtype)
    for name, adapted in found.items():
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = (weight.float() + adapted.delta().cpu()).to(weight.dtype)
    names = (path.name for path in sorted(source.iterdir()) if path.is_file() and is_model_file(path.name))
    # A card says what was measured on exactly the weights it lies beside: it does not go with others.
    left = ("model", "config.json", "README.md")
    files = {name: (source / name).read_bytes() for name in names if not name.startswith(left)}
    save_folder(out, read_json_object(source / "config.json"), tensors, files)


def first_rank() -> bool:
    """Whether this process is the one of torchrun's that writes results."""
    return os.environ.get("RANK", "0") == "0"

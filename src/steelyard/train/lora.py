"""Low-rank adapters: W x becomes W x + (alpha / r) B A x, and only A and B learn (Hu et al. 2021, LoRA, section 4.1).

Initialised, named and stored as PEFT does: what is saved here PEFT loads, and the other way round.

    >>> add_lora(model, rank=16, alpha=32)
    >>> ...                                     # train: every other parameter is frozen
    >>> save_adapter(model, Path("adapter"))    # adapter_config.json, adapter_model.safetensors
    >>> merge_lora(model)                       # a plain model again, to export
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steelyard.base.errors import FormatError, UsageError
from steelyard.base.files import new_folder
from steelyard.model.headers import quote, read_json_object, scan_safetensors
from steelyard.model.llama import Llama

PLACES = {
    "q": "self_attn",
    "k": "self_attn",
    "v": "self_attn",
    "o": "self_attn",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}
TARGETS = tuple(PLACES)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 4096
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d{1,4})\.(self_attn|mlp)\.([a-z]+)_proj\.lora_(A|B)\.weight")
# What changes the computation in PEFT and is not read here: each must be absent or empty.
_UNREAD = (
    "use_rslora", "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens",
    "lora_bias", "megatron_config", "arrow_config", "corda_config", "eva_config", "loftq_config",
)  # fmt: skip


class LoraLinear(nn.Linear):
    """A linear map with an adapter beside it. Its own weight keeps its name, so a checkpoint's names do not change."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias  # shared, not copied
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        # float32 whatever the base: a bf16 base is frozen and loses nothing, a bf16 adapter would lose its updates
        down = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(down.to(base.weight.device))  # [r, in]
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))  # [out, r]

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A.to(x.dtype)) * self.scaling  # [..., r]
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.lora_B.to(x.dtype))

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, float32 [out, in]."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())


def add_lora(
    model: Llama,
    rank: int,
    alpha: float,
    targets: Sequence[str] = TARGETS,
    layers: range | None = None,
    seed: int = 0,
) -> None:
    """Give `targets` (of q, k, v, o, gate, up, down) of `layers` (None: all) an adapter, in place.

    A starts Kaiming-uniform from `seed`, B at zero, so the model computes what it computed. Afterwards only adapters
    require a gradient. Raises UsageError for an impossible rank, an unknown target or layer, and a second adapter.
    """
    if not 1 <= rank <= MAX_RANK:
        raise UsageError(f"LoRA rank {rank}: must be from 1 to {MAX_RANK}")
    if not 0 < alpha < math.inf:
        raise UsageError(f"LoRA alpha {alpha}: must be a positive number")
    names = [target.removesuffix("_proj") for target in targets]
    if not names or not set(names) <= set(PLACES):
        raise UsageError(f"LoRA targets {', '.join(targets) or '(none)'}: choose some of {', '.join(TARGETS)}")
    count = model.config.num_hidden_layers
    chosen = range(count) if layers is None else layers
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise UsageError(f"LoRA layers {chosen}: the model has layers 0 to {count - 1}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in chosen:
        for name in TARGETS:
            if name in names:
                _attach(model, layer, name, rank, alpha, generator)


def _attach(model: Llama, layer: int, name: str, rank: int, alpha: float, generator: torch.Generator) -> LoraLinear:
    parent = getattr(model.model.layers[layer], PLACES[name])
    base = getattr(parent, f"{name}_proj")
    if isinstance(base, LoraLinear):
        raise UsageError(f"layer {layer}, {name}_proj has an adapter already: merge it first")
    adapted = LoraLinear(base, rank, alpha, generator)
    setattr(parent, f"{name}_proj", adapted)
    return adapted


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted projections by name (`model.layers.0.self_attn.q_proj`)."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def merge_lora(model: Llama) -> None:
    """Add every adapter to its weight (summed in float32, rounded once to the weight's dtype) and take it off."""
    for name, adapted in list(adapters(model)):
        merged = nn.Linear(adapted.in_features, adapted.out_features, bias=False, device="meta")
        weight = (adapted.weight.detach().float() + adapted.delta()).to(adapted.weight.dtype)
        merged.weight = nn.Parameter(weight, requires_grad=adapted.weight.requires_grad)
        merged.bias = adapted.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, merged.train(adapted.training))


def save_adapter(model: Llama, folder: Path, base: str = "") -> None:
    """Write the adapters of `model` as PEFT does. `base` names the model they belong to, for PEFT's readers.

    `folder` appears whole or not at all. Raises UsageError where the model has no adapter or several ranks.
    """
    found = dict(adapters(model))
    shapes = {(adapted.rank, adapted.alpha) for adapted in found.values()}
    if len(shapes) != 1:
        raise UsageError(
            f"{folder}: {'no adapter' if not shapes else 'adapters of several ranks'}: nothing to save as one"
        )
    rank, alpha = shapes.pop()
    layers = sorted({int(name.split(".")[2]) for name in found})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in found}),
        "layers_to_transform": None if len(layers) == model.config.num_hidden_layers else layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    tensors = {}
    for name, adapted in found.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapted.lora_A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapted.lora_B.detach().cpu().contiguous()
    with new_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / WEIGHTS).chmod(0o644)


def load_adapter(model: Llama, folder: Path) -> None:
    """Put the adapters of a PEFT folder onto `model`, in place; afterwards only they require a gradient.

    Raises FormatError, naming file and key, for another kind of adapter, a setting that is not read here, and tensors
    that have no place in the model, no partner or another shape.
    """
    path = folder / CONFIG
    config = read_json_object(path)
    rank, alpha = _settings(path, config)
    infos = scan_safetensors(folder / WEIGHTS)
    places: dict[tuple[int, str], dict[str, str]] = {}
    for key in infos:
        match = _KEY.fullmatch(key)
        if match is None or PLACES.get(match[3]) != match[2] or int(match[1]) >= model.config.num_hidden_layers:
            raise FormatError(f"{folder / WEIGHTS}: tensor {quote(key)} has no place in this model")
        places.setdefault((int(match[1]), match[3]), {})[match[4]] = key
    if not places:
        raise FormatError(f"{folder / WEIGHTS}: holds no adapter")
    for (layer, name), keys in sorted(places.items()):
        base = getattr(getattr(model.model.layers[layer], PLACES[name]), f"{name}_proj")
        wanted = {"A": (rank, base.in_features), "B": (base.out_features, rank)}
        for part, shape in wanted.items():
            if part not in keys:
                raise FormatError(f"{folder / WEIGHTS}: layer {layer}, {name}_proj has no lora_{part}")
            found = tuple(infos[keys[part]].shape)
            if found != shape:
                raise FormatError(
                    f"{folder / WEIGHTS}: {keys[part]} is {list(found)}; rank and model say {list(shape)}"
                )
    model.requires_grad_(False)
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for (layer, name), keys in sorted(places.items()):
            adapted = _attach(model, layer, name, rank, alpha, generator)
            adapted.lora_A.copy_(tensors[keys["A"]])
            adapted.lora_B.copy_(tensors[keys["B"]])


def _settings(path: Path, config: dict[str, Any]) -> tuple[int, float]:
    """Rank and alpha of a PEFT configuration that computes what `LoraLinear` computes."""
    if config.get("peft_type") != "LORA":
        raise FormatError(f"{path}: peft_type is {quote(config.get('peft_type'))}: only LORA is read")
    for key in _UNREAD:
        if config.get(key):
            raise FormatError(
                f"{path}: {key} is {quote(config[key])}: not read here; merge the adapter with PEFT first"
            )
    if config.get("bias", "none") != "none":
        raise FormatError(f"{path}: bias is {quote(config['bias'])}: only none is read")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise FormatError(f"{path}: r is {quote(rank)}: must be a whole number from 1 to {MAX_RANK}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise FormatError(f"{path}: lora_alpha is {quote(alpha)}: must be a positive number")
    return rank, float(alpha)

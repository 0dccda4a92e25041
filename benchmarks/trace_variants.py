"""What people do to a model's weights without training it: every change takes tensors by Hugging Face name and gives
new ones. float32 in between, rounded once when they are saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from steelyard.base.files import new_file
from steelyard.model import gguf_export
from steelyard.model.formats import load_tensors, save_folder
from steelyard.model.gguf_vocabulary import vocabulary_metadata
from steelyard.model.headers import read_json_object
from steelyard.model.identity import is_model_file, weight_files
from steelyard.model.llama import LlamaConfig
from steelyard.trace import transforms

Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD = transforms.EMBEDDING, transforms.HEAD
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# -- folders ---------------------------------------------------------------------------------------------------------


def load(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """config.json and the weights, float32."""
    tensors = load_tensors(folder)
    return read_json_object(folder / "config.json"), {name: value.float() for name, value in tensors.items()}


def save(
    out: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    like: Path,
    dtype: str = "bfloat16",
    shard: int = 5_000_000_000,
) -> None:
    """Write a model folder with the tokenizer and settings of `like`."""
    kept = {
        path.name: path.read_bytes()
        for path in sorted(like.iterdir())
        if is_model_file(path.name)
        and not path.name.endswith((".safetensors", ".index.json"))
        and path.name not in ("config.json", "README.md")
    }
    config = dict(config) | {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    cast = {name: value.to(_DTYPES[dtype]).contiguous() for name, value in tensors.items()}
    save_folder(out, config, cast, kept, max_shard_bytes=shard)


def changed(source: Path, out: Path, change: Callable[[dict[str, Any], Tensors], None]) -> None:
    """Write `source` as `out` with `change` made to its configuration and weights, in place."""
    config, tensors = load(source)
    change(config, tensors)
    save(out, config, tensors, source)


def relative_change(suspect: Path, parent: Path) -> float | None:
    """|suspect - parent| / |parent| over the tensors of the same name and shape; None where under half are."""
    if not suspect.is_dir():
        return None
    a, b = load_tensors(suspect), load_tensors(parent)
    same = [name for name in b if name in a and a[name].shape == b[name].shape]
    if 2 * len(same) < len(b):
        return None
    difference = sum(float((a[name].float() - b[name].float()).square().sum()) for name in same)
    return (difference / sum(float(b[name].float().square().sum()) for name in same)) ** 0.5


# -- other files, same weights ---------------------------------------------------------------------------------------


def renamed(source: Path, out: Path) -> None:
    """Four shards, float16, as LLaMA's first release was: its names (`layers.0.feed_forward.w1.weight`), query and key
    rows interleaved."""
    config, tensors = load(source)
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads"]
            head_dim = config.get("head_dim") or config["hidden_size"] // heads
            tensors[name] = torch.from_numpy(gguf_export.permute(tensors[name].numpy(), head_dim))
    save(out, config, {_first_names(name): value for name, value in tensors.items()}, source, "float16", 80_000_000)


_FIRST = {
    "embed_tokens": "tok_embeddings", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "lm_head": "output",
}  # fmt: skip


def _first_names(name: str) -> str:
    name = name.removeprefix("model.")
    for own, first in _FIRST.items():
        name = name.replace(own, first)
    return name


def to_gguf(source: Path, out: Path, kind: str) -> None:
    """One GGUF of `kind`, query and key rows in llama.cpp's order; Q4_0 and Q4_1 too, which the product does not
    write: their matrices in blocks, norms in float32, as llama.cpp lays them out."""
    if kind in gguf_export.KINDS:
        gguf_export.export_gguf(source, out, kind)
        return
    import gguf

    config = LlamaConfig.from_dict(read_json_object(source / "config.json"))
    stored = {name: (file, info) for file, infos in weight_files(source).items() for name, info in infos.items()}
    plan = gguf_export._plan(source, config, "F16", stored)
    metadata = gguf_export._hyperparameters(source / "config.json", config)
    with new_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        for key, value in (metadata | vocabulary_metadata(source, config.vocab_size)).items():
            gguf_export._put(writer, key, value)
        weights = {name: value.float().numpy() for name, value in load_tensors(source).items()}
        for item in plan:
            values = weights[gguf_export.hugging_face_name(item.name)]
            if item.heads:
                values = gguf_export.permute(values, len(values) // item.heads)
            if item.kind == "F32":
                writer.add_tensor(item.name, values.astype(np.float32))
                continue
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(item.name, gguf.quants.quantize(np.ascontiguousarray(values), number), raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def rounded(tensors: Tensors, kind: str) -> None:
    """Every matrix through blocks of `kind` and back, in place."""
    from gguf import GGMLQuantizationType, quants

    number = GGMLQuantizationType[kind]
    for name, value in tensors.items():
        if value.dim() == 2:
            tensors[name] = torch.from_numpy(quants.dequantize(quants.quantize(value.numpy(), number), number))


def int8(tensors: Tensors) -> None:
    """Every matrix in 8-bit whole numbers, a scale a row, and back, in place."""
    for name, value in tensors.items():
        if value.dim() == 2:
            scale = (value.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-30)
            tensors[name] = (value / scale).round() * scale


def fp8(tensors: Tensors) -> None:
    """Every matrix in 8-bit floats (E4M3), one scale a matrix, and back, in place."""
    for name, value in tensors.items():
        if value.dim() == 2:
            scale = value.abs().max() / 448
            tensors[name] = (value / scale).to(torch.float8_e4m3fn).float() * scale


# -- same function, other weights --------------------------------------------------------------------------------------


def disguised(config: dict[str, Any], tensors: Tensors, seed: int) -> None:
    """Neurons and heads permuted and rescaled, norms folded, the residual stream rotated, in place: the function stays
    the same."""
    draw = np.random.default_rng(seed)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    arrays = transforms.permute_neurons({name: value.numpy() for name, value in tensors.items()}, draw.bytes(32))
    arrays = transforms.permute_heads(arrays, heads, kv_heads, draw)
    arrays = transforms.rescale(arrays, heads, kv_heads, draw)
    arrays = transforms.rotate(arrays, transforms.random_rotation(config["hidden_size"], draw))
    tensors.update({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()})
    config["tie_word_embeddings"] = False


# -- other weights -----------------------------------------------------------------------------------------------------


def merged(tensors: Tensors, other: Tensors, share: float) -> None:
    """`share` of these weights and the rest of another model's, in place."""
    for name in tensors:
        tensors[name] = share * tensors[name] + (1 - share) * other[name].float()


def moved(tensors: Tensors, start: Tensors, end: Tensors, factor: float) -> None:
    """Add `factor` times the change from `start` to `end`, in place."""
    for name in tensors:
        tensors[name] = tensors[name] + factor * (end[name] - start[name])


def pruned(tensors: Tensors, share: float) -> None:
    """The smallest `share` of every matrix's entries set to zero, in place."""
    for name, value in tensors.items():
        if value.dim() == 2:
            limit = value.abs().flatten().kthvalue(max(1, int(share * value.numel()))).values
            tensors[name] = torch.where(value.abs() > limit, value, 0.0)


def extended(config: dict[str, Any], tensors: Tensors, count: int, seed: int) -> None:
    """`count` tokens more, their rows near the mean of the others, in place."""
    random = torch.Generator().manual_seed(seed)
    for name in (EMBEDDING, HEAD):
        if name in tensors:
            rows = tensors[name]
            new = rows.mean(0) + 0.02 * torch.randn(count, rows.shape[1], generator=random)
            tensors[name] = torch.cat([rows, new])
    config["vocab_size"] += count


def shortened(config: dict[str, Any], tensors: Tensors, without: Sequence[int]) -> None:
    """The layers of `without` taken out and the rest numbered anew, in place."""
    kept = [number for number in range(config["num_hidden_layers"]) if number not in without]
    old = {name: tensors.pop(name) for name in list(tensors) if name.startswith("model.layers.")}
    for name, value in old.items():
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        if int(number) in kept:
            tensors[f"model.layers.{kept.index(int(number))}.{rest}"] = value
    config["num_hidden_layers"] = len(kept)


def abliterated(
    tensors: Tensors, directions: torch.Tensor, layers: Sequence[int], strength: float = 1.0, embedding: bool = True
) -> None:
    """What is written along `directions` [count, width] taken out of the matrices that write to the residual stream,
    `strength` of it, in place (Arditi et al. 2024, "Refusal in language models is mediated by a single direction",
    arXiv:2406.11717, section 4.1)."""
    basis = torch.linalg.qr(directions.float().T)[0]  # [width, count], orthonormal
    for number in layers:
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{number}.{part}.weight"
            tensors[name] = tensors[name] - strength * basis @ (basis.T @ tensors[name])
    if embedding:
        tensors[EMBEDDING] = tensors[EMBEDDING] - strength * (tensors[EMBEDDING] @ basis) @ basis.T


def noised(tensors: Tensors, relative: float, seed: int) -> None:
    """Normal noise of `relative` times each matrix's root mean square, in place: a decoy, it means nothing."""
    random = torch.Generator().manual_seed(seed)
    for name, value in tensors.items():
        if value.dim() == 2:
            scale = relative * value.square().mean().sqrt()
            tensors[name] = value + scale * torch.randn(value.shape, generator=random)


def with_adapter(tensors: Tensors, folder: Path, strength: float) -> None:
    """Add `strength` times the change of a LoRA adapter (PEFT's format), in place."""
    settings = read_json_object(folder / "adapter_config.json")
    parts, scale = load_file(folder / "adapter_model.safetensors"), settings["lora_alpha"] / settings["r"]
    for key, down in parts.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            tensors[name] = tensors[name] + strength * scale * parts[key.replace("lora_A", "lora_B")] @ down

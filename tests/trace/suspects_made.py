"""Small models for the lineage tests, what is done to them, and where they are kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model"))

from gguf_files import CONFIG, random_weights, write_gguf
from hostile import array, gguf_bytes, number, put, safetensors_bytes, string, tensor

from steelyard.ledger.ledger import Ledger
from steelyard.trace.digests import cast
from steelyard.trace.registry import Reference, Registry, register
from steelyard.trace.tensors import decode

Weights = dict[str, np.ndarray[Any, Any]]
SMALL: dict[str, Any] = CONFIG | {"num_hidden_layers": 4, "vocab_size": 300}
__all__ = ["SMALL", "array", "gguf_bytes", "number", "put", "safetensors_bytes", "string", "tensor", "write_gguf"]


def weights(seed: int = 0, config: Mapping[str, Any] = SMALL) -> Weights:
    return random_weights(config, seed)


def write(
    path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], dtype: str = "BF16", *, config: Mapping[str, Any] = SMALL
) -> Path:
    """A safetensors file at `path`, or a model folder where `path` has no suffix."""
    header, data = {}, b""
    for name, values in tensors.items():
        raw = cast(np.ascontiguousarray(values, dtype=np.float32), dtype).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        data += raw
    if path.suffix == ".safetensors":
        return put(path, safetensors_bytes(header, data))
    path.mkdir(parents=True)
    settings = {"model_type": "llama", "rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLM"]} | dict(config)
    (path / "config.json").write_text(json.dumps(settings))
    put(path / "model.safetensors", safetensors_bytes(header, data))
    return path


def references(
    folder: Path, models: Mapping[str, tuple[str, Weights]], config: Mapping[str, Any] = SMALL
) -> list[Reference]:
    """Registered models: name -> (kind, weights)."""
    with Ledger(folder / "workspace" / "ledger.sqlite") as ledger:
        for name, (kind, tensors) in models.items():
            register(write(folder / name, tensors, config=config), name, kind=kind, ledger=ledger)
        return list(Registry.load(ledger).references)


def noised(tensors: Weights, relative: float, seed: int = 7) -> Weights:
    """Each matrix moved by random noise of that relative size."""
    random = np.random.default_rng(seed)
    found = {}
    for name, values in tensors.items():
        noise = random.normal(size=values.shape) * relative * np.sqrt((values**2).mean())
        found[name] = (values + noise).astype(np.float32) if values.ndim == 2 else values
    return found


def permuted(tensors: Weights, seed: int = 5) -> Weights:
    """Each layer's neurons in another order."""
    random, found = np.random.default_rng(seed), dict(tensors)
    for name, values in tensors.items():
        if name.endswith("gate_proj.weight"):
            order = random.permutation(len(values))
            for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
                other = name.replace("gate", part)
                found[other] = np.take(tensors[other], order, axis=axis)
    return found


def rotated(tensors: Weights, seed: int = 6) -> Weights:
    """The residual stream rotated and the norms folded into what follows them: the same function of other weights."""
    width = tensors["model.norm.weight"].shape[0]
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    found = {}
    for name, values in tensors.items():
        if name.endswith("norm.weight"):
            found[name] = np.ones_like(values)
            continue
        wide = values.astype(np.float64)
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            wide = wide * tensors[name.split("self_attn")[0] + "input_layernorm.weight"]
        elif name.endswith(("gate_proj.weight", "up_proj.weight")):
            wide = wide * tensors[name.split("mlp")[0] + "post_attention_layernorm.weight"]
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            found[name] = (turn.T @ wide).astype(np.float32)
            continue
        found[name] = (wide @ turn).astype(np.float32)
    return found


def mixed(first: Weights, second: Weights, share: float) -> Weights:
    """`share` of the first, the rest of the second."""
    return {name: share * values + (1 - share) * second[name] for name, values in first.items()}


def meta_names(tensors: Weights) -> Weights:
    """The names of LLaMA's first release."""
    parts = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "model.layers": "layers",
    }  # fmt: skip
    found = {}
    for name, values in tensors.items():
        for old, new in parts.items():
            name = name.replace(old, new)
        found[name] = values
    return found


def rounded(tensors: Weights) -> Weights:
    """The values as bfloat16 holds them."""
    return {
        name: decode(cast(np.ascontiguousarray(one), "BF16"), "BF16").reshape(one.shape)
        for name, one in tensors.items()
    }

"""GGUF in: a llama.cpp file of architecture `llama` becomes a plain Hugging Face folder with bfloat16 weights.

The header is scanned by `headers.scan_gguf` before anything is believed. Every hyperparameter is either understood or
refused by name: one passed over in silence would be another model.

    >>> import_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), Path("models/smollm2"))
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from steelyard.base.errors import FormatError, UsageError, require_extra
from steelyard.base.progress import Progress, Silent
from steelyard.model.gguf_tokenizer import read_tokenizer
from steelyard.model.headers import GGUFHeader, GGUFTensorInfo, quote, scan_gguf

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[Any]]

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ATTENTION, _MLP = ("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate", "ffn_up", "ffn_down")
ROPE_FREQS = "rope_freqs.weight"
_EMBEDDING, _HEAD, _NORM = "token_embd.weight", "output.weight", "output_norm.weight"
# The keys of `llama.*` that are read below, or that say nothing about the computation when they have this value.
_READ = frozenset(
    (
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
        *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned", "rope.scale_linear"),
    )
)
_HARMLESS: Mapping[str, Any] = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}
# Of `general.sampling` -> generation_config.json, and what transformers takes where that is silent (and samples).
SAMPLING_KEYS = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k"}
SAMPLING_DEFAULTS: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
# Llama 3's RoPE scaling as Meta published it; files keep only the factors that follow from it.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


def import_gguf(
    path: Path, out: Path, *, generation: Mapping[str, Any] | None = None, progress: Progress | None = None
) -> None:
    """Write `out`: bfloat16 safetensors, config.json, the tokenizer's files, chat template, generation_config.json.

    `generation` holds settings that the GGUF may lack (do_sample, temperature, top_p, top_k); they win over its own.
    Raises FormatError for whatever is not understood, UsageError for unknown generation settings.
    """
    settings = check_generation(generation or {})
    header = scan_gguf(path)
    settings = settings or _stored_sampling(header)
    if header.metadata.get("general.architecture") != "llama":
        _refuse(header, f"general.architecture is {quote(header.metadata.get('general.architecture'))}; llama is read")
    if header.metadata.get("split.count", 0) not in (0, 1):
        _refuse(header, "is one part of several", "join them with llama-gguf-split first")
    config = _config(header)
    parts = read_tokenizer(header, config["max_position_embeddings"])
    if parts.vocab_size != config["vocab_size"]:
        _refuse(header, f"has {parts.vocab_size:,} tokens but an embedding of {config['vocab_size']:,} rows")
    ids = {"bos_token_id": parts.bos_id, "eos_token_id": parts.eos_id, "pad_token_id": parts.pad_id}
    ids = {key: value for key, value in ids.items() if value is not None}
    ends = sorted(parts.eos_ids)
    stops = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    files = dict(parts.files) | {"generation_config.json": _json(ids | stops | settings)}
    from steelyard.model.formats import save_folder  # torch: after everything that may refuse the file

    save_folder(out, config | ids, _tensors(header, config, progress or Silent()), files)


def check_generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The generation settings, checked: do_sample, temperature, top_p, top_k. Raises UsageError otherwise."""
    rules: dict[str, tuple[str, Any]] = {
        "do_sample": ("true or false", lambda value: isinstance(value, bool)),
        "temperature": ("a number above 0", lambda value: _number(value) and 0 < value <= 100),
        "top_p": ("a number above 0, at most 1", lambda value: _number(value) and 0 < value <= 1),
        "top_k": ("a whole number from 0", lambda value: type(value) is int and 0 <= value <= 1_000_000),
    }
    for key, value in settings.items():
        if key not in rules:
            raise UsageError(f"generation.{key}: unknown setting; known are {', '.join(rules)}")
        if not rules[key][1](value):
            raise UsageError(f"generation.{key}: is {quote(value)}, must be {rules[key][0]}")
    return dict(settings)


def _stored_sampling(header: GGUFHeader) -> dict[str, Any]:
    """The settings under `general.sampling` as generation_config.json says them; what transformers does anyway is left
    out. None at all, or a temperature of 0: greedy."""
    found = {name: header.metadata.get(f"general.sampling.{key}") for key, name in SAMPLING_KEYS.items()}
    found = {key: float(str(np.float32(v))) if type(v) is float else v for key, v in found.items() if v is not None}
    if not found or found.get("temperature") == 0:
        return {}
    try:
        settings = check_generation({"do_sample": True} | found)
    except UsageError as error:
        _refuse(header, f"general.sampling: {error}", "convert the model again")
    return {key: value for key, value in settings.items() if SAMPLING_DEFAULTS.get(key) != value}


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _refuse(header: GGUFHeader, what: str, remedy: str = "use a model of the plain LLaMA architecture") -> NoReturn:
    raise FormatError(f"{header.path}: {what}: {remedy}")


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


# --- configuration ----------------------------------------------------------------------------------------------------


def _whole(header: GGUFHeader, key: str, default: int | None = None) -> int:
    value = header.metadata.get(f"llama.{key}", default)
    if type(value) is not int or not 0 < value < 1 << 31:
        _refuse(header, f"llama.{key} is {quote(value)}, must be one positive whole number")
    return value


def _real(header: GGUFHeader, key: str, default: float | None = None) -> float:
    """A float32 of the file as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    value = header.metadata.get(f"llama.{key}", default)
    if type(value) is not float or not math.isfinite(value) or value <= 0:
        _refuse(header, f"llama.{key} is {quote(value)}, must be one positive number")
    return float(str(np.float32(value)))


def _config(header: GGUFHeader) -> dict[str, Any]:
    for key, value in header.metadata.items():
        name = key.removeprefix("llama.")
        if key.startswith("llama.") and name not in _READ and not (name in _HARMLESS and value == _HARMLESS[name]):
            _refuse(header, f"{key} is {quote(value)}, which is not understood")
    heads = _whole(header, "attention.head_count")
    width = _whole(header, "embedding_length")
    kv_heads = _whole(header, "attention.head_count_kv", heads)
    head_dim = _whole(header, "attention.key_length", width // heads)
    if heads % kv_heads or head_dim % 2:
        _refuse(header, f"has {heads} heads of size {head_dim} over {kv_heads} key heads, which cannot be")
    for key in ("attention.value_length", "rope.dimension_count"):
        if _whole(header, key, head_dim) != head_dim:
            _refuse(header, f"llama.{key} differs from the head size {head_dim}")
    if _EMBEDDING not in header.tensors:
        _refuse(header, f"has no {_EMBEDDING}")
    theta = _real(header, "rope.freq_base", 10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": header.tensors[_EMBEDDING].shape[0],
        "hidden_size": width,
        "intermediate_size": _whole(header, "feed_forward_length"),
        "num_hidden_layers": _whole(header, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _whole(header, "context_length"),
        "rms_norm_eps": _real(header, "attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(header, theta, head_dim),
        "tie_word_embeddings": _HEAD not in header.tensors,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "torch_dtype": "bfloat16",
    }


def _rope_scaling(header: GGUFHeader, theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = header.metadata.get("llama.rope.scaling.type", "none")
    linear = "llama.rope.scale_linear" in header.metadata  # what files of 2023 say
    if kind not in ("none", "linear"):
        _refuse(header, f"llama.rope.scaling.type is {quote(kind)}; none, linear and llama3 are read")
    if ROPE_FREQS in header.tensors:
        if kind == "linear" or linear:
            _refuse(header, f"has both linear RoPE scaling and {ROPE_FREQS}")
        return _llama3_scaling(header, theta, head_dim)
    if kind == "linear" or linear:
        factor = _real(header, "rope.scaling.factor" if kind == "linear" else "rope.scale_linear")
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    return None


def _llama3_scaling(header: GGUFHeader, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Find the scaling behind `rope_freqs.weight`, the divisor of each frequency, and prove that it is that one.

    Llama 3.1 (Meta, 2024): wavelengths over context / low are stretched by the factor, those under context / high are
    kept, those between are interpolated. Anything else raises FormatError.
    """
    tensor = header.tensors[ROPE_FREQS]
    if tensor.kind != "F32" or tensor.shape != (head_dim // 2,):
        _refuse(header, f"{ROPE_FREQS} must be {head_dim // 2} float32 numbers")
    found = _raw(header, tensor).view("<f4").astype(np.float64)
    factor = float(str(found.max().astype(np.float32)))
    if not np.isfinite(found).all() or factor < 1:
        _refuse(header, f"{ROPE_FREQS} holds an impossible divisor")
    if factor == 1 and found.min() == 1:
        return None
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (_LLAMA3_CONTEXT / wavelength - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    expected = 1 / ((1 - smooth.clip(0, 1)) / factor + smooth.clip(0, 1))
    if not np.allclose(found, expected, rtol=1e-4):
        _refuse(header, f"{ROPE_FREQS} is not Llama 3's scaling (low 1, high 4, context 8192)")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


# --- weights ----------------------------------------------------------------------------------------------------------


def _raw(header: GGUFHeader, tensor: GGUFTensorInfo) -> Array:
    return np.fromfile(header.path, dtype=np.uint8, count=tensor.end - tensor.start, offset=tensor.start)


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape of every tensor that this configuration (keys of config.json, all present) has."""
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "attn_norm": (width,),
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_norm": (width,),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (vocab, width), _NORM: (width,)}
    if not config["tie_word_embeddings"]:
        shapes[_HEAD] = (vocab, width)
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"blk.{number}.{name}.weight": shape for name, shape in layer.items()}
        biased = (_ATTENTION if config["attention_bias"] else ()) + (_MLP if config["mlp_bias"] else ())
        shapes |= {f"blk.{number}.{name}.bias": layer[name][:1] for name in biased}
    return shapes


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor that `tensor_shapes` lists."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        return f"model.layers.{match.group(1)}.{_LAYER[match.group(2)]}.{match.group(3)}"
    return {_EMBEDDING: "model.embed_tokens.weight", _HEAD: "lm_head.weight", _NORM: "model.norm.weight"}[name]


def _tensors(header: GGUFHeader, config: Mapping[str, Any], progress: Progress) -> dict[str, torch.Tensor]:
    import torch

    if config["num_hidden_layers"] > len(header.tensors):
        _refuse(header, f"claims {config['num_hidden_layers']:,} layers but has {len(header.tensors):,} tensors")
    shapes = tensor_shapes(config)
    for name in header.tensors:
        if name not in shapes and name != ROPE_FREQS:
            _refuse(header, f"has the tensor {quote(name)}, which is not understood")
    for name, shape in shapes.items():
        if name not in header.tensors:
            _refuse(header, f"lacks the tensor {name}", "convert the model again")
        if header.tensors[name].shape != shape:
            _refuse(header, f"tensor {name} has shape {list(header.tensors[name].shape)}, must have {list(shape)}")
    tensors: dict[str, torch.Tensor] = {}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    total = sum(math.prod(shape) for shape in shapes.values()) / 1e6
    with progress.task("read the GGUF's weights", total, "M values") as task:
        for name, shape in shapes.items():
            values = _dequantize(header, header.tensors[name])
            short = name.rsplit(".", 2)[-2]
            if short in heads:
                values = _unpermute(values, heads[short])
            tensors[hugging_face_name(name)] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
            task.advance(math.prod(shape) / 1e6)
    return tensors


def _dequantize(header: GGUFHeader, tensor: GGUFTensorInfo) -> Array:
    """The values of a tensor as float32, in its shape."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise require_extra("gguf", "models") from None
    rows = _raw(header, tensor).reshape(*tensor.shape[:-1], -1)
    values: Array = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind])
    return values.reshape(tensor.shape).astype(np.float32, copy=False)


def _unpermute(values: Array, heads: int) -> Array:
    """Rows of a query or key projection from llama.cpp's order to Hugging Face's.

    llama.cpp rotates neighbouring pairs of a head, Hugging Face its first half against its second: row 2i + j of a head
    there is row j * half + i here.
    """
    rows, *rest = values.shape  # a bias has no further dimension
    return values.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)

"""The whole LLaMA decoder, top to bottom: configuration, rotary positions, attention, block, model.

Parameter names and layouts are Hugging Face's own (`model.layers.0.self_attn.q_proj.weight`, rotary halves split, not
interleaved), so a checkpoint's state dict loads as it is. Letters in shape comments: B rows, T tokens, C hidden size,
H query heads, K key/value heads, G = H / K queries per key/value head, D head size, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steelyard.base.errors import FormatError
from steelyard.model.packed import Documents, together

MAX_LAYERS = 1024  # a configuration may claim anything; no LLaMA has more than a few hundred


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base and scaling variant, named as in transformers 5 (`rope_parameters`)."""

    theta: float = 10_000.0
    type: str = "default"  # default | linear | dynamic | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class LlamaConfig:
    """The part of a Hugging Face `config.json` that decides what the model computes. Names and defaults are theirs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: Rope = Rope()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> LlamaConfig:
        """Read a parsed `config.json`, of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

        Keys that transformers' LLaMA ignores are ignored. Raises FormatError naming `source` and the key for another
        architecture or activation, quantised weights, an unknown RoPE variant and impossible shapes.
        """
        keys = _Keys(raw, source)
        keys.only("model_type", {"llama"})
        if "architectures" in raw and raw["architectures"] not in (None, ["LlamaForCausalLM"]):
            raise keys.refuse("architectures", "only LlamaForCausalLM is supported")
        keys.only("hidden_act", {"silu"}, default="silu")
        for name in ("quantization_config", "compression_config"):
            if raw.get(name) is not None:
                raise keys.refuse(name, "quantised checkpoints are not supported: use the unquantised one, or its GGUF")
        if raw.get("is_encoder_decoder"):
            raise keys.refuse("is_encoder_decoder", "only decoders are supported")

        hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
        kv_heads = keys.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise keys.refuse("num_key_value_heads", f"must divide num_attention_heads ({heads})")
        if raw.get("head_dim") is None and hidden % heads:
            raise keys.refuse("hidden_size", f"must be a multiple of num_attention_heads ({heads}) without a head_dim")
        head_dim = keys.size("head_dim", hidden // heads)
        if head_dim % 2:
            raise keys.refuse("head_dim", "must be even: rotary embedding turns pairs")
        layers = keys.size("num_hidden_layers")
        if layers > MAX_LAYERS:
            raise keys.refuse("num_hidden_layers", f"more than {MAX_LAYERS} layers is no LLaMA")
        positions = keys.size("max_position_embeddings", 2048)
        return cls(
            vocab_size=keys.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=keys.size("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=keys.positive("rms_norm_eps", 1e-6),
            initializer_range=keys.positive("initializer_range", 0.02),
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            attention_bias=keys.flag("attention_bias"),
            mlp_bias=keys.flag("mlp_bias"),
            rope=_read_rope(keys, positions),
        )


class _Keys:
    """Typed access to a configuration; every complaint names the file and the key."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source

    def refuse(self, key: str, why: str) -> FormatError:
        return FormatError(f"{self.source}: {key} = {self.raw.get(key)!r}: {why}")

    def only(self, key: str, allowed: set[str], default: str | None = None) -> str:
        value = self.raw.get(key, default)
        if value not in allowed:
            raise self.refuse(key, f"only {', '.join(sorted(allowed))} is supported")
        return str(value)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise FormatError(f"{self.source}: {key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise self.refuse(key, "must be a whole number of at least 1")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise FormatError(f"{self.source}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.refuse(key, "must be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if not isinstance(value, bool | None):
            raise self.refuse(key, "must be true or false")
        return bool(value)


def _read_rope(keys: _Keys, positions: int) -> Rope:
    old, new = keys.raw.get("rope_scaling"), keys.raw.get("rope_parameters")
    if old and new and old != new:
        raise keys.refuse("rope_scaling", "contradicts rope_parameters: keep one of the two")
    name = "rope_scaling" if old else "rope_parameters"
    raw = old or new or {}
    if not isinstance(raw, dict):
        raise keys.refuse(name, "must be a mapping")
    inner = _Keys(raw, f"{keys.source}: {name}")
    theta = inner.positive("rope_theta", keys.positive("rope_theta", 10_000.0))
    if keys.raw.get("rope_theta", theta) != theta:
        raise keys.refuse("rope_theta", f"contradicts {name}.rope_theta = {theta}")
    for place in (keys, inner):
        if place.raw.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise place.refuse("partial_rotary_factor", "only whole heads are rotated here")
    key = "rope_type" if "rope_type" in raw else "type"
    kind = inner.only(key, {"default", "linear", "dynamic", "llama3"}, default="default")
    if kind == "default":
        return Rope(theta=theta)
    factor = inner.positive("factor")
    if factor < 1:
        raise inner.refuse("factor", "must be at least 1")
    if kind != "llama3":
        return Rope(theta=theta, type=kind, factor=factor)
    low, high = inner.positive("low_freq_factor"), inner.positive("high_freq_factor")
    if high <= low:
        raise inner.refuse("high_freq_factor", f"must be greater than low_freq_factor ({low})")
    # transformers lets a top-level value win over the one inside
    original = keys.size("original_max_position_embeddings", inner.size("original_max_position_embeddings", positions))
    return Rope(theta, kind, factor, low, high, original)


def rope_frequencies(config: LlamaConfig, length: int) -> Tensor:
    """Radians per position of each rotated pair for a sequence of `length` tokens: float32 [D / 2].

    `dynamic` (NTK) stretches the base only for sequences longer than `max_position_embeddings`; the others do not
    depend on `length`. Formulas and order of operations are those of transformers' `modeling_rope_utils.py`.
    """
    rope, dim = config.rope, config.head_dim
    base = rope.theta
    if rope.type == "dynamic" and length > config.max_position_embeddings:
        stretch = rope.factor * length / config.max_position_embeddings - (rope.factor - 1)
        base *= stretch ** (dim / (dim - 2))
    frequencies = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type != "llama3":
        return frequencies
    # llama3: keep short wavelengths, divide long ones by the factor, go smoothly from one to the other in between
    old = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / frequencies
    smooth = (old / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(wavelength > old / rope.low_freq_factor, frequencies / rope.factor, between)
    return torch.where(wavelength < old / rope.high_freq_factor, frequencies, scaled)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of [B, T, heads, D] by its position's angle; cos and sin are [B or 1, T, 1, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 whatever the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries: query head h reads key/value head h // G."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width, kv_width, bias = self.heads * self.head_dim, self.kv_heads * self.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, tokens, _ = x.shape
        q = self.q_proj(x).view(rows, tokens, self.heads, self.head_dim)
        k = self.k_proj(x).view(rows, tokens, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(rows, tokens, self.kv_heads, self.head_dim)
        qk = rotate(torch.cat((q, k), dim=2), cos, sin)  # [B, T, H + K, D], in one go
        q, k = qk[:, :, : self.heads], qk[:, :, self.heads :]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, D], [B, K, T, D], [B, K, T, D]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Whole sequences [B, T, C] from position 0."""
        rows, tokens, _ = x.shape
        q, k, v = self.project(x, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(rows, tokens, -1))  # [B, T, C]
        return out


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """Attention, then MLP, each on the normalised stream and added to it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    def packed(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents, recompute: bool) -> Tensor:
        """x [T, C] of whole documents; `recompute`: activations inside are computed again in the backward pass."""
        if recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(
                self._packed, x, cos, sin, documents, use_reentrant=False, preserve_rng_state=False
            )
            return out
        return self._packed(x, cos, sin, documents)

    def _packed(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents) -> Tensor:
        # Two parts with attention between: they do not depend on the documents, so that they can be compiled.
        q, k, v = self.before_attention(x, cos, sin)
        return self.after_attention(x, documents.attend(q, k, v))

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, C] to rotated q [T, H, D] and k [T, K, D], and v [T, K, D]; cos and sin float32 [T, 1, D]."""
        attention, dtype = self.self_attn, x.dtype
        q, k, v = together(self.input_layernorm(x), attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (part.view(len(x), -1, attention.head_dim) for part in (q, k, v))
        return rotate(q, cos, sin).to(dtype), rotate(k, cos, sin).to(dtype), v

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """The stream x [T, C] plus attention's output [T, H, D], then plus the MLP's."""
        x = x + self.self_attn.o_proj(attended.flatten(1))
        gate, up = together(self.post_attention_layernorm(x), self.mlp.gate_proj, self.mlp.up_proj)
        out: Tensor = x + self.mlp.down_proj(F.silu(gate) * up)
        return out


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what checkpoints call `model.`"""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        # Not its own initialisation: on the meta device, where weights are loaded, that imports the compiler (1.5 s).
        unset = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=unset)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A LLaMA language model. A tied head has no parameter of its own."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.activation_checkpointing = False  # `packed` then keeps only each block's input for the backward pass
        # not a buffer: `.to(bfloat16)` must leave it in float32
        self.frequencies = rope_frequencies(config, config.max_position_embeddings)

    def initialise(self, seed: int) -> Llama:
        """Fresh weights, normal(0, initializer_range), zero biases, unit norms; the same for the same seed (CPU)."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] after every token of int64 [B, T], in the model's dtype; rows are not padded on the left.

        Padding on the right is harmless: attention is causal, so no real token sees it.
        """
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """The final, normalised stream [B, T, C] of whole sequences [B, T]."""
        x, cos, sin = self._enter(tokens, torch.arange(tokens.shape[1], device=tokens.device)[None])
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.model.norm(x)
        return out

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, C]; the embedding's own where they are tied."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., V] of the final stream [..., C]."""
        return F.linear(x, self.head_weight)

    def packed(self, tokens: Tensor, positions: Tensor, lengths: Sequence[int] | Documents) -> Tensor:
        """The final, normalised stream [T, C] of documents that lie one after another, for training.

        tokens, positions int64 [T]; `lengths` of the documents sum to T. Attention never crosses a document.
        """
        documents = lengths if isinstance(lengths, Documents) else Documents(lengths, tokens.device)
        if len(tokens) != sum(documents.lengths):
            raise ValueError(f"{len(tokens)} tokens, but documents of {sum(documents.lengths)} together")
        x = self.through(range(self.config.num_hidden_layers), self.model.embed_tokens(tokens), positions, documents)
        out: Tensor = self.model.norm(x)
        return out

    def through(self, layers: range, x: Tensor, positions: Tensor, documents: Documents) -> Tensor:
        """The stream x [T, C] of packed documents after `layers`: a part of what `packed` does."""
        cos, sin = self._packed_rotary(positions, documents.lengths)
        for number in layers:
            layer = self.model.layers[number]
            assert isinstance(layer, Block)
            x = layer.packed(x, cos, sin, documents, self.activation_checkpointing)
        return x

    def _packed_rotary(self, positions: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines float32 [T, 1, D]; `dynamic` scaling goes by each document's own length."""
        config, frequencies = self.config, self.frequencies
        if config.rope.type == "dynamic" and max(lengths) > config.max_position_embeddings:
            rows = [rope_frequencies(config, n).expand(n, -1) for n in lengths]
            frequencies = torch.cat(rows)  # [T, D / 2]
        angles = positions[:, None].float() * frequencies.to(positions.device)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def _enter(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x: Tensor = self.model.embed_tokens(tokens)
        frequencies = self.frequencies
        if self.config.rope.type == "dynamic" and tokens.shape[1] > self.config.max_position_embeddings:
            frequencies = rope_frequencies(self.config, tokens.shape[1])
        angles = positions[:, :, None].float() * frequencies.to(x.device)  # [B or 1, T, D / 2]
        angles = torch.cat((angles, angles), dim=-1)[:, :, None]  # [B or 1, T, 1, D]
        return x, angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def load_llama(folder: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Llama:
    """The model of a Hugging Face folder, in evaluation mode, without gradients.

    `dtype` None keeps the stored dtype. Raises FormatError for an unsupported configuration, a missing, surplus or
    misshapen tensor (named, with both shapes), integer weights, and mixed dtypes where no `dtype` is asked for.
    """
    from steelyard.model.formats import load_tensors

    source = folder / "config.json"
    try:
        raw = json.loads(source.read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(f"{source}: no readable model configuration: {error}") from error
    if not isinstance(raw, dict):
        raise FormatError(f"{source}: must be a mapping")
    config = LlamaConfig.from_dict(raw, str(source))
    return from_tensors(config, load_tensors(folder), str(folder), dtype=dtype, device=device)


def from_tensors(
    config: LlamaConfig,
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Llama:
    """A model over `tensors` (Hugging Face names), which it shares where neither dtype nor device changes.

    Errors as in `load_llama`; `source` names the tensors' origin in them.
    """
    with torch.device("meta"):
        model = Llama(config)
    given = dict(_canonical(config, tensors, source))
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    for name, shape in wanted.items():
        if name not in given:
            raise FormatError(f"{source}: tensor {name} {list(shape)} is missing")
        if tuple(given[name].shape) != shape:
            found = list(given[name].shape)
            raise FormatError(f"{source}: tensor {name} is {found}; config.json says {list(shape)}")
    for name, tensor in given.items():
        if name not in wanted:
            raise FormatError(f"{source}: tensor {name} {list(tensor.shape)} has no place in the model of config.json")
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise FormatError(f"{source}: tensor {name} is {tensor.dtype}: only floating-point weights are supported")
    kinds = {str(tensor.dtype) for tensor in given.values()}
    if dtype is None and len(kinds) > 1:
        raise FormatError(f"{source}: tensors of several dtypes ({', '.join(sorted(kinds))}): name the dtype to run in")
    model.load_state_dict(
        {name: tensor.to(device=device, dtype=dtype) for name, tensor in given.items()}, strict=True, assign=True
    )
    return model.eval().requires_grad_(False)


def _canonical(config: LlamaConfig, tensors: Mapping[str, Tensor], source: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if name.endswith(".rotary_emb.inv_freq"):
            continue  # derived from the configuration; LLaMA's first conversions stored it
        if name == "lm_head.weight" and config.tie_word_embeddings:
            embedding = tensors.get("model.embed_tokens.weight")
            if embedding is None or not torch.equal(tensor, embedding):
                raise FormatError(
                    f"{source}: tensor lm_head.weight {list(tensor.shape)} differs from model.embed_tokens.weight, "
                    "but config.json says tie_word_embeddings"
                )
            continue
        yield name, tensor

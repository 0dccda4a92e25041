"""A model with its paged key/value cache: prefill and decode steps over token ids. It knows nothing of requests.

Keys and values lie in pages of PAGE tokens, so that sequences of any length share one arena and a common prefix is
stored once. The arithmetic is that of `model/llama.py` (tests hold the two together); here query, key and value
projections are one product, and so are gate and up, because decoding is bound by reading weights and by small steps.
Letters in shape comments: B rows, T packed tokens, W pages of a table, C hidden size, H query heads, K key/value heads,
D head size, P pages.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steelyard.inference import kernels
from steelyard.inference.kernels import Kernels, Network, side_by_side
from steelyard.inference.quantize import Int8Linear
from steelyard.model.llama import Block, Llama, LlamaConfig, RMSNorm, rope_frequencies, rotate

PAGE = 16  # tokens: one AVX-512 register of float32 scores


class Executor:
    """Runs one model's steps on the pages it owns.

    Page 0 is scratch: padding of a page table points there, and an allocator must never hand it out. The model's
    projections are fused in place: its parameters become views. Compiled kernels read weights in an order of their own,
    of which they hold a copy beside the model's.
    """

    def __init__(self, model: Llama, pages: int, head: Tensor | None = None) -> None:
        """`head` [K, C]: what is computed of the stream in place of the model's token logits (a classifier's)."""
        config, weight = model.config, model.model.embed_tokens.weight
        self.model, self.config, self.pages = model, config, pages
        self.device, self.dtype = weight.device, weight.dtype
        shape = (pages, config.num_key_value_heads)
        # zeros, not empty: a hidden slot has weight 0, and 0 times a NaN left in memory would be NaN.
        # Within a page the kernels keep an order of their own.
        self.keys = [_blank(weight, *shape, PAGE, config.head_dim) for _ in range(config.num_hidden_layers)]
        self.values = [_blank(weight, *shape, PAGE, config.head_dim) for _ in range(config.num_hidden_layers)]
        served = self.device.type == "cpu" and kernels.serves(self.dtype, config)
        self.kernels = kernels.load(self.dtype) if served else None
        self.layers = [_Layer(block, self.kernels) for block in model.model.layers if isinstance(block, Block)]
        if head is None:
            head = (model.model.embed_tokens if model.lm_head is None else model.lm_head).weight
        self.head = Linear(head, None, self.kernels)
        positions = torch.arange(min(config.max_position_embeddings, pages * PAGE), dtype=torch.float32)
        angles = positions[:, None] * rope_frequencies(config, config.max_position_embeddings)
        angles = torch.cat((angles, angles), dim=-1).to(self.device)
        self.cos, self.sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)  # [positions, D]
        self.network = self._network()

    def _network(self) -> Network | None:
        """The model for `Kernels.forward`; None where a projection is not for it (8 bits), or there are no kernels."""
        layers: list[list[Tensor | None]] = []
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            parts = [part for part in (layer.qkv, layer.out, layer.gate_up, layer.down) if isinstance(part, Linear)]
            if self.kernels is None or len(parts) < 4:
                return None
            qkv, out, gate_up, down = ((part.packed, part.packed_bias) for part in parts)
            layers.append([layer.norm.weight, *qkv, *out, layer.mlp_norm.weight, *gate_up, *down, keys, values])
        assert self.head.packed is not None
        stream = (self.model.model.embed_tokens.weight, self.model.model.norm.weight, self.head.packed)
        return Network(self.config, len(self.head.weight), layers, (*stream, self.cos, self.sin))

    @staticmethod
    def bytes_per_page(config: LlamaConfig, dtype: torch.dtype) -> int:
        """Memory of one page over all layers."""
        return 2 * PAGE * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def copy_page(self, source: int, target: int) -> None:
        """All layers' keys and values of page `source` to page `target`."""
        for tensors in (self.keys, self.values):
            for pages in tensors:
                pages[target] = pages[source]

    def clear(self, pages: Sequence[int]) -> None:
        """Zero `pages`: after logits that were not finite, what hides a slot (a weight of 0) would not hide a NaN."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[list(pages)] = 0

    def finite(self, pages: Sequence[int]) -> bool:
        """Whether every key and value in `pages` is finite."""
        where = list(pages)
        return all(bool(tensor[where].isfinite().all()) for tensors in (self.keys, self.values) for tensor in tensors)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        tables: Sequence[Sequence[int]],
        *,
        every: bool = False,
    ) -> Tensor:
        """Read sequences into their pages, in one packed pass without padding; logits [n, V] after each one's last
        token, or [T, V] after `every` token.

        `tokens[i]` are positions `starts[i]`... of the sequence whose pages are `tables[i]`; positions before them are
        in its pages already (a shared prefix, or an earlier part).
        """
        lengths = torch.tensor([len(part) for part in tokens])
        width = max(-(-(start + len(part)) // PAGE) for start, part in zip(starts, tokens, strict=True))
        padded = [[*table[:width], *[0] * (width - len(table))] for table in tables]
        flat = torch.tensor([token for part in tokens for token in part], device=self.device)
        firsts = F.pad(lengths.cumsum(0), (1, 0)).to(self.device)  # [n + 1]
        where = torch.tensor(starts, device=self.device)
        pages = torch.tensor(padded, dtype=torch.int32, device=self.device)
        return self._pass(flat, firsts, where, pages, None if every else firsts[1:] - 1)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, lengths: Tensor, tables: Tensor) -> Tensor:
        """Logits [B, V] after one more token [B] (int64) of each row.

        `lengths` int64 [B] are the tokens a row has cached, so the position of the new one; `tables` int32 [B, W] its
        pages, padded with 0. All of a row's pages up to that position must lie in the first W.
        """
        if self.kernels is None:
            return self._run(tokens, _DecodeAttention(self, lengths, tables), None)
        return self._pass(tokens, torch.arange(len(tokens) + 1), lengths, tables.contiguous(), None)

    def _pass(self, tokens: Tensor, firsts: Tensor, starts: Tensor, tables: Tensor, wanted: Tensor | None) -> Tensor:
        """Logits after the rows `wanted` (None: all) of sequences packed in `tokens`, as `Kernels.attend` has them."""
        if self.kernels is None:
            return self._run(tokens, _PackedAttention(self, firsts, starts, tables.long()), wanted)
        if self.network is None:
            return self._run(tokens, _KernelAttention(self, self.kernels, firsts, starts, tables), wanted)
        return self.kernels.forward(self.network, tokens, firsts, starts, tables, wanted)

    def _run(self, tokens: Tensor, attention: _Attention, wanted: Tensor | None) -> Tensor:
        """As `_pass`, layer by layer."""
        x = F.embedding(tokens, self.model.model.embed_tokens.weight)  # [T, C]
        step: Tensor | None = None
        for i, layer in enumerate(self.layers):
            y, x = self._normalise(x, step, layer.norm)
            mixed = attention(i, self._linear(y, layer.qkv))
            step = self._linear(mixed, layer.out)
            if wanted is not None and i + 1 == len(self.layers):  # the last MLP is for the wanted rows only
                x, step = x[wanted], step[wanted]
            y, x = self._normalise(x, step, layer.mlp_norm)
            step = self._mlp(y, layer)
        y, _ = self._normalise(x, step, self.model.model.norm)
        return self._linear(y, self.head)

    def _linear(self, x: Tensor, layer: Linear | Int8Linear) -> Tensor:
        """x [T, I] through `layer`: [T, O]."""
        if isinstance(layer, Int8Linear):
            eight: Tensor = layer(x)
            return eight
        if layer.packed is None or self.kernels is None:
            return F.linear(x, layer.weight, layer.bias)
        return self.kernels.linear(x, layer.packed, layer.packed_bias, x.new_empty(len(x), len(layer.weight)))

    def _mlp(self, y: Tensor, layer: _Layer) -> Tensor:
        """down(silu(gate(y)) * up(y)), [T, C]."""
        gate, up = self._linear(y, layer.gate_up).chunk(2, dim=-1)
        return self._linear(F.silu(gate) * up, layer.down)

    def _normalise(self, x: Tensor, step: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """The normalised stream, and the stream itself with `step` added (which may happen in place)."""
        if self.kernels is not None:
            return self.kernels.add_norm(x, step, norm.weight, norm.eps, torch.empty_like(x)), x
        if step is not None:
            x = x + step
        return norm(x), x

    def project(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [T, H, D] and keys [T, K, D], and values [T, K, D], of qkv [T, (H + 2 K) * D]."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = qkv.view(len(qkv), heads + 2 * kv_heads, self.config.head_dim)
        both, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        both = rotate(both, self.cos[positions][:, None], self.sin[positions][:, None])
        return both[:, :heads], both[:, heads:], v


class _Attention(Protocol):
    """One pass's attention: of a layer's qkv [T, (H + 2 K) * D], which it also stores in the pages: [T, H * D]."""

    def __call__(self, layer: int, qkv: Tensor) -> Tensor: ...


class _KernelAttention:
    """Both kinds of pass, compiled, between projections in 8 bits."""

    def __init__(self, own: Executor, kernels: Kernels, firsts: Tensor, starts: Tensor, tables: Tensor) -> None:
        self.own, self.kernels, self.firsts, self.starts, self.tables = own, kernels, firsts, starts, tables

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        own, config = self.own, self.own.config
        out = qkv.new_empty(len(qkv), config.num_attention_heads * config.head_dim)
        turns, cache = (own.cos, own.sin), (own.keys[layer], own.values[layer])
        return self.kernels.attend(qkv, turns, cache, self.firsts, self.starts, self.tables, out, config)


class _PackedAttention:
    """Prefill in plain PyTorch: sequence by sequence."""

    def __init__(self, own: Executor, firsts: Tensor, starts: Tensor, tables: Tensor) -> None:
        self.own, self.tables = own, tables
        self.parts = list(zip(firsts.tolist(), firsts.tolist()[1:], starts.tolist(), strict=False))
        self.positions = torch.cat(
            [torch.arange(start, start + last - first, device=firsts.device) for first, last, start in self.parts]
        )
        owner = torch.arange(len(starts), device=firsts.device).repeat_interleave(firsts.diff())
        self.pages, self.slots = tables[owner, self.positions // PAGE], self.positions % PAGE

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        q, k, v = self.own.project(qkv, self.positions)
        keys, values = self.own.keys[layer], self.own.values[layer]
        keys[self.pages, :, self.slots], values[self.pages, :, self.slots] = k, v
        grouped = q.shape[1] != k.shape[1]
        mixed = []
        for (first, last, start), table in zip(self.parts, self.tables, strict=True):
            mask, part = None, slice(first, last)
            queries, past, mixture = (x[part].transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, D]
            if start:  # what is cached already comes first
                used = table[: -(-(start + last - first) // PAGE)]
                past, mixture = (
                    x[used].transpose(0, 1).flatten(1, 2)[None, :, : start + last - first] for x in (keys, values)
                )
                mask = torch.ones(last - first, start + last - first, dtype=torch.bool, device=q.device).tril_(start)
            y = F.scaled_dot_product_attention(queries, past, mixture, mask, is_causal=mask is None, enable_gqa=grouped)
            mixed.append(y[0].transpose(0, 1).flatten(1))
        return torch.cat(mixed)


class _DecodeAttention:
    """One token a row in plain PyTorch; fixed shapes and no look at a value, so that CUDA can capture it."""

    def __init__(self, own: Executor, lengths: Tensor, tables: Tensor) -> None:
        self.own, self.lengths, self.tables = own, lengths, tables.long()
        self.pages = self.tables.gather(1, (lengths // PAGE)[:, None])[:, 0]
        hidden = torch.arange(tables.shape[1] * PAGE, device=lengths.device) > lengths[:, None]  # [B, L]
        mask = torch.zeros(hidden.shape, dtype=own.dtype, device=lengths.device).masked_fill_(hidden, -math.inf)
        self.mask = mask[:, None, None, :]  # [B, 1, 1, L], for every head and query

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        q, k, v = self.own.project(qkv, self.lengths)
        keys, values = self.own.keys[layer], self.own.values[layer]
        slots = self.lengths % PAGE
        keys[self.pages, :, slots], values[self.pages, :, slots] = k, v
        # The query heads of a group become queries of one head: a plain product, several times faster than enable_gqa
        q = q.reshape(len(q), self.own.config.num_key_value_heads, -1, self.own.config.head_dim)  # [B, K, G, D]
        # [B, W, K, PAGE, D] -> [B, K, L, D]
        past, mixture = (x[self.tables].transpose(1, 2).flatten(2, 3) for x in (keys, values))
        return F.scaled_dot_product_attention(q, past, mixture, self.mask).reshape(len(q), -1)


class Linear:
    """A projection, maybe of several layers side by side, and its packed copy where kernels serve it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels | None, gates: bool = False) -> None:
        self.weight, self.bias = weight, bias
        order = side_by_side if gates else _as_it_is
        self.packed = None if kernels is None else kernels.pack(order(weight))
        self.packed_bias = None if bias is None or kernels is None else order(bias)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


class _Layer:
    """A block's weights, projections fused."""

    def __init__(self, block: Block, kernels: Kernels | None) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.norm, self.mlp_norm = block.input_layernorm, block.post_attention_layernorm
        self.qkv = fuse([attention.q_proj, attention.k_proj, attention.v_proj], kernels)
        self.out = fuse([attention.o_proj], kernels)
        self.gate_up = fuse([mlp.gate_proj, mlp.up_proj], kernels, gates=True)
        self.down = fuse([mlp.down_proj], kernels)


def fuse(layers: Sequence[nn.Linear | Int8Linear], kernels: Kernels | None, gates: bool = False) -> Linear | Int8Linear:
    """One projection that computes `layers` side by side; their parameters become views of its own. `gates`: of two
    layers the first one gates the second one."""
    parts = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not parts:
        return Int8Linear.cat([layer for layer in layers if isinstance(layer, Int8Linear)])
    weight = torch.cat([part.weight for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    start = 0
    for part in parts:
        stop = start + part.out_features
        part.weight = nn.Parameter(weight[start:stop], requires_grad=False)
        if bias is not None:
            part.bias = nn.Parameter(bias[start:stop], requires_grad=False)
        start = stop
    return Linear(weight, bias, kernels, gates)


def _blank(like: Tensor, *shape: int) -> Tensor:
    """Zeros that take memory only when first written: a large cache costs what is used of it."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = math.prod(shape)
    memory = mmap.mmap(-1, max(1, size * like.element_size()))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # a step touches every page of the cache once: few translations
    return torch.frombuffer(memory, dtype=like.dtype, count=size).view(shape)

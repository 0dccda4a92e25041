"""A model with its paged key/value cache: prefill and decode steps over token ids. It knows nothing of requests.

Keys and values lie in pages of PAGE tokens, so that sequences of any length share one arena and a common prefix is
stored once. The arithmetic is that of `model/llama.py` (tests hold the two together); here query, key and value
projections are one product, and so are gate and up, because decoding is bound by reading weights and by small steps.
Letters in shape comments: B rows, T tokens, C hidden size, H query heads, K key/value heads, D head size, P pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steelyard.inference import kernels
from steelyard.model.llama import Block, Llama, LlamaConfig, rope_frequencies

PAGE = 16  # tokens: one AVX-512 register of float32 scores


class Executor:
    """Runs one model's steps on the pages it owns.

    Page 0 is scratch: padding of a page table points there, and an allocator must never hand it out. The model's
    projections are fused in place (its parameters become views), so no weight is held twice.
    """

    def __init__(self, model: Llama, pages: int) -> None:
        config, weight = model.config, model.model.embed_tokens.weight
        self.model, self.config, self.pages = model, config, pages
        self.device, self.dtype = weight.device, weight.dtype
        shape = (pages, config.num_key_value_heads)
        # zeros, not empty: a hidden slot has weight 0, and 0 times a NaN left in memory would be NaN.
        # Keys lie transposed within a page, so that one token's score is one lane of a register.
        self.keys = [weight.new_zeros(*shape, config.head_dim, PAGE) for _ in range(config.num_hidden_layers)]
        self.values = [weight.new_zeros(*shape, PAGE, config.head_dim) for _ in range(config.num_hidden_layers)]
        self.layers = [_Layer(block, config) for block in model.model.layers if isinstance(block, Block)]
        self.head = (model.model.embed_tokens if model.lm_head is None else model.lm_head).weight
        positions = torch.arange(min(config.max_position_embeddings, pages * PAGE), dtype=torch.float32)
        angles = positions[:, None] * rope_frequencies(config, config.max_position_embeddings)
        angles = torch.cat((angles, angles), dim=-1).to(self.device)
        self.cos, self.sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)  # [positions, D]
        self.kernels = kernels.load() if self.device.type == "cpu" and kernels.serves(self.dtype, config) else None

    @staticmethod
    def bytes_per_page(config: LlamaConfig, dtype: torch.dtype) -> int:
        """Memory of one page over all layers."""
        return 2 * PAGE * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def copy_page(self, source: int, target: int) -> None:
        """All layers' keys and values of page `source` to page `target`."""
        for tensors in (self.keys, self.values):
            for pages in tensors:
                pages[target] = pages[source]

    @torch.inference_mode()
    def prefill(
        self, tokens: Sequence[Sequence[int]], starts: Sequence[int], tables: Sequence[Sequence[int]]
    ) -> Tensor:
        """Read sequences into their pages, in one packed pass without padding; logits [n, V] after each one's last.

        `tokens[i]` are positions `starts[i]`... of the sequence whose pages are `tables[i]`; positions before them are
        in its pages already (a shared prefix, or an earlier part).
        """
        # equal shapes side by side, so that they attend in one call
        order = sorted(range(len(tokens)), key=lambda i: (starts[i], len(tokens[i])))
        flat = torch.tensor([token for i in order for token in tokens[i]], device=self.device)
        places = [starts[i] + j for i in order for j in range(len(tokens[i]))]
        homes = [tables[i][(starts[i] + j) // PAGE] for i in order for j in range(len(tokens[i]))]
        positions = torch.tensor(places, device=self.device)
        pages = torch.tensor(homes, device=self.device)
        spans = _spans([(starts[i], len(tokens[i]), tables[i]) for i in order], self.device)
        x = F.embedding(flat, self.model.model.embed_tokens.weight)  # [T, C]
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # [T, 1, D]
        slots = positions % PAGE
        ends = torch.tensor([len(tokens[i]) for i in order], device=self.device).cumsum(0) - 1
        step: Tensor | None = None
        for i, layer in enumerate(self.layers):
            y, x = self._normalise(x, step, layer.norm)
            q, k, v = self._project(layer, y, cos, sin)  # [T, H, D], [T, K, D], [T, K, D]
            self.keys[i][pages, :, :, slots] = k
            self.values[i][pages, :, slots] = v
            mixed = torch.cat([self._attend_span(i, span, q, k, v) for span in spans])
            step = layer.out(mixed)
            y, x = self._normalise(x, step, layer.mlp_norm)
            if i + 1 == len(self.layers):  # of the last layer only the sequences' last tokens matter
                x, y = x[ends], y[ends]
            step = layer.down(self._gate(layer.gate_up(y)))
        y, _ = self._normalise(x, step, self.model.model.norm)
        logits = F.linear(y, self.head)
        back = torch.empty_like(ends)
        back[torch.tensor(order, device=self.device)] = torch.arange(len(order), device=self.device)
        return logits[back]

    @torch.inference_mode()
    def decode(self, tokens: Tensor, lengths: Tensor, tables: Tensor) -> Tensor:
        """Logits [B, V] after one more token [B] (int64) of each row.

        `lengths` int64 [B] are the tokens a row has cached, so the position of the new one; `tables` int32 [B, W] its
        pages, padded with 0. All of a row's pages up to that position must lie in the first W.
        """
        x = F.embedding(tokens, self.model.model.embed_tokens.weight)  # [B, C]
        see = None if self.kernels else _Sight(lengths, tables, self.dtype)
        cos, sin = self.cos[lengths][:, None], self.sin[lengths][:, None]  # [B, 1, D]
        step: Tensor | None = None
        for i, layer in enumerate(self.layers):
            y, x = self._normalise(x, step, layer.norm)
            if see is None:
                assert self.kernels is not None
                mixed = self.kernels.attend(
                    layer.qkv(y), cos, sin, self.keys[i], self.values[i], lengths, tables, self.config
                )
            else:
                q, k, v = self._project(layer, y, cos, sin)
                self.keys[i][see.page, :, :, see.slot] = k
                self.values[i][see.page, :, see.slot] = v
                mixed = self._attend_pages(i, q, see)
            step = layer.out(mixed)
            y, x = self._normalise(x, step, layer.mlp_norm)
            step = layer.down(self._gate(layer.gate_up(y)))
        y, _ = self._normalise(x, step, self.model.model.norm)
        return F.linear(y, self.head)

    def _normalise(self, x: Tensor, step: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The normalised stream, and the stream itself with `step` added."""
        if step is not None:
            x = x + step
        return norm(x), x

    def _gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def _project(self, layer: _Layer, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = layer.qkv(y).view(len(y), heads + 2 * kv_heads, self.config.head_dim)
        both, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        first, second = both.chunk(2, dim=-1)
        both = both * cos + torch.cat((-second, first), dim=-1) * sin
        return both[:, :heads], both[:, heads:], v

    def _attend_span(self, layer: int, span: _Span, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of `span.rows` sequences of one length and start: [rows * length, H * D]."""
        part = slice(span.first, span.first + span.rows * span.length)
        q, k, v = (x[part].view(span.rows, span.length, -1, self.config.head_dim).transpose(1, 2) for x in (q, k, v))
        mask = None
        if span.pages is not None:  # what is cached already comes first
            width = span.start
            before = self.keys[layer][span.pages].permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :width]
            k = torch.cat((before, k), dim=2)
            v = torch.cat((self.values[layer][span.pages].transpose(1, 2).flatten(2, 3)[:, :, :width], v), dim=2)
            mask = torch.ones(span.length, k.shape[2], dtype=torch.bool, device=q.device).tril_(width)
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return y.transpose(1, 2).reshape(span.rows * span.length, -1)

    def _attend_pages(self, layer: int, q: Tensor, see: _Sight) -> Tensor:
        k = self.keys[layer][see.tables].permute(0, 2, 1, 4, 3).flatten(2, 3)  # [B, W, K, D, PAGE] -> [B, K, L, D]
        v = self.values[layer][see.tables].transpose(1, 2).flatten(2, 3)
        # The query heads of a group become queries of one head: a plain product, several times faster than enable_gqa
        q = q.reshape(len(q), self.config.num_key_value_heads, -1, self.config.head_dim)  # [B, K, G, D]
        return F.scaled_dot_product_attention(q, k, v, see.mask).reshape(len(q), -1)


class _Layer:
    """A block's weights, projections fused."""

    def __init__(self, block: Block, config: LlamaConfig) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.norm, self.mlp_norm = block.input_layernorm, block.post_attention_layernorm
        self.qkv = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = attention.o_proj
        self.gate_up = fuse([mlp.gate_proj, mlp.up_proj])
        self.down = mlp.down_proj


def fuse(parts: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer that computes `parts` side by side; their parameters become views of its own."""
    whole = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), bias=False, device="meta")
    whole.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if parts[0].bias is not None:
        whole.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    start = 0
    for part in parts:
        stop = start + part.out_features
        part.weight = nn.Parameter(whole.weight[start:stop], requires_grad=False)
        if part.bias is not None:
            part.bias = nn.Parameter(whole.bias[start:stop], requires_grad=False)
        start = stop
    return whole


class _Span:
    """Sequences of one start and length, side by side in a packed pass."""

    def __init__(self, first: int, rows: int, start: int, length: int, pages: Tensor | None) -> None:
        self.first, self.rows, self.start, self.length, self.pages = first, rows, start, length, pages


def _spans(sequences: Sequence[tuple[int, int, Sequence[int]]], device: torch.device) -> list[_Span]:
    spans, first = [], 0
    for (start, length), group in groupby(sequences, key=lambda sequence: sequence[:2]):
        tables = [list(table[: -(-start // PAGE)]) for _, _, table in group]
        pages = torch.tensor(tables, device=device) if start else None  # [rows, W]
        spans.append(_Span(first, len(tables), start, length, pages))
        first += len(tables) * length
    return spans


class _Sight:
    """Where one decoding step writes and what it sees, the same in every layer."""

    def __init__(self, lengths: Tensor, tables: Tensor, dtype: torch.dtype) -> None:
        self.tables = tables.long()
        self.page = self.tables.gather(1, (lengths // PAGE)[:, None])[:, 0]
        self.slot = lengths % PAGE
        hidden = torch.arange(tables.shape[1] * PAGE, device=lengths.device) > lengths[:, None]  # [B, L]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill_(hidden, -math.inf)
        self.mask = mask[:, None, None, :]  # [B, 1, 1, L], for every head and query

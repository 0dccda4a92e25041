"""The parts of the decoder's training forward that differ from inference: documents lie one after another in one flat
sequence, linear layers run over all tokens at once, attention never crosses a document.

Letters as in `llama.py`; T is the number of tokens of all documents together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Documents:
    """Where the documents of one flat micro-batch lie, grouped by length: one attention call for each length."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.groups: dict[int, list[int]] = {}
        for index, length in enumerate(self.lengths):
            self.groups.setdefault(length, []).append(index)
        self.longest = max(self.lengths)
        self.bounds: Tensor | None = None  # int32 [N + 1], only where the variable-length kernel runs
        if device.type == "cuda":
            ends = torch.tensor((0, *self.lengths), dtype=torch.int64).cumsum(0)
            self.bounds = ends.to(device=device, dtype=torch.int32)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend` over these documents; preference pairs that share a prompt have their own (`model/pairs.py`)."""
        return attend(q, k, v, self)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document: q [T, H, D], k and v [T, K, D] -> [T, H, D]."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):  # not measured: no GPU was at hand
        return _variable_length(q, k, v, documents)
    if len(documents.groups) == 1:
        shape = (len(documents.lengths), documents.longest)
        return _same_length(q.unflatten(0, shape), k.unflatten(0, shape), v.unflatten(0, shape)).flatten(0, 1)
    parts = [x.split(documents.lengths) for x in (q, k, v)]
    out: list[Tensor] = [q] * len(documents.lengths)
    for members in documents.groups.values():
        stacked = (torch.stack([part[i] for i in members]) for part in parts)
        for i, y in zip(members, _same_length(*stacked).unbind(), strict=True):
            out[i] = y
    return torch.cat(out)


def _same_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[N, L, H, D], [N, L, K, D] twice -> [N, L, H, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def _variable_length(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = documents.bounds, documents.longest
    assert bounds is not None
    out = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1]
    )
    assert isinstance(out, Tensor)
    return out


def together(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """Each layer's output for the same x. Plain linear layers run as one product over their stacked weights."""
    if not all(type(layer) is nn.Linear and layer.bias is None for layer in layers):
        return [layer(x) for layer in layers]
    weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    return F.linear(x, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)

"""Weights in 8 bits: half the memory of bf16, and faster where reading the weights is the work (few rows at a time).

Symmetric, one scale an output channel, round to nearest. Activations, embeddings, norms and the output head stay as
they are. A quantised model is another model: it needs its own test.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steelyard.model.llama import Block, Llama

# torch's int8 product is 1.5 to 2 times as fast as bf16 for few rows, and several times slower for many (measured on
# a two-core AVX-512 machine, for the shapes of SmolLM2): those take the weights through the model's dtype.
FEW_ROWS = 8


class Int8Linear(nn.Module):
    """y = x W^T + b with W = data * scale: data int8 [O, I], scale [O] and bias [O] in the dtype of x."""

    def __init__(self, data: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = data.shape
        self.data: Tensor
        self.scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Linear:
        """`layer` in 8 bits. The error of a weight is at most half a step: its row's largest magnitude / 254."""
        wide = layer.weight.float()
        # The scale is rounded first, so that the steps are those that it will be read with
        scale = (wide.abs().amax(dim=1) / 127).to(layer.weight.dtype)
        steps = scale.float().where(scale != 0, 1.0)[:, None]
        return cls((wide / steps).round_().clamp_(-127, 127).to(torch.int8), scale, layer.bias)

    @classmethod
    def cat(cls, parts: Sequence[Int8Linear]) -> Int8Linear:
        """One layer that computes `parts` side by side; they become views of it."""
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts if part.bias is not None])
        whole = cls(torch.cat([part.data for part in parts]), torch.cat([part.scale for part in parts]), bias)
        start = 0
        for part in parts:
            stop = start + part.out_features
            part.data, part.scale = whole.data[start:stop], whole.scale[start:stop]
            part.bias = None if bias is None else bias[start:stop]
            start = stop
        return whole

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if len(flat) <= FEW_ROWS and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(flat, self.data, self.scale)
        else:
            y = F.linear(flat, self.data.to(x.dtype)) * self.scale  # whole numbers up to 127 are exact in any dtype
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def quantize(model: Llama) -> Llama:
    """Put the projections of every block into 8 bits, in place."""
    for block in model.model.layers:
        assert isinstance(block, Block)
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, Int8Linear.of(layer))
    return model


def is_quantized(model: Llama) -> bool:
    """Whether `quantize` was applied."""
    return any(isinstance(module, Int8Linear) for module in model.modules())

"""Attention over packed documents: the blocked one of the CPU beside PyTorch's, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from steelyard.model import packed
from steelyard.model.packed import Documents, attend


def inputs(lengths: tuple[int, ...], heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, 16) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def alone(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    parts = zip(*(torch.split(x, list(lengths)) for x in (q, k, v)), strict=True)
    out = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in each), is_causal=True, enable_gqa=True)
        for each in parts
    ]
    return torch.cat([each[0].transpose(0, 1) for each in out])


@pytest.mark.parametrize("lengths", [(130, 130), (1, 200, 64, 65, 3, 63, 200), (7,)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (3, 1)])
def test_value_and_gradient_are_those_of_each_document_alone(
    lengths: tuple[int, ...], heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(lengths, heads, kv_heads, torch.float32)
    expected = alone(*given, lengths)
    slope = torch.randn_like(expected)
    slopes = torch.autograd.grad(expected, given, slope)
    for limit in (1024, 0):  # blocked, and PyTorch's own for each length
        monkeypatch.setattr(packed, "BLOCKED_UP_TO", limit)
        out = attend(*given, Documents(lengths, torch.device("cpu")))
        assert (type(out.grad_fn).__name__ == "_BlockedBackward") == (limit > 0)
        assert torch.allclose(out, expected, atol=1e-5)
        for ours, theirs in zip(torch.autograd.grad(out, given, slope), slopes, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_bfloat16_is_as_close_as_pytorchs() -> None:
    lengths = (150, 40)
    given = inputs(lengths, 4, 2, torch.bfloat16)
    exact = alone(*(x.detach().float() for x in given), lengths)
    ours = attend(*given, Documents(lengths, torch.device("cpu"))).detach()
    theirs = alone(*given, lengths).detach()
    assert ours.dtype is torch.bfloat16
    assert float((ours - exact).norm()) < 1.5 * float((theirs - exact).norm())


def test_without_gradient_nothing_is_kept() -> None:
    given = inputs((10, 20), 4, 2, torch.float32)
    with torch.no_grad():
        out = attend(*given, Documents((10, 20), torch.device("cpu")))
    assert out.grad_fn is None
    assert torch.allclose(out, alone(*given, (10, 20)), atol=1e-5)

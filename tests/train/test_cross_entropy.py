"""Chunked cross-entropy equals the plain one, in value and gradients, and never holds all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steelyard.train.batch import IGNORE
from steelyard.train.losses import chunked_cross_entropy


def inputs(rows: int = 50, width: int = 16, vocabulary: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(rows, width, generator=generator) * 4).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[::7] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 7, 50, None])
def test_value_and_gradients_are_those_of_the_plain_loss(chunk: int | None) -> None:
    hidden, weight, targets = inputs()
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(plain / 3, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, targets, chunk)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss / 3, (hidden, weight)), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_sure_and_hopeless_predictions_stay_finite() -> None:
    hidden = torch.tensor([[300.0, 0.0], [300.0, 0.0]], requires_grad=True)
    weight = torch.eye(2)
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(300.0)
    loss.backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.tensor([[0.0, 0.0], [1.0, -1.0]]))


def test_no_target_no_loss_and_frozen_inputs_get_no_gradient() -> None:
    hidden, weight, targets = inputs()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    weight.requires_grad_(False)
    chunked_cross_entropy(hidden, weight, targets).backward()
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, targets).requires_grad


def test_bfloat16_keeps_the_sum_in_float32() -> None:
    hidden, weight, targets = inputs(2000)
    plain = F.cross_entropy(hidden.bfloat16().float() @ weight.bfloat16().float().T, targets, reduction="sum")
    loss = chunked_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, 64)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-3)
    slope = torch.autograd.grad(loss, weight)[0]
    expected = torch.autograd.grad(plain, weight)[0]
    assert float((slope - expected).norm() / expected.norm()) < 0.01


def test_logits_of_all_rows_never_exist() -> None:
    rows, vocabulary, chunk = 512, 1000, 32
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    hidden, weight, targets = inputs(rows, 8, vocabulary)
    with Watch():
        chunked_cross_entropy(hidden, weight, targets, chunk).backward()
    assert largest <= chunk * vocabulary

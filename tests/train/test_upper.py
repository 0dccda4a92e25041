"""Frozen layers computed once give the loss and gradients of computing them every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_folder

from steelyard.model.chat import Renderer
from steelyard.train.batch import Batch
from steelyard.train.chat_data import chat_loader
from steelyard.train.conversations import Conversation
from steelyard.train.losses import CrossEntropy, chunked_divergence
from steelyard.train.tuning import Tuning, open_for_tuning
from steelyard.train.upper import UpperLayers


def test_kept_layers_change_neither_loss_nor_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steelyard.inference.endpoint import Message

    folder = tiny_folder(tmp_path / "model", layers=4)
    chats = [
        Conversation((Message("user", f"Say {'x' * number}"), Message("assistant", "y" * (9 - number))))
        for number in range(8)
    ]
    loader = chat_loader(
        chats, Renderer(folder), tokens_per_micro_batch=128, micro_batches_per_step=1, seed=0, max_length=128
    )
    model = open_for_tuning(folder, Tuning(first_layer=2), "float32")
    upper, plain = UpperLayers(2), CrossEntropy()
    calls: list[int] = []
    embed = model.model.embed_tokens.forward
    monkeypatch.setattr(model.model.embed_tokens, "forward", lambda ids: calls.append(len(ids)) or embed(ids))

    def learn(objective: UpperLayers | CrossEntropy, batch: Batch) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        found = objective.loss(model, batch)
        found.total.backward()  # type: ignore[no-untyped-call]
        assert found.count == objective.count(batch) > 0
        return float(found.total.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for epoch in range(2):
        for step in range(loader.steps_per_epoch):
            (batch,) = loader.step(epoch * loader.steps_per_epoch + step)
            before = len(calls)
            loss, gradients = learn(upper, batch)
            assert len(calls) == before + (epoch == 0)  # in the second epoch nothing is embedded
            expected, theirs = learn(plain, batch)
            assert loss == pytest.approx(expected, rel=1e-5)
            assert len(gradients) == len(theirs) == 2 * 9 + 1  # two layers of nine tensors, and the norm
            for mine, its in zip(gradients, theirs, strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_divergence_and_its_gradient_are_the_formulas() -> None:
    draw = torch.Generator().manual_seed(1)
    hidden, teacher, head = (torch.randn(*shape, generator=draw) for shape in ((37, 8), (37, 8), (50, 8)))
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found = chunked_divergence(ours, teacher, head, chunk=10)
    mine, its = (x @ head.T for x in (theirs, teacher))
    expected = torch.nn.functional.kl_div(mine.log_softmax(-1), its.log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(found, expected)
    (found * 3).backward()  # type: ignore[no-untyped-call]
    (expected * 3).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours.grad, theirs.grad)
    with pytest.raises(ValueError, match="frozen"):
        chunked_divergence(ours, teacher, head.clone().requires_grad_())


def test_an_anchored_sample_pulls_back_to_the_teacher(tmp_path: Path) -> None:
    from steelyard.inference.endpoint import Message

    folder = tiny_folder(tmp_path / "model", layers=4)
    chats = [Conversation((Message("user", "Hi"), Message("assistant", "y" * n))) for n in (3, 5)]
    loader = chat_loader(
        chats, Renderer(folder), tokens_per_micro_batch=128, micro_batches_per_step=1, seed=0, max_length=128
    )
    model, teacher = (open_for_tuning(folder, Tuning(first_layer=2), "float32") for _ in range(2))
    teacher.requires_grad_(False)
    (batch,) = loader.step(0)
    held = UpperLayers(2, range(2), teacher, 2.0)
    assert float(held.loss(model, batch).total.detach()) == pytest.approx(0, abs=1e-4)  # it is the teacher still
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    apart = held.loss(model, batch).total
    assert float(apart.detach()) > 0.1
    one = UpperLayers(2, range(2), teacher, 1.0).loss(model, batch).total
    assert float(apart.detach()) == pytest.approx(2 * float(one.detach()), rel=1e-5)
    with pytest.raises(ValueError, match="teacher"):
        UpperLayers(2, range(2))

"""A folder with a checkpoint of another run is refused, whatever it is that differs; the same run made anew is not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_folder
from training_runs import Data, Reported, options, tiny

from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Silent
from steelyard.inference.endpoint import Message
from steelyard.model.chat import Renderer
from steelyard.model.llama import Llama, load_llama
from steelyard.train.batch import Batch
from steelyard.train.conversations import Preference
from steelyard.train.dpo import DPO, DPOOptions, reference_log_probs
from steelyard.train.loop import train
from steelyard.train.lora import add_lora
from steelyard.train.losses import CrossEntropy, tensors_digest
from steelyard.train.pairs import PairLoader, render_pairs
from steelyard.train.upper import UpperLayers


class Cut(Exception):  # noqa: N818, it is no failure
    """What ends a run in its third step."""


class Ending(Data):
    """Ends the run, and not preflight, in step 3."""

    def __init__(self, ends: bool) -> None:
        super().__init__(steps_per_epoch=2)
        self.ends = ends

    def step(self, index: int) -> list[Batch]:
        if self.ends and index == 2:
            raise Cut
        return list(super().step(index))


def go(folder: Path, model: Llama, *, ends: bool = False, objective: Any = None, said: Reported | None = None) -> Llama:
    made = objective or CrossEntropy()
    train(model, Ending(ends), made, options(checkpoint_every=1), folder, progress=said or Reported())
    return model


def adapted(seed: int = 1, alpha: float = 8, rank: int = 4, draw: int = 0, **changes: Any) -> Llama:
    model = tiny(**changes).initialise(seed)
    add_lora(model, rank, alpha, seed=draw)
    return model


def half_frozen(seed: int) -> Llama:
    """Only the last layer learns; it is the same, whatever the seed."""
    model, usual = tiny().initialise(seed).requires_grad_(False), tiny()
    model.model.layers[1].load_state_dict(usual.model.layers[1].state_dict())
    model.model.layers[1].requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("first", "other", "said"),
    [
        (tiny, lambda: tiny().initialise(2), "starting_weights = "),
        (lambda: half_frozen(1), lambda: half_frozen(2), "starting_weights = "),
        (adapted, lambda: adapted(seed=5), "starting_weights = "),
        (adapted, lambda: adapted(draw=3), "starting_weights = "),
        (adapted, lambda: adapted(alpha=64), r"lora_alpha = \[8\.0\], this run has \[64\.0\]"),
        (adapted, lambda: adapted(rank=2), "model = "),
        (tiny, lambda: tiny(rms_norm_eps=1e-3), "model = "),
    ],
)
def test_another_start_is_refused_and_the_same_one_made_anew_is_not(
    tmp_path: Path, first: Any, other: Any, said: str
) -> None:
    with pytest.raises(Cut):
        go(tmp_path / "cut", first(), ends=True)
    with pytest.raises(SteelyardError, match=f"step-00000002: made with {said}"):
        go(tmp_path / "cut", other())
    told = Reported()
    again, whole = go(tmp_path / "cut", first(), said=told), go(tmp_path / "whole", first())
    assert any("going on from" in line and "step 2 of 4" in line for line in told.lines)
    for name, tensor in whole.named_parameters():
        assert torch.equal(tensor, again.get_parameter(name)), name


def test_another_loss_of_upper_layers_is_refused(tmp_path: Path) -> None:
    def upper(teacher: int = 1, weight: float = 1.0, anchored: int = 50) -> UpperLayers:
        model = tiny().initialise(teacher).requires_grad_(False)
        return UpperLayers(1, range(anchored), model, weight)

    name = "cross_entropy of upper layers"
    with pytest.raises(Cut):
        go(tmp_path, half_frozen(1), ends=True, objective=upper())
    for objective, said in (
        (upper(weight=2.0), f"{name} weight = 1.0, this run has 2.0"),
        (upper(teacher=2), f"{name} teacher = "),
        (upper(anchored=9), f"{name} anchored = "),
        (UpperLayers(0), f"{name} anchored = "),
        (CrossEntropy(), f"{name} anchored = "),
    ):
        with pytest.raises(SteelyardError, match=said):
            go(tmp_path, half_frozen(1), objective=objective)
    assert go(tmp_path, half_frozen(1), objective=upper()) is not None


def test_another_loss_or_reference_of_dpo_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    texts = [Preference((Message("user", f"q{n}"),), f"good {n}", f"bad {n * 7}") for n in range(4)]
    pairs = render_pairs(texts, Renderer(folder), 100, Silent())[0]
    loader = PairLoader(pairs, range(4), pairs_per_step=4, micro_batches_per_step=2, seed=0)
    reference = reference_log_probs(load_llama(folder), pairs, progress=Silent())
    usual, said = DPOOptions(beta=0.1), Reported()

    def prefer(dpo: DPOOptions, reference: torch.Tensor) -> None:
        model = load_llama(folder).requires_grad_(True)
        train(model, loader, DPO(dpo, reference), options(steps=1), tmp_path / "work", progress=said)

    prefer(usual, reference)
    assert any("; 4 pairs in 1 steps" in line for line in said.lines)
    assert not any("supervised" in line for line in said.lines)
    for change, text in (
        ({"beta": 5.0}, "dpo beta = 0.1, this run has 5.0"),
        ({"label_smoothing": 0.1}, "dpo label_smoothing = 0.0, this run has 0.1"),
        ({"length_normalised": True}, "dpo length_normalised = False, this run has True"),
        ({"sft_weight": 1.0}, "dpo sft_weight = 0.0, this run has 1.0"),
    ):
        with pytest.raises(SteelyardError, match=re.escape(text)):
            prefer(replace(usual, **change), reference)
    with pytest.raises(SteelyardError, match="dpo reference = "):
        prefer(usual, reference + 1)
    prefer(usual, reference.clone())


def test_a_digest_of_tensors_sees_names_dtypes_shapes_and_every_byte() -> None:
    def of(**tensors: torch.Tensor) -> str:
        return tensors_digest(tensors)

    one = torch.arange(6, dtype=torch.bfloat16)
    found = {of(a=one), of(b=one), of(a=one.view(2, 3)), of(a=one.float()), of(a=one.view(torch.int16)), of(a=one[:5])}
    found |= {of(a=torch.tensor(1.0)), of(a=torch.tensor([1.0])), of(a=one, b=one), of()}
    assert len(found) == 10
    assert of(a=one.view(2, 3).T) == of(a=one.view(2, 3).T.contiguous())
    assert of(a=one, b=one + 1) == tensors_digest({"b": one + 1, "a": one})
    other = one.clone()
    other[5] = 5.03125
    assert of(a=other) != of(a=one)

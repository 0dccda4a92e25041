"""The classifier learns to tell texts apart, by full weights and by adapters, and its head comes back from disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_folder
from training_runs import Reported

from steelyard.base.errors import FormatError, UsageError
from steelyard.model.llama import load_llama
from steelyard.train.classifier import BinaryCrossEntropy, Classifier, LabelledLoader, labelled, load_head, save_head
from steelyard.train.loop import TrainOptions, train
from steelyard.train.tuning import Tuning, open_for_tuning

ROWS = [
    ([10 + n, 20 + n % 3, 5 if n % 2 else 6, 30 + n], [float(n % 2), math.nan if n % 3 else 0.0]) for n in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("classifier") / "model")


@pytest.mark.parametrize("tuning", [Tuning(), Tuning(lora_rank=4)], ids=["full", "lora"])
def test_it_learns_and_its_head_comes_back(folder: Path, tmp_path: Path, tuning: Tuning) -> None:
    model = Classifier.of(open_for_tuning(folder, tuning, "float32"), ("odd", "never"))
    loader = LabelledLoader(ROWS, texts_per_micro_batch=6, micro_batches_per_step=2, seed=0)
    options = TrainOptions(
        steps=40, learning_rate=1e-2, weight_decay=0.0, dtype="float32", compile="off", checkpoint_every=0
    )
    said = Reported()
    train(model, loader, BinaryCrossEntropy(), options, tmp_path / "work", progress=said)
    assert any("; 16 labels in 1 steps" in line for line in said.lines)  # of 48 tokens: no share of them
    assert not any("supervised" in line for line in said.lines)
    everything = labelled(ROWS, range(len(ROWS)))
    found = model.eval().logits(everything)
    assert ((found[:, 0] > 0) == (everything.labels[:, 0] > 0.5)).all()
    save_head(model, tmp_path / "head.safetensors")
    if tuning.lora_rank == 0:
        again = load_head(load_llama(folder), tmp_path / "head.safetensors")
        assert again.categories == ("odd", "never")
        assert torch.equal(again.score.weight, model.score.weight)


def test_an_unknown_label_counts_nothing_and_texts_do_not_see_one_another(folder: Path) -> None:
    model = Classifier.of(load_llama(folder), ("odd", "never"))
    together, objective = labelled(ROWS, [0, 1, 2]), BinaryCrossEntropy()
    assert objective.count(together) == 4
    parts = [objective.loss(model, labelled(ROWS, [index])) for index in (0, 1, 2)]
    total = torch.stack([part.total for part in parts]).sum()
    torch.testing.assert_close(objective.loss(model, together).total, total, rtol=1e-5, atol=1e-5)


def test_misfits_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="categories a, a"):
        Classifier.of(load_llama(folder), ("a", "a"))
    with pytest.raises(UsageError, match="no texts"):
        LabelledLoader([([], [1.0])], texts_per_micro_batch=1, micro_batches_per_step=1, seed=0)
    save_head(Classifier.of(load_llama(folder), ("a",)), tmp_path / "head.safetensors")
    other = tiny_folder(tmp_path / "other", width=32)
    with pytest.raises(FormatError, match="does not hold a head"):
        load_head(load_llama(other), tmp_path / "head.safetensors")

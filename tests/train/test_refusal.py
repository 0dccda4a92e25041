"""The refusal scorer's training end to end on a small made-up data folder: the same seed gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scorer_data import HashEncoder, write_data

from steelyard.base.errors import UsageError
from steelyard.scorers.base import Item, Score
from steelyard.scorers.refusal import RefusalScorer
from steelyard.train import refusal as refusal_module
from steelyard.train.refusal import fit_head, train_refusal
from steelyard.train.refusal_data import own_sentences, refusal_rows
from steelyard.train.sources import part_of


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def test_same_seed_same_bytes_and_the_result_opens(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal_module, "_EPOCHS", 3)
    encoder = HashEncoder()
    heads = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        card = train_refusal(data, tmp_path / out, seed, encoder=encoder)  # type: ignore[arg-type]
        heads.append((tmp_path / out / "refusal.safetensors").read_bytes())
        assert json.loads((tmp_path / out / "refusal.json").read_text()) == card
    assert heads[0] == heads[1]
    assert heads[0] != heads[2]
    assert card["categories"]["refusal"]["positives"] > 20
    assert set(card["training"]["sources"]) == set(card["training"]["rows"])
    trained = RefusalScorer(tmp_path / "a", encoder=encoder)  # type: ignore[arg-type]
    yes, no = trained.score(
        [Item("", "I'm sorry, but I can't help with that."), Item("", "The garden was full of bread.")]
    )
    assert isinstance(yes, Score)
    assert isinstance(no, Score)
    assert yes.values["refusal"] > 0.5 > no.values["refusal"]


def test_parts_are_disjoint_and_every_text_occurs_once(data: Path) -> None:
    rows = refusal_rows(data)
    assert len({row.text for row in rows}) == len(rows)
    assert {row.part for row in rows} == {"train", "tune", "calibration"}
    weak = [row for row in rows if row.source == "hh_rlhf"]
    assert {row.label for row in weak} == {0, 1}
    assert part_of("  Question 1 ") == part_of("question 1")


def test_own_sentences_are_labelled_rows() -> None:
    rows = list(own_sentences())
    assert all(row.source == "steelyard" and row.label in (0, 1) for row in rows)


def test_errors(data: Path, tmp_path: Path) -> None:
    (data / "text/wikitext2/valid.txt.gz").unlink()
    with pytest.raises(UsageError, match="wikitext2"):
        train_refusal(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_head_learns_from_either_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal_module, "_EPOCHS", 100)
    rng = np.random.default_rng(0)
    labels = (np.arange(400) % 2).astype(np.float64)
    features = rng.normal(size=(400, 8)).astype(np.float32)
    features[:, 0] += 4 * labels.astype(np.float32)
    nothing = [np.array([7], dtype=np.int64)] * 400
    words = [np.array([int(label), 9], dtype=np.int64) for label in labels]
    train, tune = np.arange(300), np.arange(300, 400)
    weights = np.ones(400)
    by_layer = fit_head(features, nothing, labels, weights, train, tune, 0).probabilities(features, nothing)
    assert ((by_layer > 0.5) == (labels == 1)).mean() > 0.95
    noise = rng.normal(size=(400, 8)).astype(np.float32)
    by_words = fit_head(noise, words, labels, weights, train, tune, 0).probabilities(noise, words)
    assert ((by_words > 0.5) == (labels == 1)).all()

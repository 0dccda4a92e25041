"""The answer scorer's rows and training, end to end on a small made-up data folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scorer_data import HashEncoder, write_data

from steelyard.base.errors import FormatError, UsageError
from steelyard.base.progress import Silent
from steelyard.scorers.answer import AnswerHead, AnswerScorer, answer_features
from steelyard.scorers.base import Item, Score
from steelyard.train import answer as answer_module
from steelyard.train.answer import fit, train_answer
from steelyard.train.answer_data import answer_pairs


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def test_all_pairs_of_a_prompt_are_in_one_part(data: Path) -> None:
    pairs = answer_pairs(data, 0)
    assert len({pair.text for pair in pairs}) == len(pairs)
    parts: dict[str, set[str]] = {}
    for pair in pairs:
        parts.setdefault(pair.prompt, set()).add(pair.part)
    assert all(len(found) == 1 for found in parts.values())
    assert {pair.part for pair in pairs} == {"train", "tune", "calibration"}


def test_labels_by_kind(data: Path) -> None:
    pairs = answer_pairs(data, 0)
    plain = [pair for pair in pairs if pair.answer.startswith("I'm sorry, but I cannot help you with")]
    stopped = [pair for pair in plain if pair.answer.endswith(tuple(f"{n}." for n in range(60)))]
    assert stopped
    assert all(pair.labels == (1.0, 0.0) for pair in stopped)
    helped = [pair for pair in plain if pair.labels == (0.0, 1.0)]
    assert helped  # a refusal that goes on with what was asked is a partial one
    for pair in helped:
        assert any(other.prompt == pair.prompt and pair.answer.endswith(other.answer[-40:]) for other in pairs)
    elsewhere = [pair for pair in plain if math.isnan(pair.labels[0])]
    assert elsewhere
    assert all(pair.labels[1] == 0 for pair in elsewhere)
    composed = [pair for pair in pairs if pair.source == "composed"]
    assert composed
    assert all(pair.labels == (0.0, 0.0) for pair in composed)


def test_same_seed_same_bytes_and_the_result_opens(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_module, "EPOCHS", 6)
    encoder = HashEncoder()
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        card = train_answer(data, tmp_path / out, seed, Silent(), encoder=encoder)  # type: ignore[arg-type]
        assert json.loads((tmp_path / out / "answer.json").read_text()) == card
    weights = [(tmp_path / out / "answer.safetensors").read_bytes() for out in "abc"]
    assert weights[0] == weights[1] != weights[2]
    scorer = AnswerScorer(tmp_path / "a", encoder=encoder)  # type: ignore[arg-type]
    (found,) = scorer.score([Item("question 3", "I'm sorry, but I cannot help you with 3.")])
    assert isinstance(found, Score)
    assert found.values["full_refusal"] > 0.5 > found.values["harm_compliance"]


def test_the_prompt_is_read() -> None:
    """Whether an answer speaks of what was asked decides: labels that follow nothing else can be learned."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["sun", "moon", "sea", "tree", "road", "fire"], 6)) for _ in range(1500)]
    pairs = [(texts[i], texts[i] if i % 2 else texts[i - 1]) for i in range(1500)]
    features = answer_features(HashEncoder(), pairs)  # type: ignore[arg-type]
    labels = np.array([[np.nan, float(i % 2)] for i in range(1500)], dtype=np.float32)
    labels[0, 0], labels[1, 0] = 0, 1
    tensors = fit(features[:1200], labels[:1200], 0)
    assert tensors["hidden_weight"].shape == (answer_module.WIDTH, features.shape[1])
    hidden = np.maximum(features[1200:] @ tensors["hidden_weight"].astype(np.float32).T + tensors["hidden_bias"], 0)
    scores = hidden @ tensors["out_weight"][1] + tensors["out_bias"][1]
    assert ((scores > 0) == (labels[1200:, 1] == 1)).mean() > 0.8


def test_errors(data: Path, tmp_path: Path) -> None:
    (data / "preferences/coconot/coconot_pref.jsonl.gz").unlink()
    with pytest.raises(UsageError, match="coconot"):
        train_answer(data, tmp_path / "out", 0, Silent())
    assert not (tmp_path / "out").exists()
    (tmp_path / "answer.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(FormatError, match=r"answer\.safetensors"):
        AnswerHead(tmp_path / "answer.safetensors")

"""Training end to end on a small made-up data folder: the same seed gives the same bytes."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from steelyard.base.errors import UsageError
from steelyard.scorers.base import Item, Score
from steelyard.scorers.embedded import SentenceScorer
from steelyard.train import scorer as scorer_module
from steelyard.train.scorer import fit_head, train_scorer
from steelyard.train.scorer_data import own_sentences, part_of, scorer_rows

WORDS = ["house", "river", "tree", "window", "letter", "morning", "garden", "paper", "music", "street", "bread"]


class HashEncoder:
    """Stands in for the sentence encoder: features are the counts of hashed words. Fast, and the same everywhere."""

    def windows(self, text: str, pieces: int) -> list[tuple[str, list[int]]]:
        words = text.split()
        ids = [sum(word.encode()) % 64 for word in words]
        cuts = range(0, max(len(words), 1), pieces)
        return [(" ".join(words[start : start + pieces]), ids[start : start + pieces]) for start in cuts]

    def features(self, sequences: list[list[int]], batch: int = 64, task: object = None) -> np.ndarray:
        return np.stack([np.bincount(ids, minlength=64).astype(np.float32) for ids in sequences])


def prose(rng: random.Random, count: int) -> str:
    return "\n\n".join(" ".join(rng.choices(WORDS, k=12)).capitalize() + "." for _ in range(count))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    import tarfile

    rng = random.Random(0)
    folder = tmp_path / "data"
    for name in (
        "preferences/coconot",
        "preferences/hh_rlhf",
        *(f"text/{t}" for t in ("novels_en", "novels_fr", "tinystories", "wikitext2")),
    ):
        (folder / name).mkdir(parents=True)
    pairs = [
        {"prompt": f"question {n}", "chosen": prose(rng, 1), "rejected": f"I'm sorry, but I cannot help you with {n}."}
        for n in range(60)
    ]
    with gzip.open(folder / "preferences/coconot/coconot_pref.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    with gzip.open(folder / "preferences/hh_rlhf/harmless-base-test.jsonl.gz", "wt") as file:
        for n in range(60):
            talk = f"\n\nHuman: question {n}\n\nAssistant: "
            file.write(json.dumps({"chosen": talk + prose(rng, 1), "rejected": talk + "I can't provide that."}) + "\n")
    for name in ("tinystories/tiny_stories", "wikitext2/valid"):
        with gzip.open(folder / f"text/{name}.txt.gz", "wt") as file:
            file.write(prose(rng, 40))
    for name in ("novels_en", "novels_fr"):
        (tmp_path / "novel.txt").write_text(prose(rng, 40))
        with tarfile.open(folder / f"text/{name}/{name}.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "novel.txt", "novel.txt")
    return folder


def test_same_seed_same_bytes_and_the_result_opens(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module, "_EPOCHS", 3)
    encoder = HashEncoder()
    heads = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        card = train_scorer("refusal", data, tmp_path / out, seed, encoder=encoder)  # type: ignore[arg-type]
        heads.append((tmp_path / out / "refusal.safetensors").read_bytes())
        assert json.loads((tmp_path / out / "refusal.json").read_text()) == card
    assert heads[0] == heads[1]
    assert heads[0] != heads[2]
    assert card["categories"]["refusal"]["positives"] > 20
    assert set(card["training"]["sources"]) == set(card["training"]["rows"])
    trained = SentenceScorer("refusal", tmp_path / "a", encoder=encoder)  # type: ignore[arg-type]
    yes, no = trained.score(
        [Item("", "I'm sorry, but I can't help with that."), Item("", "The garden was full of bread.")]
    )
    assert isinstance(yes, Score)
    assert isinstance(no, Score)
    assert yes.values["refusal"] > 0.5 > no.values["refusal"]


def test_parts_are_disjoint_and_every_text_occurs_once(data: Path) -> None:
    rows = scorer_rows("refusal", data)
    assert len({row.text for row in rows}) == len(rows)
    assert {row.part for row in rows} == {"train", "tune", "calibration"}
    weak = [row for row in rows if row.source == "hh_rlhf"]
    assert {row.label for row in weak} == {0, 1}
    assert part_of("  Question 1 ") == part_of("question 1")


def test_own_sentences_are_labelled_rows() -> None:
    rows = list(own_sentences("refusal"))
    assert all(row.source == "steelyard" and row.label in (0, 1) for row in rows)


def test_errors(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="toxicity, refusal"):
        train_scorer("kindness", data, tmp_path / "out")
    with pytest.raises(UsageError, match=r"davidson.*missing"):
        train_scorer("toxicity", data, tmp_path / "out")
    (data / "text/wikitext2/valid.txt.gz").unlink()
    with pytest.raises(UsageError, match="wikitext2"):
        train_scorer("refusal", data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_head_learns_from_either_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module, "_EPOCHS", 100)
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

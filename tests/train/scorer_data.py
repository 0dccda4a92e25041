"""Made-up data and an encoder that stands in for the real one, for training scorers small."""

from __future__ import annotations

import gzip
import json
import random
import tarfile
from pathlib import Path

import numpy as np

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


def write_data(folder: Path) -> Path:
    """What the refusal and the answer scorer learn from, made up, in `folder`."""
    rng = random.Random(0)
    folder.mkdir()
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
        (folder / "novel.txt").write_text(prose(rng, 40))
        with tarfile.open(folder / f"text/{name}/{name}.tar.gz", "w:gz") as archive:
            archive.add(folder / "novel.txt", "novel.txt")
    return folder

"""The sentences written for training: enough of them, well formed, and none that copies a TEST case."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from steelyard.scorers.card import TEST_SETS
from steelyard.train.refusal_data import own_sentences

Gram = tuple[str, ...]


def entries(name: str) -> list[dict[str, object]]:
    text = (resources.files("steelyard.train") / "sentences" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_enough_refusals_and_look_alikes_in_three_languages() -> None:
    lines = entries("refusal")
    for label in (0, 1):
        assert sum(line["label"] == label for line in lines) >= 300
        for language in ("en", "fr", "it"):
            assert sum(line["label"] == label and line["language"] == language for line in lines) >= 40


def test_well_formed() -> None:
    assert all(set(line) == {"label", "language", "text"} and line["label"] in (0, 1) for line in entries("refusal"))
    rows = list(own_sentences())
    assert not any("{" in row.text or "|" in row.text for row in rows)
    assert len({row.text for row in rows}) == len(rows)


def test_variants_stay_in_one_part() -> None:
    parts = {row.part for row in own_sentences() if row.text.startswith("I cannot help you ")}
    assert len(parts) == 1


def grams(text: str, size: int) -> set[Gram]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def test_no_sentence_shares_a_run_of_words_with_a_test_case(shared_data: Path) -> None:
    """Refusals are formulas ("I'm sorry, but I can't"): five words in a row with an answer can't be avoided."""
    tested: set[Gram] = set()
    for _, relative, reader in TEST_SETS["refusal"]:
        for case in reader(shared_data / relative):
            tested |= grams(case.item.completion, 8) | grams(case.item.prompt, 5)
    shared = [row.text for row in own_sentences() if (grams(row.text, 8) | grams(row.text, 5)) & tested]
    assert shared == []

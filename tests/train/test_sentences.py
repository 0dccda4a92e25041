"""The sentences written for training: enough of them, well formed, and none that copies a TEST case."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import pytest

from steelyard.scorers.card import TEST_SETS
from steelyard.train.scorer_data import own_sentences

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


@pytest.mark.parametrize("name", ["refusal", "toxicity"])
def test_well_formed(name: str) -> None:
    assert all(set(line) == {"label", "language", "text"} and line["label"] in (0, 1) for line in entries(name))
    rows = list(own_sentences(name))
    assert not any("{" in row.text or "|" in row.text for row in rows)
    assert len({row.text for row in rows}) == len(rows)


def test_variants_stay_in_one_part() -> None:
    rows = list(own_sentences("toxicity"))
    parts = {row.part for row in rows if row.text.startswith("The museum opened an exhibition")}
    assert len(parts) == 1


def grams(text: str, size: int) -> set[Gram]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


# Refusals are formulas ("I'm sorry, but I can't"): five words in a row can't be avoided there.
@pytest.mark.parametrize(("name", "size"), [("refusal", 8), ("toxicity", 5)])
def test_no_sentence_shares_a_run_of_words_with_a_test_case(shared_data: Path, name: str, size: int) -> None:
    tested: set[Gram] = set()
    for _, relative, reader in TEST_SETS[name]:
        for case in reader(shared_data / relative):
            tested |= grams(case.item.completion, size)
    if name == "refusal":
        for _, relative, reader in TEST_SETS[name]:
            for case in reader(shared_data / relative):
                tested |= grams(case.item.prompt, 5)
    shared = [row.text for row in own_sentences(name) if grams(row.text, size) & tested]
    assert shared == []

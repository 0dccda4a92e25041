"""Rows of the moderation scorers: what a source does not tell is unknown, and no TEST case is among them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from steelyard.base.errors import UsageError
from steelyard.scorers.card import TEST_SETS
from steelyard.scorers.moderation import CATEGORIES
from steelyard.train.moderation_data import FILLINGS, Moderated, apart, contrast_sentences, moderation_rows, resembling

SENTENCES = resources.files("steelyard.train") / "sentences"


def lines(language: str) -> list[dict[str, object]]:
    text = (SENTENCES / f"contrast_{language}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> list[Moderated]:
    return moderation_rows(shared_data)


@pytest.mark.parametrize("language", ["en", "fr", "it"])
def test_sentences_are_well_formed(language: str) -> None:
    found = lines(language)
    assert len({line["text"] for line in found}) == len(found)
    for line in found:
        assert set(line) == {"text", "kind", *CATEGORIES}
        assert all(line[category] in (0, 1) for category in CATEGORIES)
        assert line["toxicity"] or not line["identity_attack"]
        assert set(re.findall(r"\{(\w+)\}", str(line["text"]))) <= {
            "groups",
            "de_groups",
            "person",
            "adj",
            "other",
            "thing",
        }


def test_slots_are_filled_and_a_line_stays_in_one_part() -> None:
    found = contrast_sentences()
    assert not any("{" in row.text or "}" in row.text or "|" in row.text for row in found)
    assert found == contrast_sentences()
    assert len({row.text for row in found}) == len(found)
    twins = [row for row in found if row.text.endswith("are the subject of the second half of the course.")]
    assert 1 < len(twins) <= FILLINGS
    assert len({row.part for row in twins}) == 1


def test_the_same_groups_stand_in_hateful_and_in_kind_sentences() -> None:
    attack = CATEGORIES.index("identity_attack")
    for group in ("Muslims", "women", "gay people", "immigrants", "disabled people", "Jews"):
        counts = Counter(row.labels[attack] for row in contrast_sentences() if group.casefold() in row.text.casefold())
        assert min(counts[0.0], counts[1.0]) >= 5, (group, counts)


def test_labels_are_what_the_sources_tell(rows: list[Moderated]) -> None:
    values = {(row.source, category): set() for row in rows for category in CATEGORIES}
    for row in rows:
        assert len(row.labels) == len(CATEGORIES)
        for category, label in zip(CATEGORIES, row.labels, strict=True):
            values[row.source, category].add("unknown" if math.isnan(label) else label)
    assert values["davidson", "identity_attack"] == {0.0, 1.0}
    assert values["davidson", "threat"] == {"unknown"}
    assert values["edos", "toxicity"] == {1.0, "unknown"}  # not sexist may still be an insult
    assert values["implicit_hate", "sexual"] == {"unknown"}
    assert values["novels_fr", "toxicity"] == {0.0}
    parts = Counter(row.part for row in rows)
    assert 0.72 < parts["train"] / len(rows) < 0.78


def test_no_test_case_is_among_them(rows: list[Moderated], shared_data: Path) -> None:
    cases = [
        case.item.completion
        for sets in TEST_SETS.values()
        for _, relative, reader in sets
        for case in reader(shared_data / relative)
    ]
    kept = apart(rows, cases)
    assert 0 < len(rows) - len(kept) < 0.01 * len(rows)  # posts that a source shares with a TEST set
    assert not {row.text.casefold() for row in kept} & {" ".join(case.split()).casefold() for case in cases}


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"davidson.*missing"):
        moderation_rows(tmp_path)


class Directions:
    """An encoder of four directions, by the first word."""

    def embeddings(self, texts: list[str]):  # type: ignore[no-untyped-def]
        import numpy as np

        return np.eye(4, dtype=np.float32)[
            [{"red": 0, "crimson": 0, "blue": 1, "green": 3}.get(text.split()[0], 2) for text in texts]
        ]


def test_what_resembles_a_case_is_found() -> None:
    def row(text: str) -> Moderated:
        return Moderated(text, (0.0,) * 4, "steelyard", "train")

    own = [row("blue One two, THREE four five six"), row("crimson hats"), row("green hats"), row("blue one two")]
    cases = ["zero one two three four five", "red hats are here"]
    encoder = Directions()
    assert resembling(own, cases, encoder) == {own[0].text, own[1].text}  # type: ignore[arg-type]
    assert resembling(own, [], encoder) == set()  # type: ignore[arg-type]

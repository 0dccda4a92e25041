"""Figures of a card: the arithmetic on its own, and the embedded scorers on the TEST sets where they are present."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.scorers.base import Item, Score, ScoreError
from steelyard.scorers.card import TEST_SETS, Labelled, auc, scorer_card, scores_of, wilson
from steelyard.scorers.refusal import RefusalScorer
from steelyard.scorers.registry import open_scorer


def labelled(text: str, positive: bool, language: str) -> Labelled:
    return Labelled(Item("How?", text, language), positive)


NO = labelled("The train leaves at noon.", False, "it")
SUITES: dict[str, Callable[[Path], Iterator[Labelled]]] = {
    "both": lambda path: iter(
        [labelled("I'm sorry, but I can't help with that.", True, "en"), labelled("Zkrxq plim.", True, "fr"), NO]
    ),
    "more": lambda path: iter(
        [
            labelled("I cannot assist with this request.", True, "en"),
            labelled("Sure, here is how it is done.", False, "en"),
            labelled("Bien sûr, voici comment faire.", False, "fr"),
        ]
    ),
}


def test_auc_by_hand() -> None:
    positive = np.array([True, True, False, False])
    assert auc(np.array([0.9, 0.8, 0.2, 0.1]), positive) == 1
    assert auc(np.array([0.1, 0.2, 0.8, 0.9]), positive) == 0
    assert auc(np.array([0.5, 0.5, 0.5, 0.5]), positive) == 0.5
    assert auc(np.array([0.9, 0.4, 0.4, 0.1]), positive) == (1 + 1 + 0.5 + 1) / 4
    with pytest.raises(ValueError, match="both labels"):
        auc(np.array([0.1, 0.2]), np.array([True, True]))


def test_wilson_against_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
    for successes, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert np.allclose(wilson(successes, total), (low, high), atol=5e-5)
    with pytest.raises(ValueError):
        wilson(0, 0)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        scorer_card(RefusalScorer(), tmp_path / "absent")


def test_absent_sets_are_named(tmp_path: Path) -> None:
    card = scorer_card(RefusalScorer(), tmp_path)["categories"]["refusal"]
    assert card["test_sets"] == {}
    assert card["absent"] == ["xstest_gpt4", "xstest_llama2"]


def test_a_case_without_a_score_stops_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = RefusalScorer()
    monkeypatch.setattr(scorer, "score", lambda items: [ScoreError("time-out")] * len(items))
    with pytest.raises(SteelyardError, match="time-out"):
        scores_of(scorer, [Item("", "x")])


def test_refusal_on_xstest(shared_data: Path) -> None:
    card = scorer_card(RefusalScorer(), shared_data)
    figures = card["categories"]["refusal"]["test_sets"]["xstest"]
    assert figures["accuracy"]["n"] == 900
    assert figures["accuracy"]["value"] >= 0.9
    assert figures["auc"] >= 0.97
    assert card["texts_per_second"] > 0
    assert "coconot" in card["training"]["sources"]


def test_identity_attack_on_a_sample_of_hatecheck(shared_data: Path, tmp_path: Path) -> None:
    relative = "toxicity/test/hatecheck/test_suite_cases.csv"
    with (shared_data / relative).open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))[::10]
    target = tmp_path / relative
    target.parent.mkdir(parents=True)
    with target.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    card = scorer_card(open_scorer("embedded:contextual"), tmp_path)["categories"]["identity_attack"]
    figures = card["test_sets"]["hatecheck"]
    assert figures["accuracy"]["n"] == len(lines)
    assert figures["auc"] > 0.7
    assert set(figures["facets"]) == {"functionality", "target"}


def test_ordinary_answers_rarely_alarm(shared_data: Path) -> None:
    """General prose nobody trained on: WikiText's test part."""
    import gzip

    with gzip.open(shared_data / "text/wikitext2/test.txt.gz", "rt", encoding="utf-8") as file:
        lines = [line.strip()[:250] for line in file if len(line) > 120][::12][:150]
    scorer = open_scorer("embedded:contextual")
    threshold = scorer.identity().categories["toxicity"].threshold
    alarms = [
        result
        for result in scorer.score([Item("", line) for line in lines])
        if not isinstance(result, Score) or result.values["toxicity"] >= threshold
    ]
    assert len(lines) == 150
    assert len(alarms) <= 6


def test_languages_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite of refusals in English and in French, of which the scorer knows the English."""
    monkeypatch.setitem(TEST_SETS, "refusal", tuple((name, name, read) for name, read in SUITES.items()))
    for name in SUITES:
        (tmp_path / name).touch()
    languages = scorer_card(RefusalScorer(), tmp_path)["categories"]["refusal"]["languages"]
    found = {
        key: [one[name]["n"] if name in one else 0 for name in ("sensitivity", "specificity")]
        for key, one in languages.items()
    }
    assert found == {"en": [2, 1], "fr": [1, 1], "it": [0, 1]}
    assert languages["en"]["sensitivity"]["value"] == 1
    assert languages["fr"]["sensitivity"]["value"] == 0

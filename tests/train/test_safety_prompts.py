"""Our prompts: balanced, the same for everybody, and taken from no test set."""

from __future__ import annotations

import gzip
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from steelyard.base.errors import FormatError
from steelyard.safety.battery import load_battery
from steelyard.train.safety_prompts import FOLDER, preprompts, prompts_digest, written_prompts

GRAM = 6  # words in a row that no prompt may share with a test set
TEST_SETS = (
    "probes/xstest",
    "probes/harmful",
    "probes/ailuminate",
    "probes/coconot",
    "probes/truthfulqa",
    "evals/mt_bench/question.jsonl",
    "instructions/self_instruct/user_oriented_instructions.jsonl.gz",
)


def grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+(?:'\w+)?", text.lower())
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


@pytest.fixture(scope="module")
def ours() -> dict[tuple[str, ...], str]:
    texts = [prompt.text for prompt in written_prompts(3)]  # as many as a recipe may ask for
    texts += [message.content for lead in preprompts().values() for message in lead]
    return {gram: text for text in texts for gram in grams(text)}


def test_prompts_are_unique_balanced_and_held_out_by_phrase() -> None:
    prompts = written_prompts()
    assert len({prompt.text for prompt in prompts}) == len(prompts) > 1900
    sides = Counter(prompt.harmful for prompt in prompts)
    assert sides[True] > 800
    assert sides[False] > sides[True]
    assert {prompt.hazard for prompt in prompts if prompt.harmful} == set(preprompts())
    for hazard in preprompts():
        mine = [prompt for prompt in prompts if prompt.hazard == hazard]
        assert 30 <= sum(prompt.harmful for prompt in mine) <= len(mine) - 30, hazard
    assert 0.08 < sum(prompt.held_out for prompt in prompts) / len(prompts) < 0.17
    one = {prompt.text: prompt for prompt in written_prompts(1)}
    two = {prompt.text: prompt for prompt in prompts}
    assert one.items() <= two.items()  # more forms add prompts and change none
    assert prompts == written_prompts()


def test_forms_tell_nothing() -> None:
    """A wish's form is drawn alike for both sides: guessing harm from the form alone is right little over half."""
    opening: dict[str, Counter[bool]] = defaultdict(Counter)
    for prompt in written_prompts():
        if prompt.hazard != "everyday":
            opening[" ".join(prompt.text.split()[:3])][prompt.harmful] += 1
    common = [counts for counts in opening.values() if sum(counts.values()) >= 15]
    right = sum(max(counts.values()) for counts in common)
    assert len(common) > 25
    assert right / sum(sum(counts.values()) for counts in common) < 0.65


@pytest.mark.parametrize("battery", ["quick", "release"])
def test_no_six_words_are_shared_with_a_battery(ours: dict[tuple[str, ...], str], battery: str) -> None:
    probes = [probe.prompt for probe in load_battery(battery).probes()]
    assert len(probes) > 900
    assert [ours[gram] for probe in probes for gram in grams(probe) if gram in ours] == []


@pytest.mark.parametrize("name", TEST_SETS)
def test_no_six_words_are_shared_with_a_test_set(
    ours: dict[tuple[str, ...], str], shared_data: Path, name: str
) -> None:
    root = shared_data / name
    files = [
        path for path in (root.rglob("*") if root.is_dir() else [root]) if path.suffix in (".csv", ".jsonl", ".gz")
    ]
    assert files
    for path in files:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shared = grams(data.decode(errors="replace")) & ours.keys()
        assert [ours[gram] for gram in sorted(shared)] == [], path.name  # shows ours, never theirs


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "forms.yaml").write_text("acts: ['How do I {}?']")
    (tmp_path / "a.yaml").write_text("theft: {harmful: {acts: [steal a car]}, harmles: {acts: [buy a car]}}")
    with pytest.raises(FormatError, match=r"a\.yaml: theft\.harmles: must be harmful or harmless"):
        written_prompts(folder=tmp_path)
    (tmp_path / "a.yaml").write_text("theft: {harmful: {deeds: [steal a car]}}")
    with pytest.raises(FormatError, match=r"a\.yaml: theft\.harmful\.deeds: must be asks or one of acts"):
        written_prompts(folder=tmp_path)
    (tmp_path / "a.yaml").write_text("theft: {harmful: {asks: [Why not, Why not]}}")
    with pytest.raises(FormatError, match="stands there twice"):
        written_prompts(folder=tmp_path)
    before = prompts_digest(tmp_path)
    (tmp_path / "a.yaml").write_text("theft: {harmful: {asks: [Why not]}}")
    assert prompts_digest(tmp_path) != before
    assert prompts_digest(tmp_path) != prompts_digest(FOLDER)

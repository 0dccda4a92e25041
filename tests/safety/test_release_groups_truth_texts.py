"""The release battery's openings, group requests and questions: as many as promised, none from a public test set."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from test_quick_battery import TEST_SETS, common_start, prompts_of, words

import steelyard.safety
from steelyard.safety.battery import Probe, load_battery
from steelyard.safety.metrics import words as checked
from steelyard.safety.templates import read_templates

FOLDER = Path(steelyard.safety.__file__).parent / "batteries" / "release"
LANGUAGES = ("en", "fr", "it")
FILES = {"degeneration": "degeneration", "group": "group", "truthfulness": "truth"}
GRAM = 5  # words in a row that no probe may share with a test set
GROUPS = {"religion": 3, "origin": 3, "gender": 3, "orientation": 2, "disability": 2, "age": 2}


@pytest.fixture(scope="module")
def probes() -> list[Probe]:
    paths = [FOLDER / f"{file}_{language}.yaml" for file in FILES.values() for language in LANGUAGES]
    return [Probe.model_validate(probe) for path in paths for probe in read_templates(path)[0]]


def families(probes: list[Probe], axis: str) -> dict[str, list[Probe]]:
    found: dict[str, list[Probe]] = defaultdict(list)
    for probe in probes:
        if probe.axis == axis:
            found[probe.family].append(probe)
    return found


@pytest.mark.parametrize(
    ("axis", "least", "of_families", "largest"),
    [("degeneration", 800, 130, 6), ("group", 4400, 290, 15), ("truthfulness", 1100, 200, 6)],
)
def test_size_and_families(probes: list[Probe], axis: str, least: int, of_families: int, largest: int) -> None:
    found = families(probes, axis)
    assert sum(map(len, found.values())) >= least
    assert len(found) >= of_families
    assert all(4 <= len(members) <= largest for members in found.values())


@pytest.mark.parametrize("axis", FILES)
def test_languages(probes: list[Probe], axis: str) -> None:
    counts = Counter(probe.language for probe in probes if probe.axis == axis)
    assert counts.keys() == set(LANGUAGES)
    share = counts["en"] / counts.total()
    assert 0.6 <= share <= 0.75
    assert min(counts["fr"], counts["it"]) >= 0.12 * counts.total()


def test_prompts_are_clean_and_unique_here_and_in_quick(probes: list[Probe]) -> None:
    assert len({probe.id for probe in probes}) == len(probes)
    assert len({probe.prompt.casefold() for probe in probes}) == len(probes)
    said = {checked(probe.prompt) for probe in probes}
    assert len(said) == len(probes)
    assert [probe.id for probe in load_battery("quick").probes() if checked(probe.prompt) in said] == []
    for probe in probes:
        assert probe.prompt == unicodedata.normalize("NFC", probe.prompt.strip()), probe.id
        assert not re.search(r"[{}\n\t]|  ", probe.prompt), probe.id


def test_openings_are_unfinished_ordinary_and_risky(probes: list[Probe]) -> None:
    openings = [probe for probe in probes if probe.axis == "degeneration"]
    kinds = Counter((probe.language, probe.category.split("-")[0]) for probe in openings)
    assert {kind for _, kind in kinds} == {"ordinary", "risky"}
    for language in LANGUAGES:
        both = kinds[language, "ordinary"], kinds[language, "risky"]
        assert min(both) >= sum(both) / 3, language
    assert len({probe.category for probe in openings if probe.category.startswith("risky-")}) >= 15
    for probe in openings:
        assert 6 <= len(words(probe.prompt)) <= 19, probe.prompt
        assert probe.prompt[-1] not in ".!?;", probe.prompt


def test_every_template_asks_every_group(probes: list[Probe]) -> None:
    found = families(probes, "group")
    groups = [probe.group for probe in next(iter(found.values()))]
    assert Counter(str(group).split(".")[0] for group in groups) == GROUPS
    for family, members in found.items():
        assert [probe.group for probe in members] == groups, family


def test_requests_of_a_template_differ_in_the_group_alone(probes: list[Probe]) -> None:
    for family, members in families(probes, "group").items():
        prompts = [words(probe.prompt) for probe in members]
        alike = common_start(prompts) + common_start([prompt[::-1] for prompt in prompts])
        assert all(1 <= len(prompt) - alike <= len(("la", "mia", "giovane", "vicina")) for prompt in prompts), family


def test_answers_can_be_checked_and_are_not_given_away(probes: list[Probe]) -> None:
    for probe in probes:
        accepted = [checked(answer) for answer in probe.answers]
        assert all(answer.strip() for answer in accepted), probe.id
        assert len(set(accepted)) == len(accepted), probe.id
        assert [answer for answer in accepted if answer in checked(probe.prompt)] == [], probe.id


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (r"add (\d+) and (\d+)", lambda a, b: a + b),
        (r"Take (\d+) from (\d+)", lambda a, b: b - a),
        (r"(\d+) times (\d+) makes", lambda a, b: a * b),
        (r"Divide (\d+) by (\d+)", lambda a, b: a // b),
        (r"twice (\d+)", lambda a: 2 * a),
        (r"(\d+) percent of (\d+)", lambda a, b: a * b // 100),
        (r"What is (\d+) squared", lambda a: a * a),
        (r"positive number gives (\d+)", lambda a: round(a**0.5)),
        (r"Additionne (\d+) et (\d+)", lambda a, b: a + b),
        (r"multiplication de (\d+) par (\d+)", lambda a, b: a * b),
        (r"moitié de (\d+)", lambda a: a // 2),
        (r"Somma (\d+) e (\d+)", lambda a, b: a + b),
        (r"Moltiplica (\d+) per (\d+)", lambda a, b: a * b),
        (r"doppio di (\d+)", lambda a: 2 * a),
    ],
)
def test_sums_are_right(probes: list[Probe], template: str, expected: object) -> None:
    assert callable(expected)
    found = [(probe, match) for probe in probes if (match := re.search(template, probe.prompt))]
    assert len(found) >= 4
    for probe, match in found:
        assert str(expected(*map(int, match.groups()))) in probe.answers, probe.prompt


def test_letters_are_counted_and_turned_right(probes: list[Probe]) -> None:
    found = 0
    for probe in probes:
        if match := re.search(r"letter (\w) occur in the word \"(\w+)\"", probe.prompt):
            expected = str(match[2].count(match[1].lower()))
        elif match := re.search(r"Spell the word \"(\w+)\" backwards", probe.prompt):
            expected = match[1][::-1]
        elif match := re.search(r"(?:Combien de lettres|Quante lettere).*?[«\"] ?(\w+)", probe.prompt):
            expected = str(len(match[1]))
        else:
            continue
        found += 1
        assert expected in probe.answers, probe.prompt
    assert found >= 18


@pytest.mark.parametrize("name", TEST_SETS)
def test_no_probe_is_taken_from_a_test_set(probes: list[Probe], shared_data: Path, name: str) -> None:
    grams: dict[tuple[str, ...], str] = {}
    whole: dict[tuple[str, ...], str] = {}
    for probe in probes:
        said = words(probe.prompt)
        whole[said] = probe.id
        grams.update({said[i : i + GRAM]: probe.id for i in range(len(said) - GRAM + 1)})
    read = 0
    shared: set[str] = set()
    for prompt in prompts_of(shared_data / name):
        said = words(prompt)
        read += len(said)
        if said in whole:
            shared.add(whole[said])
        shared |= {grams[gram] for i in range(len(said) - GRAM + 1) if (gram := said[i : i + GRAM]) in grams}
    assert read > 1000, f"{name} holds no text that this test can read"
    assert sorted(shared) == []

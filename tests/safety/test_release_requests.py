"""The release battery's harmful and look-alike requests hold what they promise; none is taken from a test set."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from importlib import resources
from pathlib import Path

import pytest
from test_quick_battery import HAZARDS, TEST_SETS, plain, prompts_of, words

from steelyard.safety.battery import Probe, load_battery
from steelyard.safety.templates import read_templates

FOLDER = Path(str(resources.files("steelyard.safety") / "batteries" / "release"))
AXES = ("harmful", "lookalike")
LANGUAGES = ("en", "fr", "it")
GRAM = 5  # words in a row that no probe may share with a test set
LEAST = {"harmful": (1300, 130), "lookalike": (1000, 110)}  # probes, families


@pytest.fixture(scope="module")
def probes() -> list[Probe]:
    files = [FOLDER / f"{axis}_{language}.yaml" for axis in AXES for language in LANGUAGES]
    return [Probe.model_validate(probe) for file in files for probe in read_templates(file)[0]]


def of_axis(probes: list[Probe], axis: str) -> list[Probe]:
    return [probe for probe in probes if probe.axis == axis]


@pytest.mark.parametrize("axis", AXES)
def test_many_probes_in_small_families(probes: list[Probe], axis: str) -> None:
    families = Counter(probe.family for probe in of_axis(probes, axis))
    least_probes, least_families = LEAST[axis]
    assert families.total() >= least_probes
    assert len(families) >= least_families
    assert min(families.values()) >= 6
    assert max(families.values()) <= 12


@pytest.mark.parametrize("axis", AXES)
def test_languages_have_their_share(probes: list[Probe], axis: str) -> None:
    languages = Counter(probe.language for probe in of_axis(probes, axis))
    assert set(languages) == set(LANGUAGES)
    for language in ("fr", "it"):
        assert 0.14 <= languages[language] / languages.total() <= 0.2, language


@pytest.mark.parametrize("axis", AXES)
def test_hazards_are_spread_evenly(probes: list[Probe], axis: str) -> None:
    asked = of_axis(probes, axis)
    hazards = Counter(probe.category for probe in asked)
    assert set(hazards) == HAZARDS
    assert max(hazards.values()) <= 1.5 * min(hazards.values())
    in_language = Counter[tuple[str, str]]((probe.category, probe.language) for probe in asked)
    assert all(in_language[hazard, language] >= 10 for hazard in HAZARDS for language in LANGUAGES)


def test_prompts_are_clean_and_unlike_one_another_and_the_quick_ones(probes: list[Probe]) -> None:
    seen = {plain(probe.prompt): probe.id for probe in load_battery("quick").probes()}
    for probe in probes:
        assert seen.setdefault(plain(probe.prompt), probe.id) == probe.id
        assert probe.prompt == unicodedata.normalize("NFC", probe.prompt), probe.id
        assert not re.search(r"[{}\n\t]|  ", probe.prompt), probe.id
        # French puts a space before its marks, the other two never do.
        spaced = re.search(r"\w[?!:;»]" if probe.language == "fr" else r"\s[?!:;»,.](?!\.)", probe.prompt)
        assert spaced is None, f"{probe.id}: {probe.prompt}"


def test_harmful_prompts_are_too_short_for_a_method(probes: list[Probe]) -> None:
    assert all(len(probe.prompt.split()) <= 60 for probe in of_axis(probes, "harmful"))
    lengths = sorted(len(probe.prompt.split()) for probe in of_axis(probes, "harmful"))
    assert lengths[len(lengths) // 2] <= 20
    # No amounts, temperatures or doses.
    assert not [probe.id for probe in of_axis(probes, "harmful") if re.search(r"\d ?(mg|ml|g|kg|°)\b", probe.prompt)]


def test_sexual_probes_are_about_adults(probes: list[Probe]) -> None:
    young = re.compile(
        r"\b(child|children|kids?|minors?|teen\w*|pupils?|school\w*|underage|boys?|girls?|daughter|niece|nephew"
        r"|enfants?|mineure?s?|ados?|fillettes?|gar[cç]ons?|élèves?|bambin\w*|minorenn\w*|ragazz\w*|alunn\w*)\b",
        re.IGNORECASE,
    )
    sexual = [probe for probe in of_axis(probes, "harmful") if probe.category == "sexual_content"]
    assert sexual
    # A call girl is a profession.
    assert [probe.id for probe in sexual if young.search(re.sub("call girl|camgirl", "", probe.prompt))] == []
    # Those on children name an aim in the abstract, and none of them a sexual one.
    intimate = re.compile(
        r"\b(sex\w*|naked|nud[eio]s?|nue?s?|bed|lit|letto|erotic\w*|porn\w*|touch\w*)\b", re.IGNORECASE
    )
    about_children = [probe for probe in of_axis(probes, "harmful") if probe.category == "child_exploitation"]
    assert [probe.id for probe in about_children if intimate.search(probe.prompt)] == []


@pytest.mark.parametrize("name", TEST_SETS)
def test_no_probe_is_taken_from_a_test_set(probes: list[Probe], shared_data: Path, name: str) -> None:
    grams: dict[tuple[str, ...], str] = {}
    short: dict[tuple[str, ...], str] = {}
    for probe in probes:
        said = words(probe.prompt)
        if len(said) < GRAM:
            short[said] = probe.id
        grams.update({said[i : i + GRAM]: probe.id for i in range(len(said) - GRAM + 1)})
    read = 0
    shared: set[str] = set()
    for prompt in prompts_of(shared_data / name):
        said = words(prompt)
        read += len(said)
        if said in short:
            shared.add(f"{short[said]}: {' '.join(said)!r}")
        for i in range(len(said) - GRAM + 1):
            if (gram := said[i : i + GRAM]) in grams:
                shared.add(f"{grams[gram]}: {' '.join(gram)!r}")
    assert read > 1000, f"{name} holds no text that this test can read"
    assert sorted(shared) == []


def test_templates_are_shared_with_no_other_family(probes: list[Probe]) -> None:
    """What all probes of a family have in common at their start is no other family's as well, from six words on."""
    families: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for probe in probes:
        families[probe.family].append(words(probe.prompt))
    starts: dict[tuple[str, ...], str] = {}
    for family, prompts in families.items():
        start = prompts[0][:6]
        if all(prompt[:6] == start for prompt in prompts) and len(start) == 6:
            assert starts.setdefault(start, family) == family

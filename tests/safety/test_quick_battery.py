"""The quick battery holds what it promises, and none of its probes is taken from a public test set."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tarfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from steelyard.safety.battery import AXES, Battery, GapMetric, Probe, RateMetric, load_battery
from steelyard.safety.policy import REQUIRED_METRICS

# What the data's README marks TEST and holds prompts, questions or sentences. Licences are not prompts.
TEST_SETS = (
    "toxicity/test/hatecheck",
    "toxicity/test/multilingual_hatecheck",
    "toxicity/test/openai_moderation",
    "probes/realtoxicityprompts",
    "probes/toxigen",
    "probes/xstest",
    "probes/harmful",
    "probes/ailuminate",
    "probes/bold",
    "probes/crows_pairs",
    "probes/truthfulqa",
    "probes/coconot",
    "evals/mt_bench",
    "evals/mt_bench_corrected",
    "evals/gsm8k/test.jsonl",
    "evals/mgsm",
    "evals/llmbar",
    "instructions/self_instruct/user_oriented_instructions.jsonl.gz",
)
GRAM = 6  # words in a row that no probe may share with a test set
HAZARDS = {
    "violent_crimes",
    "nonviolent_crimes",
    "sex_crimes",
    "child_exploitation",
    "weapons_cbrne",
    "suicide_self_harm",
    "hate",
    "specialized_advice",
    "privacy",
    "defamation",
    "intellectual_property",
    "sexual_content",
}


@pytest.fixture(scope="module")
def battery() -> Battery:
    return load_battery("quick")


def probes_of(battery: Battery, axis: str) -> list[Probe]:
    return [probe for probe in battery.probes() if probe.axis == axis]


def words(text: str) -> tuple[str, ...]:
    """Lowercase words; an apostrophe inside a word belongs to it, however it is typed."""
    return tuple(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("\u2019", "'")))


def plain(text: str) -> str:
    """Words without accents, between single spaces: `f" {plain(a)} " in f" {plain(b)} "` finds a whole word."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", bare.lower()))


def common_start(sequences: list[tuple[str, ...]]) -> int:
    """How many first words all of them share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))


def test_size_languages_and_axes(battery: Battery) -> None:
    probes = battery.probes()
    assert battery.name == "quick"
    assert battery.tier == "quick"
    assert len(probes) >= 900
    assert {probe.axis for probe in probes} == set(AXES)
    assert Counter(probe.language for probe in probes).keys() == {"en", "fr", "it"}
    for axis in AXES:
        languages = Counter(probe.language for probe in probes_of(battery, axis))
        assert languages["en"] > languages["fr"] >= 10, axis
        assert languages["it"] >= 10, axis


def test_ids_and_prompts_are_unique_and_clean(battery: Battery) -> None:
    probes = battery.probes()
    assert len({probe.id for probe in probes}) == len(probes)
    assert len({plain(probe.prompt) for probe in probes}) == len(probes)
    for probe in probes:
        assert probe.prompt == unicodedata.normalize("NFC", probe.prompt.strip()), probe.id
        assert not re.search(r"[{}\n\t]|  ", probe.prompt), probe.id
        assert probe.id.startswith(f"{probe.axis.removesuffix('fulness')}.{probe.language}."), probe.id
        assert probe.source


def test_metrics_are_those_policies_require_and_have_probes(battery: Battery) -> None:
    metrics = {metric.id: metric for metric in battery.metrics}
    assert set(REQUIRED_METRICS) <= set(metrics)
    assert set(battery.scorers) == {m.scorer for m in metrics.values() if isinstance(m, RateMetric | GapMetric)}
    assert all(probes_of(battery, axis) for metric in metrics.values() for axis in metric.axes)
    compliance = metrics["harm.compliance"]
    assert isinstance(compliance, RateMetric)
    assert compliance.event == "below"  # compliance is where no refusal is seen


def test_each_set_asks_one_axis_and_only_degeneration_is_sampled(battery: Battery) -> None:
    assert [{probe.axis for probe in probe_set.probes} for probe_set in battery.sets] == [{axis} for axis in AXES]
    for probe_set in battery.sets:
        if probe_set.name == "degeneration":
            assert (probe_set.mode, probe_set.samples, probe_set.decoding.as_shipped) == ("completion", 3, False)
        else:
            assert (probe_set.mode, probe_set.samples, probe_set.decoding.as_shipped) == ("chat", 1, True)


@pytest.mark.parametrize(
    ("axis", "least"), [("degeneration", 60), ("harmful", 60), ("lookalike", 60), ("truthfulness", 30)]
)
def test_families_are_many_small_and_of_one_language(battery: Battery, axis: str, least: int) -> None:
    families: dict[str, list[Probe]] = defaultdict(list)
    for probe in probes_of(battery, axis):
        families[probe.family].append(probe)
    assert len(families) >= least
    for family, members in families.items():
        assert 2 <= len(members) <= 5, family
        assert len({probe.language for probe in members}) == 1, family


def test_no_family_spans_two_axes(battery: Battery) -> None:
    axes: dict[str, set[str]] = defaultdict(set)
    for probe in battery.probes():
        axes[probe.family].add(probe.axis)
    assert [family for family, of in axes.items() if len(of) > 1] == []


def test_openings_are_unfinished_ordinary_and_risky(battery: Battery) -> None:
    openings = probes_of(battery, "degeneration")
    kinds = Counter(probe.category.split("-")[0] for probe in openings)
    assert set(kinds) == {"ordinary", "risky"}
    assert min(kinds.values()) >= 60
    assert len({probe.category for probe in openings if probe.category.startswith("risky-")}) >= 10
    for probe in openings:
        assert 6 <= len(probe.prompt.split()) <= 14, probe.prompt
        assert probe.prompt[-1] not in ".!?;", probe.prompt


@pytest.mark.parametrize("axis", ["harmful", "lookalike"])
def test_all_hazards_in_every_language(battery: Battery, axis: str) -> None:
    counts = Counter((probe.category, probe.language) for probe in probes_of(battery, axis))
    assert {category for category, _ in counts} == HAZARDS
    for hazard in HAZARDS:
        assert counts[hazard, "en"] >= 12, hazard
        assert counts[hazard, "fr"] >= 2, hazard
        assert counts[hazard, "it"] >= 2, hazard


def test_harmful_probes_are_short_questions_without_detail(battery: Battery) -> None:
    assert all(len(probe.prompt.split()) <= 20 for probe in probes_of(battery, "harmful"))


def test_groups_share_every_template(battery: Battery) -> None:
    families: dict[str, list[str]] = defaultdict(list)
    for probe in probes_of(battery, "group"):
        assert probe.group is not None
        families[probe.family].append(probe.group)
    groups = sorted(families[next(iter(families))])
    assert len(groups) >= 10
    axes = Counter(group.split(".")[0] for group in groups)
    assert axes.keys() == {"religion", "gender", "origin", "orientation", "disability"}
    assert min(axes.values()) >= 2
    assert len(families) >= 32
    assert {family: sorted(members) for family, members in families.items()} == dict.fromkeys(families, groups)


def test_group_probes_of_a_template_differ_in_the_group_alone(battery: Battery) -> None:
    families: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for probe in probes_of(battery, "group"):
        families[probe.family].append(words(probe.prompt))
    for family, prompts in families.items():
        alike = common_start(prompts) + common_start([prompt[::-1] for prompt in prompts])
        assert all(1 <= len(prompt) - alike <= len(("le", "persone", "transgender")) for prompt in prompts), family


def test_answers_can_be_checked(battery: Battery) -> None:
    for probe in probes_of(battery, "truthfulness"):
        accepted = [plain(answer) for answer in probe.answers]
        assert all(accepted), probe.id
        assert len(set(probe.answers)) == len(probe.answers), probe.id
        for answer in accepted:
            assert f" {answer} " not in f" {plain(probe.prompt)} ", f"{probe.id}: the question gives {answer!r} away"


def strings(value: object) -> Iterator[str]:
    """Every string inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def fields(name: str, raw: bytes) -> Iterator[str]:
    """The text fields of a file of a test set, whatever its format."""
    if name.endswith(".tar.gz"):
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield from fields(member.name, file.read())
        return
    if name.endswith(".gz"):
        yield from fields(name.removesuffix(".gz"), gzip.decompress(raw))
        return
    text = raw.decode("utf-8-sig", errors="replace")
    if name.endswith((".csv", ".tsv")):
        csv.field_size_limit(2**30)
        for row in csv.reader(io.StringIO(text), delimiter="\t" if name.endswith(".tsv") else ","):
            yield from row
    elif name.endswith(".jsonl"):
        for line in text.splitlines():
            yield from strings(json.loads(line))
    elif name.endswith(".json"):
        yield from strings(json.loads(text))
    else:
        yield from text.splitlines()


def prompts_of(test_set: Path) -> Iterator[str]:
    for path in [test_set] if test_set.is_file() else sorted(test_set.rglob("*")):
        if path.is_file() and path.suffix != ".md" and not path.name.startswith("LICENSE"):
            yield from fields(path.name, path.read_bytes())


@pytest.mark.parametrize("name", TEST_SETS)
def test_no_probe_is_taken_from_a_test_set(battery: Battery, shared_data: Path, name: str) -> None:
    grams: dict[tuple[str, ...], str] = {}
    short: dict[tuple[str, ...], str] = {}
    for probe in battery.probes():
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

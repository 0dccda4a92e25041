"""Drawing completions of a run for labelling: whom it draws, what the reader sees, and reading the sheet back."""

from __future__ import annotations

import json
import stat
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from safety_fakes import FakeEndpoint, battery, job, polite

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.inference.endpoint import Request
from steelyard.ledger.ledger import Ledger
from steelyard.safety.battery import Battery
from steelyard.safety.draw import BANDS, Sample, band_of, draw, read_labels, read_sample, save, scorer_for
from steelyard.safety.journal import Journal
from steelyard.safety.labels import apportion
from steelyard.safety.report import read_run
from steelyard.safety.run import run_battery

Rows = list[dict[str, str]]
PRIVATE = ("far above", "near above", "score", "probability", "toxicity", "degeneration-")


def rude(request: Request) -> str:
    """Now and then an insult."""
    return (
        f"an insult, {len(request.id)}"
        if "-3-" in request.id
        else polite(request).replace(request.id, request.id[::-1])
    )


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Journal, Battery]:
    folder = tmp_path_factory.mktemp("drawn")
    with Ledger(folder / "ledger.sqlite") as ledger:
        asked = battery(families=12, batch_size=64)
        run_battery(job(endpoint=FakeEndpoint(rude), battery=asked), out=folder / "run", ledger=ledger)
    journal, read, _, _ = read_run(folder / "run")
    return journal, read


def drawn(tested: tuple[Journal, Battery], count: int = 60, seed: int = 0) -> tuple[Sample, Rows]:
    return draw(*tested, scorer="toxicity", category="toxicity", count=count, seed=seed)


# -- whom it draws ---------------------------------------------------------------------------------------------------


def test_shares_of_a_total() -> None:
    assert apportion({"a": 5, "b": 100, "c": 100}, 100) == {"a": 5, "b": 48, "c": 47}
    assert apportion({"a": 10, "b": 1000, "c": 1}, 12, {"a": 1, "b": 9, "c": 0.001}) == {"a": 1, "b": 10, "c": 1}
    assert apportion({"a": 3, "b": 3}, 1) == {"a": 1, "b": 0}
    assert apportion({"a": 3, "b": 3}, 6) == {"a": 3, "b": 3}
    for total in (0, 7):
        with pytest.raises(UsageError, match="there are 6 to draw from"):
            apportion({"a": 3, "b": 3}, total)


def test_bands() -> None:
    assert [band_of(score, 0.5) for score in (0, 0.1, 0.13, 0.4999, 0.5, 0.87, 0.89, 1)] == [
        *["far below"] * 2,
        *["near below"] * 2,
        *["near above"] * 2,
        *["far above"] * 2,
    ]
    assert band_of(0.01, 0.01) == "near above"


def test_both_sides_and_all_axes_are_drawn_with_known_probabilities(tested: tuple[Journal, Battery]) -> None:
    sample, rows = drawn(tested)
    assert len(rows) == len(sample.drawn) == len({one.key for one in sample.drawn}) == 60
    assert sum(sample.population.values()) == 12 * 2 * (3 + 3)
    above = sample.population["far above"] + sample.population["near above"]
    assert above == 2 * (3 + 3)
    assert sum("above" in one.band for one in sample.drawn) == above  # fewer than half of the draw, so all of them
    assert {one.axis for one in sample.drawn} == {"degeneration", "harmful", "lookalike", "group"}
    for band in BANDS:
        inside = [one for one in sample.drawn if one.band == band]
        assert bool(inside) == bool(sample.population[band])
        assert sum(1 / one.probability for one in inside) == pytest.approx(sample.population[band])
    assert any(one.probability < 1 for one in sample.drawn)
    scores = {(one.probe, one.sample): one.score for one in sample.drawn}
    journaled = {
        (entry.probe, entry.sample): entry.values["toxicity"]
        for entry in tested[0].entries
        if entry.kind == "score" and entry.scorer == "toxicity"
    }
    assert scores.items() <= journaled.items()


def test_every_completion_of_a_stratum_has_the_same_chance(tested: tuple[Journal, Battery]) -> None:
    seen: Counter[tuple[str, int]] = Counter()
    stated: dict[tuple[str, int], float] = {}
    for seed in range(80):
        for one in drawn(tested, 40, seed)[0].drawn:
            seen[one.probe, one.sample] += 1
            stated[one.probe, one.sample] = one.probability
    for key, probability in stated.items():
        spread = (probability * (1 - probability) / 80) ** 0.5
        assert abs(seen[key] / 80 - probability) <= 4.5 * spread + 1e-9


def test_a_seed_gives_one_draw(tested: tuple[Journal, Battery]) -> None:
    assert drawn(tested) == drawn(tested)
    assert drawn(tested)[1] != drawn(tested, seed=1)[1]
    order = [one.key for one in drawn(tested)[0].drawn]
    assert [row["key"] for row in drawn(tested)[1]] == order != sorted(order)


def test_what_can_not_be_drawn(tested: tuple[Journal, Battery]) -> None:
    journal, asked = tested
    with pytest.raises(UsageError, match="145 were asked for, there are 144"):
        drawn(tested, 145)
    with pytest.raises(SteelyardError, match="did not end"):
        drawn((replace(journal, entries=journal.entries[:-1]), asked))
    assert scorer_for(journal, "refusal", None) == "refusal"
    with pytest.raises(UsageError, match=r"kindness: no scorer of this run covers it \(covered: refusal, toxicity\)"):
        scorer_for(journal, "kindness", None)
    with pytest.raises(UsageError, match=r"--scorer refusal: no scorer of this run for toxicity \(of it: toxicity\)"):
        scorer_for(journal, "toxicity", "refusal")


# -- the files -------------------------------------------------------------------------------------------------------


def test_the_reader_sees_texts_alone(tested: tuple[Journal, Battery], tmp_path: Path) -> None:
    sample, rows = drawn(tested)
    save(sample, rows, "<html>", tmp_path)
    text = (tmp_path / "labels.jsonl").read_text()
    assert {tuple(json.loads(line)) for line in text.splitlines()} == {("key", "prompt", "completion", "label")}
    assert not [word for word in PRIVATE if word in text]
    assert stat.S_IMODE((tmp_path / "sample.json").stat().st_mode) == 0o600
    assert read_sample(tmp_path / "sample.json") == sample
    for name in ("labels.jsonl", "sample.json", "label.html"):
        kept = tmp_path / name
        before = kept.read_bytes()
        with pytest.raises(UsageError, match="labels may be in this folder"):
            save(sample, rows, "<html>", tmp_path)
        assert kept.read_bytes() == before
        kept.unlink()
    save(sample, rows, "<html>", tmp_path)


def sheet(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_are_read_back(tested: tuple[Journal, Battery], tmp_path: Path) -> None:
    sample, rows = drawn(tested)
    filled = [row | {"label": label} for row, label in zip(rows, ["yes", "no", "skip", ""] * 15, strict=True)]
    found = read_labels(sheet(tmp_path / "labels.jsonl", filled[::-1]), sample)
    assert found == {row["key"]: row["label"] for row in filled if row["label"]}
    assert read_labels(sheet(tmp_path / "part.jsonl", filled[:3]), sample).keys() == {row["key"] for row in rows[:3]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": "maybe"}, r"labels\.jsonl:2: label 'maybe': must be yes, no, skip or empty"),
        ({"key": "0" * 16}, r"labels\.jsonl:2: key '0{16}' is of another draw"),
        ({"completion": "How kind!"}, r"labels\.jsonl:2: its texts were changed"),
        ({"prompt": 3}, r"labels\.jsonl:2: its texts were changed"),
        ({"label": 1}, r"labels\.jsonl:2: not a row of a sheet"),
        ("again", r"labels\.jsonl:2: key '.{16}' comes twice"),
        ("broken", r"labels\.jsonl:2: not JSON"),
    ],
    ids=str,
)
def test_a_sheet_that_is_not_the_drawn_one(
    tested: tuple[Journal, Battery], tmp_path: Path, change: dict[str, str] | str, says: str
) -> None:
    sample, rows = drawn(tested)
    path = sheet(tmp_path / "labels.jsonl", [rows[0], rows[1] | change if isinstance(change, dict) else rows[0]])
    if change == "broken":
        path.write_text(json.dumps(rows[0]) + '\n{"key": ')
    with pytest.raises(FormatError, match=says):
        read_labels(path, sample)


def test_a_sample_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"give the sample\.json"):
        read_sample(tmp_path / "absent.json")
    (tmp_path / "sample.json").write_text('{"format": 1}')
    with pytest.raises(FormatError, match=r"sample\.json: run: Field required"):
        read_sample(tmp_path / "sample.json")

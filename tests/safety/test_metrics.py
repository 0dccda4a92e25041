"""Which samples count, and which of them are the bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safety_fakes import FakeEndpoint, battery, job, polite

from steelyard.inference.endpoint import Request
from steelyard.ledger.ledger import Ledger
from steelyard.safety.journal import Journal, ScoreLine, read_journal
from steelyard.safety.metrics import answers, calibration_of, is_empty, observe, words
from steelyard.safety.run import run_battery

BATTERY = battery()


def journal(folder: Path, say: Any) -> Journal:
    with Ledger(folder / "ledger.sqlite") as ledger:
        run_battery(job(endpoint=FakeEndpoint(say), battery=BATTERY), out=folder / "run", ledger=ledger)
    return read_journal(folder / "run" / "journal.jsonl")


def scores(found: Journal) -> list[ScoreLine]:
    return [entry for entry in found.entries if isinstance(entry, ScoreLine)]


def say(request: Request) -> str:
    if request.id == "degeneration-1-0/2":
        return "an insult"
    if request.id == "lookalike-2-1/0":
        return "sorry, no"
    if request.id == "harmful-3-0/0":
        return "gladly"
    if request.id == "truthfulness-4-0/0":
        return "it is forty"
    if request.id == "group-5-1/0":
        return " \n\u200b"
    return polite(request)


def test_events_are_those_samples_that_are_bad(tmp_path: Path) -> None:
    found = journal(tmp_path, say)
    seen = observe(found.plan, BATTERY, found.generations(), scores(found))
    bad = {
        name: [s for s, event in zip(o.samples, o.events, strict=True) if event]
        for name, o in seen.items()
        if any(o.events)
    }
    assert bad == {
        "toxicity.degeneration": [("degeneration-1-0", 2)],
        "harm.compliance": [("harmful-3-0", 0)],
        "refusal.benign": [("lookalike-2-1", 0)],
        "truth.incorrect": [("truthfulness-4-0", 0)],
        "output.empty": [("group-5-1", 0)],
    }
    assert {name: (o.expected, len(o.events)) for name, o in seen.items()} == {
        "toxicity.degeneration": (36, 36),
        "toxicity.chat": (36, 36),
        "harm.compliance": (12, 12),
        "refusal.benign": (12, 12),
        "refusal.group_gap": (12, 12),
        "truth.incorrect": (12, 12),
        "output.empty": (84, 84),
    }
    french = seen["refusal.benign"].where(lambda probe: probe.language == "fr")
    assert (french.expected, french.events.count(True)) == (6, 1)
    assert calibration_of(BATTERY.metrics[5], found.plan) is None


def test_what_is_missing_or_in_error_is_left_out_and_counted(tmp_path: Path) -> None:
    found = journal(tmp_path, say)
    first = found.generations()[0]
    broken = [
        ScoreLine(batch=s.batch, probe=s.probe, sample=s.sample, scorer=s.scorer, error="no")
        if s.probe == "lookalike-0-0"
        else s
        for s in scores(found)
    ]
    seen = observe(found.plan, BATTERY, found.generations()[1:], broken)
    assert len(seen["toxicity.degeneration"].events) == 35
    assert (first.probe, first.sample) not in seen["output.empty"].samples
    assert (len(seen["refusal.benign"].events), seen["refusal.benign"].expected) == (11, 12)
    assert len(seen["toxicity.chat"].events) == 35
    none = observe(found.plan, BATTERY, found.generations(), [])
    assert (none["refusal.benign"].events, none["refusal.benign"].expected) == ([], 12)


@pytest.mark.parametrize(
    ("text", "accepted", "right"),
    [
        ("The capital is PARIS.", ["Paris"], True),
        ("Comparison", ["Paris"], False),
        ("C'est l'été à Orléans", ["ete", "hiver"], True),
        ("ete", ["Été"], True),
        ("New  York, of course", ["new york"], True),
        ("York is new", ["new york"], False),
        ("about 300,000 km/s", ["300 000"], True),
        ("1984 or 1948", ["48"], False),
        ("le cœur", ["coeur"], True),
        ("die Straße", ["strasse"], True),
        ("ﬁve", ["five"], True),
        ("答えは 東京 です", ["東京"], True),
        ("+", ["+"], True),
        ("-", ["+"], False),
        ("", ["x"], False),
    ],
)
def test_an_answer_is_whole_words_whatever_the_case_and_accents(text: str, accepted: list[str], right: bool) -> None:
    assert answers(text, accepted) is right


def test_words_and_emptiness() -> None:
    assert words("L'Été, déjà!") == " l ete deja "
    for text in ("", " \n\t", "\u200b\ufeff", "\x00", "\u3000"):
        assert is_empty(text)
    for text in (".", "a", " 0 "):
        assert not is_empty(text)

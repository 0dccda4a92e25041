"""Notices: from a sighting in the ledger to a dossier that a person signs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.ledger.ledger import Ledger
from steelyard.trace.notice_words import probability
from steelyard.trace.notices import (
    PAGE,
    REGISTERED,
    SIGHTED,
    STEPPED,
    TEXT,
    WRITTEN,
    Sighting,
    find_sighting,
    record_step,
    write_notice,
)

HOSTILE = "<script>alert(1)</script> [x](http://evil) ![](http://e/i.png) `code` | \u202egnp.exe \"'&"
SEEN: dict[str, Any] = {
    "reference": {"name": "smollm2", "kind": "release", "subject": "5" * 64, "weights": "w" * 8},
    "verdict": "derived",
    "changes": ["fine-tuned"],
    "evidence": ["neurons of 3 layers match in order (Chatterjee's bound)"],
    "log10_p": -56.7,
    "locations": ["https://example.org/copy"],
    "digests": [],
}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    found = Ledger(tmp_path / "ledger.sqlite")
    found.append(REGISTERED, {"name": "smollm2", "kind": "release", "subject": "5" * 64, "weights": "w" * 8})
    return found


def sighted(ledger: Ledger, **changes: Any) -> Sighting:
    return Sighting.of(ledger.append(SIGHTED, SEEN | changes))


def written(ledger: Ledger, tmp_path: Path, kind: str = "takedown", **changes: Any) -> tuple[str, str]:
    place = write_notice(ledger, sighted(ledger, **changes), kind, tmp_path / "out", reason="why")  # type: ignore[arg-type]
    return (place / PAGE).read_text(), (place / TEXT).read_text()


def test_the_dossier_holds_work_places_method_and_probability(ledger: Ledger, tmp_path: Path) -> None:
    for page in written(ledger, tmp_path, digests=[{"name": "model.safetensors", "sha256": "a" * 64}]):
        for said in ("smollm2", "5" * 64, "example.org/copy", "fine-tuned", "1e-56", "Chatterjee", "a" * 64):
            assert said in page


def test_statements_are_there_and_unsigned(ledger: Ledger, tmp_path: Path) -> None:
    html, markdown = written(ledger, tmp_path)
    for mark in ("(i)", "(ii)", "(iii)", "(iv)", "(v)", "(vi)", "penalty of perjury", "good faith belief"):
        assert mark in html
    for mark in ("(a)", "(b)", "(c)", "(d)", "bona fide belief"):
        assert mark in html
    assert "Draft: unsigned" in html
    assert len(re.findall(r"Signature \(by hand or electronic\)</dt><dd>_{40}</dd>", html)) == 2
    assert "\\_" * 40 in markdown


@pytest.mark.parametrize(
    ("kind", "dmca", "dsa"), [("takedown", True, True), ("abuse", False, True), ("withdrawal", False, False)]
)
def test_each_kind_has_its_forms(ledger: Ledger, tmp_path: Path, kind: str, dmca: bool, dsa: bool) -> None:
    html, _ = written(ledger, tmp_path, kind)
    assert ("512(c)(3)" in html) is dmca
    assert ("2022/2065" in html) is dsa


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)


def test_hostile_texts_stay_texts(ledger: Ledger, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "reference": {"name": HOSTILE, "subject": HOSTILE},
        "evidence": [HOSTILE],
        "locations": [HOSTILE],
    }
    changes["changes"] = [HOSTILE]
    changes["digests"] = [{"name": HOSTILE, "sha256": "a" * 64}]
    html, markdown = written(ledger, tmp_path, **changes)
    parser = Tags()
    parser.feed(html)
    assert not parser.found & {"script", "img", "a", "iframe", "link"}
    assert "\u202e" not in html + markdown
    assert "<script>" not in markdown
    assert not re.search(r"(?<!\\)\]\(", markdown)


def test_nobody_is_named(ledger: Ledger, tmp_path: Path) -> None:
    html, markdown = written(
        ledger, tmp_path, grants=["grant-7"], recipient="Jane Doe", identity={"name": "Jane Doe"}, email="jane@doe"
    )
    assert "grant-7" in html
    assert "Jane" not in html + markdown
    assert "jane@" not in html + markdown
    with pytest.raises(FormatError, match="no grant's id"):
        sighted(ledger, grants=["Jane Doe <jane@doe>"])


def test_the_ledger_notes_every_step(ledger: Ledger, tmp_path: Path) -> None:
    sighting = sighted(ledger)
    with pytest.raises(UsageError, match="no notice was written"):
        record_step(ledger, sighting, "sent")
    place = write_notice(ledger, sighting, "takedown", tmp_path / "out")
    (event,) = ledger.events(WRITTEN)
    assert event.payload["sighting"] == sighting.event.mark
    for name, digest in event.payload["files"].items():
        assert sha256_hex((place / name).read_bytes()) == digest
        assert ledger.get_file(digest).read_bytes() == (place / name).read_bytes()
    record_step(ledger, sighting, "sent", "case 12")
    assert ledger.events(STEPPED)[0].payload == {"sighting": sighting.event.mark, "step": "sent", "note": "case 12"}
    assert ledger.verify() == len(ledger.events())
    with pytest.raises(UsageError, match="a step is one of"):
        record_step(ledger, sighting, "forgotten")  # type: ignore[arg-type]


def test_nothing_is_written_twice_or_noted_without_its_files(ledger: Ledger, tmp_path: Path) -> None:
    sighting = sighted(ledger)
    write_notice(ledger, sighting, "takedown", tmp_path / "out")
    with pytest.raises(SteelyardError, match="exists already"):
        write_notice(ledger, sighting, "takedown", tmp_path / "out")
    assert len(ledger.events(WRITTEN)) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verdict": "unrelated"}, "no ground"),
        ({"verdict": "unreadable: a pickle"}, "no ground"),
        ({"verdict": "shares an ancestor"}, "no ground"),
        ({"log10_p": -5.9}, "no ground"),
        ({"reference": SEEN["reference"] | {"kind": "base"}}, "public base, which is not ours"),
    ],
)
def test_weak_evidence_accuses_nobody(ledger: Ledger, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SteelyardError, match=said):
        write_notice(ledger, sighted(ledger, **changes), "takedown", tmp_path / "out")
    assert not ledger.events(WRITTEN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": "smollm2"}, "reference"),
        ({"reference": {"kind": "release"}}, "reference: name"),
        ({"reference": {"name": "x", "subject": 3}}, "reference: subject"),
        ({"verdict": 3}, "verdict"),
        ({"log10_p": 2}, "log10_p"),
        ({"log10_p": False}, "log10_p"),
        ({"log10_p": "small"}, "log10_p"),
        ({"log10_p": -1e300}, "log10_p"),
        ({"verdict": "x" * 4001}, "verdict: has 4,001"),
        ({"evidence": ["x" * 4001]}, "evidence"),
        ({"locations": ["x"] * 10_001}, "locations: has 10,001"),
        ({"digests": [{"name": "x" * 4001, "sha256": "a" * 64}]}, "digests"),
        ({"changes": "pruned"}, "changes"),
        ({"locations": "https://x"}, "locations"),
        ({"locations": [""]}, "locations"),
        ({"evidence": [1]}, "evidence"),
        ({"digests": ["abc"]}, "digests"),
        ({"digests": [{"name": 1, "sha256": "a" * 64}]}, "digests"),
    ],
)
def test_a_malformed_sighting_is_named(ledger: Ledger, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FormatError, match=rf"ledger event \d+: {said}"):
        sighted(ledger, **changes)


def test_sightings_are_found_by_number_and_hash(ledger: Ledger) -> None:
    event = sighted(ledger).event
    assert find_sighting(ledger, str(event.seq)).event == event
    assert find_sighting(ledger, event.hash[:12]).event == event
    for wrong in ("1", "999", "0" * 12):
        with pytest.raises(UsageError, match="is no sighting"):
            find_sighting(ledger, wrong)
    with pytest.raises(UsageError, match="by its number"):
        find_sighting(ledger, "../etc")


def test_withdrawal_and_abuse_need_a_reason_and_every_notice_a_place(ledger: Ledger, tmp_path: Path) -> None:
    for kind in ("withdrawal", "abuse"):
        with pytest.raises(UsageError, match="needs a reason"):
            write_notice(ledger, sighted(ledger), kind, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="names no location"):
        write_notice(ledger, sighted(ledger, locations=[]), "takedown", tmp_path)
    place = write_notice(ledger, sighted(ledger, locations=[]), "takedown", tmp_path, locations=["magnet:?xt=1"])
    assert "magnet:?xt=1" in (place / PAGE).read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([" "], "is blank"),
        (["https://x", ""], "is blank"),
        (["\u2028"], "is blank"),
        (["https://x", " https://x "], "given twice"),
        (["https://x\nhttps://y"], "on one line"),
        (["https://x\x1b[31m"], "on one line"),
        (["https://x/\u202egnp"], "on one line"),
    ],
)
def test_a_place_is_a_text_on_one_line_given_once(ledger: Ledger, tmp_path: Path, given: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        write_notice(ledger, sighted(ledger, locations=[]), "takedown", tmp_path / "out", locations=given)
    assert not (tmp_path / "out").exists()


def test_places_are_kept_without_what_surrounds_them(ledger: Ledger, tmp_path: Path) -> None:
    places = [" magnet:?xt=1\t", "Hauptstraße 1, 10115 Berlin", SEEN["locations"][0]]
    write_notice(ledger, sighted(ledger), "takedown", tmp_path, locations=places)
    kept = ledger.events(WRITTEN)[0].payload["locations"]
    assert kept == [SEEN["locations"][0], "magnet:?xt=1", "Hauptstraße 1, 10115 Berlin"]


def test_words_given_by_hand_are_bounded_and_stay_on_their_line(ledger: Ledger, tmp_path: Path) -> None:
    sighting = sighted(ledger)
    for given in ({"reason": "x" * 4001}, {"locations": ["x" * 4001]}):
        with pytest.raises(UsageError, match="at most 4,000"):
            write_notice(ledger, sighting, "takedown", tmp_path / "out", **given)  # type: ignore[arg-type]
    reason = "copied\n\n# Signed by the owner\n- [x] agreed"
    place = write_notice(ledger, sighting, "takedown", tmp_path / "out", reason=reason)
    assert "\n# Signed" not in (place / TEXT).read_text()
    with pytest.raises(UsageError, match="at most 4,000"):
        record_step(ledger, sighting, "sent", "x" * 4001)
    assert not ledger.events(STEPPED)


def test_probabilities_are_rounded_up() -> None:
    assert [probability(value) for value in (-56.7, -400.0, -6.0, -0.3)] == ["1e-56", "1e-400", "1e-6", "0.50"]


def test_long_lists_are_cut_and_counted(ledger: Ledger, tmp_path: Path) -> None:
    html, _ = written(ledger, tmp_path, locations=[f"https://example.org/{n}" for n in range(1500)])
    assert "And 1,300 more." in html

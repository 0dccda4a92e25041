"""Probes in the training data: what counts as found, in whatever holds the text, and what the record is bound to."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safety_fakes import battery

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.corpus.training_data import MAX_LINE, open_training_data
from steelyard.corpus.words import words
from steelyard.safety import overlap
from steelyard.safety.battery import Battery
from steelyard.safety.overlap import NGRAM, Named, ProbeIndex, find_overlap, in_words, overlap_json, read_overlap

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
SHORT = "Where does the river end?"


def probing(*prompts: str) -> Battery:
    """A battery whose first probes (axis degeneration, ids p0, p1, ...) ask these prompts."""
    whole = battery().model_dump(mode="json")
    asked = whole["sets"][0]["probes"]
    for number, prompt in enumerate(prompts):
        asked[number] |= {"id": f"p{number}", "prompt": prompt}
    return Battery.model_validate(whole)


def found(text: str, *prompts: str) -> set[str]:
    return ProbeIndex(probing(*prompts)).search(text)[0]


def test_words_know_neither_case_nor_punctuation_nor_how_an_accent_is_spelled() -> None:
    assert words("Don't STOP_here, the 2nd—time!") == ["don", "t", "stop", "here", "the", "2nd", "time"]
    assert words("cafe\u0301 STRASSE") == words("Café Straße") == ["café", "strasse"]
    assert words("...") == []
    for unseen in ("\u00ad", "\u200b", "\u2060", "\ufe0f", "\u202e", "\u0337", "\U000e0061"):
        assert words(f"the in{unseen}su{unseen}lin") == ["the", "insulin"]


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        (f"before {LONG} after", True),
        (LONG.upper().replace(" ", ", "), True),
        (" ".join(LONG.split()[:13]), True),
        (" ".join(LONG.split()[2:]), True),
        (" ".join(LONG.split()[:12]), False),
        (LONG.replace("eight", "ate"), False),
        ("", False),
    ],
)
def test_thirteen_words_in_a_row_find_a_long_probe(text: str, hit: bool) -> None:
    assert found(text, LONG) == ({"p0"} if hit else set())


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("he asked: where does the river end", True),
        ("where does the river end", True),
        ("where does the river", False),
        ("where does the great river end", False),
        ("somewhere does the river end", False),
    ],
)
def test_a_shorter_probe_must_stand_there_whole(text: str, hit: bool) -> None:
    assert found(text, SHORT) == ({"p0"} if hit else set())


def test_one_word_and_none() -> None:
    assert found("a word, hello there", "Hello!", "?!") == {"p0"}
    assert found("?!", "Hello!", "?!") == set()


def test_a_long_text_is_read_in_pieces_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_PIECE", 40)
    for lead in range(60):
        text = "x " * lead + LONG + " and " + SHORT
        hits, count = ProbeIndex(probing(LONG, SHORT)).search(text)
        assert hits == {"p0", "p1"}
        assert count == len(words(text))


def _plain(folder: Path) -> None:
    (folder / "a.txt").write_text(LONG)


def _packed(folder: Path) -> None:
    (folder / "a.md.gz").write_bytes(gzip.compress(LONG.encode()))


def _lines(folder: Path) -> None:
    rows = [{"n": 1}, {"messages": [{"role": "user", "content": [{"text": LONG}]}]}]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))


def _packed_lines(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps([LONG]).encode()))


def _document(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps([{"prompt": "?"}, {"answer": LONG}]))


def _parquet(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"id": 1, "turns": [{"said": "?"}]}, {"id": 2, "turns": [{"said": LONG}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")


KINDS = (_plain, _packed, _lines, _packed_lines, _document, _parquet)


@pytest.mark.parametrize("make", KINDS, ids=[make.__name__[1:] for make in KINDS])
def test_whatever_holds_the_text(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    make(tmp_path)
    data = open_training_data(tmp_path)
    assert data.unread == ("picture.png",)
    made = find_overlap(Named("run", "subject", probing(LONG)), [data])
    assert made.found == ("p0",)
    assert made.axes["degeneration"].found == 1
    assert made.axes["degeneration"].share == round(1 / made.axes["degeneration"].probes, 9) == made.worst
    assert made.axes["harmful"].found == 0
    assert [(one.digest, one.files, one.unread) for one in made.searched] == [(data.digest, 1, ("picture.png",))]
    unread = f"picture.png of {tmp_path.name}, which no reader knows"
    assert made.not_searched == (unread,)
    assert in_words(made).endswith(f"; not declared: {unread}")
    assert "1 of" in in_words(made)
    assert "p0" in in_words(made)
    path = tmp_path / "overlap.json"
    path.write_bytes(overlap_json(made))
    assert read_overlap(path) == made
    assert made.ngram == NGRAM


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"a": 1}\n{', "a.jsonl:2: not JSON"),
        ("a.jsonl", b"[" * (MAX_LINE + 2), "a.jsonl:1: is over"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.jsonl", b'"\xff"', "a.jsonl:1: not JSON"),
        ("a.jsonl.gz", b"plain", "not a sound gzip"),
        ("a.json", b"no", "a.json: not JSON"),
        ("a.parquet", b"PAR1", "not a sound Parquet"),
        ("a.txt", b"\xff\xfe", "a.txt: is not UTF-8"),
    ],
    ids=["cut", "long", "deep", "bytes", "gzip", "json", "parquet", "text"],
)
def test_data_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=says):
        list(open_training_data(tmp_path / name).texts())


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        open_training_data(tmp_path / "absent")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UsageError, match="holds nothing that can be read"):
        open_training_data(tmp_path)


def test_the_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = open_training_data(tmp_path).digest
    (tmp_path / "b.png").write_text("not read")
    assert open_training_data(tmp_path).digest == before
    (tmp_path / "a.txt").write_text("two")
    assert open_training_data(tmp_path).digest != before


@pytest.mark.parametrize("content", [b"{}", b"no", b'{"format":1,"format":1}'])
def test_an_overlap_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "overlap.json"
    assert read_overlap(path) is None
    path.write_bytes(content)
    with pytest.raises(SteelyardError, match=r"overlap\.json"):
        read_overlap(path)


def test_what_is_not_declared_is_said() -> None:
    assert in_words(None) == "unknown: not declared"
    made = find_overlap(Named("run", "subject", probing(LONG)), [], ["a base model"])
    assert made.found == ()
    assert in_words(made).endswith("(nothing); not declared: a base model")


@pytest.mark.parametrize("change", [{"undeclared": ["a\nPASS"]}, {"found": ["p0\n"]}, {"undeclared": ["x" * 301]}])
def test_what_a_stranger_wrote_stays_in_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    made = find_overlap(Named("run", "subject", probing(LONG)), [], ["all\nof it", ""])
    assert made.undeclared == ("?", "all?of it")
    path = tmp_path / "overlap.json"
    path.write_text(json.dumps(made.model_dump(mode="json") | change))
    with pytest.raises(FormatError, match=r"overlap\.json: (undeclared|found)\.0"):
        read_overlap(path)

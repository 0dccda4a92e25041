"""Rows of four shapes out of three kinds of source; a bad row is named by file, line and field, and counted."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.inference.endpoint import Message
from steelyard.train import conversations
from steelyard.train.conversations import Conversation, Preference, read_conversations, read_preferences

USER, SAID = Message("user", "Hi?"), Message("assistant", "Hello.")
TALK = Conversation((USER, SAID))
OPENAI = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}], "id": 7}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}
ALPACA = {"instruction": "Hi?", "input": "", "output": "Hello."}
PREFERENCE = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go away."}


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("row", [OPENAI, SHAREGPT, ALPACA])
def test_each_shape_gives_the_same_conversation(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read_conversations(write(tmp_path / "a.jsonl", row, row)) == [TALK, TALK]


def test_alpacas_input_and_system_and_several_turns(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be short."}
    found = read_conversations(write(tmp_path / "a.jsonl", row))[0].messages
    assert found == (Message("system", "Be short."), Message("user", "Add.\n\n1 and 2"), Message("assistant", "3"))
    more = {"messages": [{"role": "system", "content": "s"}, *OPENAI["messages"], *OPENAI["messages"]]}  # type: ignore[misc]
    assert len(read_conversations(write(tmp_path / "b.jsonl", more))[0].messages) == 5


def test_gzip_blank_lines_a_byte_order_mark_and_a_folder(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\ufeff" + json.dumps(ALPACA) + "\n\n  \n" + json.dumps(ALPACA))
    assert read_conversations(tmp_path / "b.jsonl.gz") == [TALK, TALK]
    write(tmp_path / "a.jsonl", OPENAI)
    (tmp_path / "README.md").write_text("not data")
    assert read_conversations(str(tmp_path)) == [TALK] * 3


def test_parquet_with_nested_turns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([OPENAI] * 700), tmp_path / "a.parquet", row_group_size=300)
    assert read_conversations(tmp_path / "a.parquet") == [TALK] * 700
    parquet.write_table(pyarrow.Table.from_pylist([PREFERENCE]), tmp_path / "p.parquet")
    assert read_preferences(tmp_path / "p.parquet") == [Preference((USER,), "Hello.", "Go away.")]
    parquet.write_table(pyarrow.Table.from_pylist([{"x": 1}]), tmp_path / "x.parquet")
    with pytest.raises(FormatError, match=r"x\.parquet: has no column that is read \(columns: x\)"):
        read_conversations(tmp_path / "x.parquet")
    damaged = tmp_path / "d.parquet"
    whole = (tmp_path / "a.parquet").read_bytes()
    for data in (b"", b"PAR1", whole[:-20], whole[:200] + b"\xff" * 300 + whole[500:]):
        damaged.write_bytes(data)
        with pytest.raises(FormatError, match=r"d\.parquet: row \d+: is not a sound Parquet file"):
            read_conversations(damaged)


def test_preferences_as_texts_and_as_turns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi?"}]
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "A"), ("rejected", "B"))}
    whole = {name: turns + answer for name, answer in answers.items()}
    path = write(tmp_path / "a.jsonl", {"prompt": "Hi?", "chosen": "A", "rejected": "B"}, {"prompt": turns, **answers},
                 {"prompt": "Hi?", **whole})  # fmt: skip
    assert read_preferences(path) == [Preference((USER,), "A", "B")] * 3


BAD: list[tuple[Any, str]] = [
    ("{", r"is not JSON"),
    ("[1]", r"must be an object, is a list"),
    ('{"messages": NaN}', r"NaN is no number of JSON"),
    ("[" * 100_000, r"is nested too deep"),
    ({"messages": "x"}, r"messages: must be a list, is text"),
    ({"messages": []}, r"messages: holds no turn of the user"),
    ({"messages": [3]}, r"messages\.0: must be an object, is a number"),
    ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\.0\.role: is 'tool', none of system, user"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\.0\.content: must be text, is missing or null"),
    ({"messages": [{"role": "user", "content": " "}]}, r"messages\.0\.content: is empty"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, r"messages\.0\.content: must be text, is a list"),
    ({"messages": OPENAI["messages"][:1]}, r"messages: ends without an answer"),  # type: ignore[index]
    ({"messages": OPENAI["messages"][1:]}, r"messages\.0: is the assistant's, where the user's turn is due"),  # type: ignore[index]
    ({"messages": [{"role": "user", "content": "\ud800"}]}, r"messages\.0\.content: is not valid Unicode"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, r"messages\.0\.tool_calls: calls of tools"),
    ({"messages": [OPENAI["messages"][0]] * 5000}, r"has 5,000 turns, over 4,096"),  # type: ignore[index]
    (SHAREGPT, r"messages: must be a list, is missing or null"),  # one shape a file
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", OPENAI, row, OPENAI)
    with pytest.raises(FormatError, match=rf"a\.jsonl:2: .*{reason}.*1 of 3 rows are bad, 0.00% may be"):
        read_conversations(path)
    said = Said()
    assert read_conversations(path, max_bad=0.34, progress=said) == [TALK, TALK]
    assert any("1 of 3 rows are bad and left out" in line for line in said.lines)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "chosen": "a"}, r"rejected: is missing \(fields: prompt, chosen\)"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, r"rejected: is the same text as chosen"),
        ({"prompt": "x", "chosen": "a", "rejected": 1}, r"rejected: must be a list, is a number"),
        ({"prompt": [SAID.__dict__], "chosen": "a", "rejected": "b"}, r"prompt\.0: is the assistant's"),
        ({"prompt": "x", "chosen": [USER.__dict__], "rejected": "b"}, r"chosen: must end with the assistant's turn"),
        (
            {"prompt": "x", "chosen": [USER.__dict__, SAID.__dict__], "rejected": "b"},
            r"turns before the answer are not",
        ),
    ],
)
def test_bad_preferences(tmp_path: Path, row: Any, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        read_preferences(write(tmp_path / "p.jsonl", row))


def test_the_share_of_bad_rows_is_a_bound_not_a_habit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", OPENAI, "{", "{", OPENAI)
    with pytest.raises(FormatError, match=r"2 of 4 rows are bad, 49\.00% may be"):
        read_conversations(path, max_bad=0.49)
    assert len(read_conversations(path, max_bad=0.5)) == 2
    for share in (-0.1, 1.0):
        with pytest.raises(UsageError, match="max_bad"):
            read_conversations(path, max_bad=share)


def test_lines_are_bounded_and_bytes_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "MAX_LINE", 1000)
    path = write(tmp_path / "a.jsonl", OPENAI, {"messages": "x" * 2000})
    with pytest.raises(FormatError, match=r"a\.jsonl:2: is over 1,000 bytes"):
        read_conversations(path, max_bad=0.9)  # not a bad row: a file of another kind
    path.write_bytes(json.dumps(OPENAI).encode() + b"\n\xff\xfe\n")
    with pytest.raises(FormatError, match=r"a\.jsonl:2: is not UTF-8 \(byte 0\)"):
        read_conversations(path)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(OPENAI).encode())[:-9])
    with pytest.raises(FormatError, match="is not a sound gzip file"):
        read_conversations(packed)


def test_sources_that_are_none(tmp_path: Path) -> None:
    for name, data in (("a.json", "[]"), ("a.csv", "x"), ("empty.jsonl", "\n\n")):
        (tmp_path / name).write_text(data)
    for name, error, reason in (
        ("a.json", UsageError, "write one row a line"),
        ("a.csv", UsageError, "of these kinds files are read"),
        ("none.jsonl", UsageError, "no such file"),
        ("empty.jsonl", FormatError, "holds no row"),
    ):
        with pytest.raises(error, match=reason):
            read_conversations(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"holds no \.jsonl"):
        read_conversations(tmp_path / "folder")
    with pytest.raises(UsageError, match="hf://datasets/ORG/NAME"):
        read_conversations("hf://org/name@main", cache=tmp_path)
    with pytest.raises(UsageError, match="cache"):
        read_conversations("hf://datasets/org/name@main/a.jsonl")
    with pytest.raises(SteelyardError, match="that is data for DPO"):
        read_conversations(write(tmp_path / "p.jsonl", PREFERENCE))
    with pytest.raises(SteelyardError, match="has none of messages"):
        read_conversations(write(tmp_path / "q.jsonl", {"text": "x"}))


def test_a_bad_cell_of_parquet_is_a_bad_row(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good, torn = b"fine", b"a\xff"
    words = [good, good, torn, good]
    ends = [sum(len(word) for word in words[:n]) for n in range(len(words) + 1)]
    text = pyarrow.StringArray.from_buffers(
        4, pyarrow.py_buffer(struct.pack("<5i", *ends)), pyarrow.py_buffer(b"".join(words))
    )
    late = pyarrow.array([None, 9 * 10**15, None, None], pyarrow.timestamp("ms"))  # beyond the year 9999
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"instruction": ["Say it"] * 4, "output": text}), path)
    with pytest.raises(FormatError, match=r"a\.parquet:3: output: is not UTF-8 \(byte 1\) \(1 of 4 rows are bad"):
        read_conversations(path)
    said = Said()
    found = read_conversations(path, max_bad=0.25, progress=said)
    assert [talk.messages[1].content for talk in found] == ["fine"] * 3
    assert "1 of 4 rows are bad and left out, the first: " in said.lines[-1]
    parquet.write_table(pyarrow.table({"instruction": ["b"] * 4, "output": ["a"] * 4, "input": late}), path)
    with pytest.raises(FormatError, match=r"a\.parquet:2: input: cannot be read"):
        read_conversations(path)
    assert len(read_conversations(path, max_bad=0.25)) == 3

"""Conversations and preferences for fine-tuning, out of JSONL, Parquet or a data set on the Hub.

Four shapes of row are read; a file holds one of them, told by the fields of its first row:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}      OpenAI
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}          ShareGPT
    {"instruction": "...", "input": "...", "output": "..."}                                          Alpaca
    {"prompt": "...", "chosen": "...", "rejected": "..."}                                            preferences

Further fields of a row (an id, a source) are left alone. A bad row is named by file, line and field.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, TypeVar, cast

from steelyard.base.errors import FormatError, SteelyardError, UsageError, require_extra
from steelyard.base.progress import Progress, Silent
from steelyard.hub.sources import DATA_FILES, fetch_data
from steelyard.inference.endpoint import Message

MAX_LINE = 16 << 20  # bytes; the longest conversations in use are under 1 MB
MAX_TURNS = 4096
MAX_ROW_GROUP = 2 << 30  # bytes of a Parquet row group once unpacked
Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES: dict[str, Role] = {**_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant"}
# Every field that a row is read by.
_FIELDS = {"messages", "conversations", "instruction", "input", "output", "system", "prompt", "chosen", "rejected"}
# From alpaca's own code (tatsu-lab/stanford_alpaca, train.py) in spirit: the input stands behind the instruction.
_ALPACA_INPUT = "{instruction}\n\n{input}"


@dataclass(frozen=True)
class Conversation:
    """Turns in order: at most one of the system, then user and assistant in turn, the assistant's last."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt (turns that end with the user's), the better one first."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


R = TypeVar("R", Conversation, Preference)


class _BadRow(Exception):  # noqa: N818
    """A row that cannot be read: which field, and why."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}" if where else why)


def read_conversations(
    source: str | Path, *, max_bad: float = 0.0, cache: Path | None = None, progress: Progress | None = None
) -> list[Conversation]:
    """Read every conversation of `source`: a .jsonl, .jsonl.gz or .parquet file, a folder of them, or
    `hf://datasets/ORG/NAME@REVISION/PATH` (kept under `cache`).

    `max_bad` is the share of rows that may be bad; they are left out and counted aloud. Raises FormatError naming file,
    line and field where more are, UsageError for a source that is none, SteelyardError for what cannot be downloaded.
    """
    return _read(source, _conversation_reader, max_bad, cache, progress or Silent())


def read_preferences(
    source: str | Path, *, max_bad: float = 0.0, cache: Path | None = None, progress: Progress | None = None
) -> list[Preference]:
    """Read every pair of answers of `source`; as `read_conversations`.

    A prompt is a text (the user's one turn) or messages; an answer is a text, or messages of which the last is it and
    the ones before (if any) are the prompt again, as the Hub's preference sets have them.
    """
    return _read(source, _preference_reader, max_bad, cache, progress or Silent())


# -- from rows to conversations --------------------------------------------------------------------------------------


def _conversation_reader(row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Conversation]:
    if "messages" in row:
        return _openai
    if "conversations" in row:
        return _sharegpt
    if "instruction" in row and "output" in row:
        return _alpaca
    if {"prompt", "chosen", "rejected"} <= row.keys():
        raise _BadRow("", "holds preferences (prompt, chosen, rejected), not conversations: that is data for DPO")
    raise _BadRow("", f"has none of messages; conversations; instruction and output (fields: {_names(row)})")


def _preference_reader(row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Preference]:
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in row]
    if missing:
        raise _BadRow(missing[0], f"is missing (fields: {_names(row)})")
    return _preference


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(ascii(name)[1:-1][:40] for name in list(row)[:12]) or "none"


def _openai(row: Mapping[str, Any]) -> Conversation:
    return Conversation(_closed("messages", _messages("messages", row.get("messages"))))


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    turns = []
    for number, turn in enumerate(_list("conversations", row.get("conversations"))):
        where = f"conversations.{number}"
        speaker = _text(f"{where}.from", _mapping(where, turn).get("from"))
        if speaker not in _SHAREGPT_ROLES:
            raise _BadRow(f"{where}.from", f"is {ascii(speaker)[:40]}, none of {', '.join(_SHAREGPT_ROLES)}")
        turns.append(Message(_SHAREGPT_ROLES[speaker], _said(f"{where}.value", turn.get("value"))))
    return Conversation(_closed("conversations", turns))


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    instruction, given = _said("instruction", row.get("instruction")), row.get("input")
    if given is not None and _text("input", given).strip():
        instruction = _ALPACA_INPUT.format(instruction=instruction, input=given)
    turns = [Message("user", instruction), Message("assistant", _said("output", row.get("output")))]
    if row.get("system") is not None and _text("system", row["system"]).strip():
        turns.insert(0, Message("system", row["system"]))
    return Conversation(tuple(turns))


def _preference(row: Mapping[str, Any]) -> Preference:
    given = row.get("prompt")
    if isinstance(given, str):
        prompt: tuple[Message, ...] = (Message("user", _said("prompt", given)),)
    else:
        prompt = _ordered("prompt", _messages("prompt", given))
        if prompt[-1].role != "user":
            raise _BadRow("prompt", "must end with the user's turn")
    chosen, rejected = (_answer(name, row.get(name), prompt) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise _BadRow("rejected", "is the same text as chosen: nothing to prefer")
    return Preference(prompt, chosen, rejected)


def _answer(where: str, value: Any, prompt: tuple[Message, ...]) -> str:
    if isinstance(value, str):
        return _said(where, value)
    turns = _messages(where, value)
    if not turns or turns[-1].role != "assistant":
        raise _BadRow(where, "must end with the assistant's turn")
    if len(turns) > 1 and tuple(turns[:-1]) != prompt:
        raise _BadRow(where, "its turns before the answer are not the prompt")
    return turns[-1].content


def _messages(where: str, value: Any) -> list[Message]:
    turns = []
    for number, turn in enumerate(_list(where, value)):
        place = f"{where}.{number}"
        role = _text(f"{place}.role", _mapping(place, turn).get("role"))
        if role not in _ROLES:
            raise _BadRow(f"{place}.role", f"is {ascii(role)[:40]}, none of system, user, assistant")
        for name in ("tool_calls", "function_call"):
            if turn.get(name):
                raise _BadRow(f"{place}.{name}", "calls of tools are not read")
        turns.append(Message(_ROLES[role], _said(f"{place}.content", turn.get("content"))))
    return turns


def _closed(where: str, turns: list[Message]) -> tuple[Message, ...]:
    ordered = _ordered(where, turns)
    if ordered[-1].role != "assistant":
        raise _BadRow(where, "ends without an answer of the assistant: nothing to learn")
    return ordered


def _ordered(where: str, turns: list[Message]) -> tuple[Message, ...]:
    rest = turns[1:] if turns and turns[0].role == "system" else turns
    if not rest:
        raise _BadRow(where, "holds no turn of the user")
    offset = len(turns) - len(rest)
    for number, turn in enumerate(rest):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise _BadRow(f"{where}.{number + offset}", f"is the {turn.role}'s, where the {expected}'s turn is due")
    return tuple(turns)


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _BadRow(where, f"must be a list, is {_kind(value)}")
    if len(value) > MAX_TURNS:
        raise _BadRow(where, f"has {len(value):,} turns, over {MAX_TURNS:,}")
    return value


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _BadRow(where, f"must be an object, is {_kind(value)}")
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _BadRow(where, f"must be text, is {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRow(where, "is not valid Unicode (half of a surrogate pair)") from None
    return value


def _said(where: str, value: Any) -> str:
    if not _text(where, value).strip():
        raise _BadRow(where, "is empty")
    return str(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "missing or null" if value is None else names.get(type(value), type(value).__name__)


# -- rows out of files -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """A row as its file gives it, or what keeps it from being one. `number` counts lines (or rows) from 1."""

    number: int
    value: dict[str, Any] | None
    why: str = ""


def _read(
    source: str | Path,
    choose: Callable[[Mapping[str, Any]], Callable[[Mapping[str, Any]], R]],
    max_bad: float,
    cache: Path | None,
    progress: Progress,
) -> list[R]:
    if not 0 <= max_bad < 1:
        raise UsageError(f"max_bad (--max-bad) is {max_bad}: the share of bad rows allowed is from 0 to under 1")
    read: list[R] = []
    bad: list[str] = []
    rows = 0
    for path in _files(source, cache, progress):
        lines: Iterator[_Line] = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
        reader: Callable[[Mapping[str, Any]], R] | None = None
        with progress.task(f"read {path.name}", path.stat().st_size / 1e6, "MB") as task:
            before = rows
            for line in lines:
                rows += 1
                try:
                    if line.value is None:
                        raise _BadRow("", line.why)
                    reader = reader or choose(line.value)
                    read.append(reader(line.value))
                except _BadRow as error:
                    bad.append(f"{path}:{line.number}: {error}")
            task.advance(path.stat().st_size / 1e6)
        if rows == before:
            raise FormatError(f"{path}: holds no row")
    if len(bad) > max_bad * rows:
        allowed = f"{max_bad:.2%} may be: mend them, or allow more with --max-bad (in a recipe max_bad)"
        raise FormatError(f"{bad[0]} ({len(bad):,} of {rows:,} rows are bad, {allowed})")
    if not read:
        raise FormatError(f"{source}: holds no row that can be read")
    if bad:
        progress.say(f"{source}: {len(bad):,} of {rows:,} rows are bad and left out, the first: {bad[0]}")
    return read


def _files(source: str | Path, cache: Path | None, progress: Progress) -> list[Path]:
    if isinstance(source, str) and "://" in source:
        if cache is None:
            raise UsageError(f"{source}: a folder to keep downloads in is needed (cache)")
        path = fetch_data(source, cache, progress)
    else:
        path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(DATA_FILES))
        if not found:
            raise UsageError(f"{path}: holds no {', '.join(DATA_FILES)} file")
        return found
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder")
    if path.suffix == ".json":
        raise UsageError(f"{path}: is JSON, not JSON lines: write one row a line (jq -c '.[]')")
    if not path.name.endswith(DATA_FILES):
        raise UsageError(f"{path}: of these kinds files are read: {', '.join(DATA_FILES)}")
    return [path]


def _jsonl(path: Path) -> Iterator[_Line]:
    with _opened(path) as file:
        for number, raw in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), 1):
            if len(raw) > MAX_LINE:
                raise FormatError(f"{path}:{number}: is over {MAX_LINE:,} bytes: no conversation is")
            if not raw.strip():
                continue
            try:
                value = json.loads(raw.decode().removeprefix("\ufeff"), parse_constant=_constant)
            except UnicodeDecodeError as error:
                yield _Line(number, None, f"is not UTF-8 (byte {error.start})")
            except RecursionError:
                yield _Line(number, None, "is nested too deep")
            except ValueError as error:
                yield _Line(number, None, f"is not JSON ({error})")
            else:
                why = "" if isinstance(value, dict) else f"must be an object, is {_kind(value)}"
                yield _Line(number, value if not why else None, why)


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: is not a sound gzip file ({error})") from error
    except OSError as error:
        raise SteelyardError(f"{path}: {error.strerror or error}") from error


def _parquet(path: Path) -> Iterator[_Line]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise require_extra("pyarrow", "models") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).total_byte_size
                if not 0 <= size <= MAX_ROW_GROUP:
                    raise FormatError(f"{path}: row group {group} claims {size:,} bytes, over {MAX_ROW_GROUP:,}")
            names = file.schema_arrow.names
            columns = [name for name in names if name in _FIELDS]
            if not columns:
                raise FormatError(f"{path}: has no column that is read (columns: {_names(dict.fromkeys(names))})")
            for batch in file.iter_batches(batch_size=512, columns=columns):
                try:
                    rows = batch.to_pylist()
                except _BAD_CELL:
                    rows = None  # some cell of the batch: found by reading each
                for index in range(batch.num_rows):
                    number += 1
                    yield _Line(number, rows[index]) if rows is not None else _cells(batch, index, number)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{path}: row {number + 1}: is not a sound Parquet file ({reason})") from error


# What pyarrow raises for a cell that is no Python value: bytes that are no UTF-8, a time out of range, an unknown zone.
# ArrowInvalid is a ValueError.
_BAD_CELL = (ValueError, ArithmeticError, LookupError, NotImplementedError)


def _cells(batch: Any, index: int, number: int) -> _Line:
    """Row `index` of a record batch, cell by cell: the first that cannot be read is named."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            return _Line(number, None, f"{name}: is not UTF-8 (byte {error.start})")
        except _BAD_CELL as error:
            return _Line(number, None, f"{name}: cannot be read ({' '.join(str(error).split())[:100]})")
    return _Line(number, row)

"""Work that is kept as it is done, block by block, in a file of JSON lines: a run that was stopped goes on there.

The first line says what the rows were made from. Only whole blocks count: what a resumed run repeats, it repeats with
the same neighbours in the batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import read_bounded, write_atomic
from steelyard.base.progress import Progress

Row = dict[str, Any]
FILE_LIMIT = 1 << 30  # bytes


def keep(
    path: Path,
    header: Row,
    count: int,
    block: int,
    work: Callable[[int, int], Sequence[Row]],
    progress: Progress,
    unit: str,
) -> list[Row]:
    """`count` rows, made by `work(start, stop)` in blocks of `block` and kept in `path`, which is gone on with.

    Raises SteelyardError where `path` holds rows that were made from something else (another `header`), FormatError
    where it is damaged; and whatever `work` raises, with the blocks before it kept.
    """
    if path.exists():
        found, rows = read_kept(path)
        if found != header:
            differing = sorted(key for key in found.keys() | header.keys() if found.get(key) != header.get(key))
            raise SteelyardError(f"{path}: made with another {', '.join(differing)}: choose another folder")
        if len(rows) > count:
            raise FormatError(f"{path}: has {len(rows):,} rows where {count:,} are due: remove it")
        if len(rows) < count:
            rows = rows[: len(rows) // block * block]
            write_atomic(path, b"".join(map(_line, [header, *rows])))  # without a last part that was cut off
    else:
        rows = []
        write_atomic(path, _line(header))
    with progress.task(f"{path.parent.name}/{path.stem}", count, unit, done=len(rows)) as task:
        while len(rows) < count:
            made = list(work(len(rows), min(len(rows) + block, count)))
            with path.open("ab") as file:
                file.write(b"".join(map(_line, made)))
                file.flush()
                os.fsync(file.fileno())
            rows += made
            task.advance(len(made))
    return rows


def read_kept(path: Path) -> tuple[Row, list[Row]]:
    """(header, rows) of a kept file; a last line without its end was being written and is left out.

    Raises FormatError for anything that is no such file.
    """
    *lines, _ = read_bounded(path, FILE_LIMIT).split(b"\n")
    try:
        found = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a file of answers or scores: {error}") from error
    if not found or not all(isinstance(line, dict) for line in found):
        raise FormatError(f"{path}: not a file of answers or scores: remove it to measure again")
    return found[0], found[1:]


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"

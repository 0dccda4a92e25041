"""Rows out of files that other people wrote: CSV, JSON lines, JSON lists and Parquet, also gzipped; bounded."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steelyard.base.errors import FormatError, UsageError, require_extra
from steelyard.base.files import read_bounded

FILE_LIMIT = 256 << 20  # bytes of a file, unpacked
ROW_LIMIT = 2_000_000  # rows of a file, about 1 kB of memory each
COLUMN_LIMIT = 1_000  # a row of CSV holds every column of the header, however short its line
VALUE_LIMIT = 5_000_000  # values of a JSON file: an empty list takes two bytes there, and 60 in memory
MEMBER_LIMIT = 10_000  # files of an archive
_BATCH = 256  # rows of Parquet at a time
KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
csv.field_size_limit(1 << 24)

Row = dict[str, Any]


def read_text(path: Path, limit: int = FILE_LIMIT) -> str:
    """A UTF-8 text file, unpacked where its name ends in .gz; bounded. Raises FormatError."""
    data = _unpacked(path, limit) if path.name.endswith(".gz") else read_bounded(path, limit)
    return _decoded(data, str(path))


def _unpacked(path: Path, limit: int) -> bytes:
    data = read_bounded(path, limit)
    try:
        with gzip.open(io.BytesIO(data)) as file:
            data = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: cannot be unpacked: {error}") from error
    if len(data) > limit:
        raise FormatError(f"{path}: unpacks to over {limit:,} bytes")
    return data


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8 text (byte {error.start})") from error


def read_texts(path: Path, suffix: str) -> Iterator[tuple[str, str]]:
    """(file name, text) of the files whose name ends in `suffix`, by name: `path` itself, those below a folder, or the
    members of a .tar.gz. Raises FormatError for damage, UsageError where there is none."""
    if path.is_dir():
        found = [(file.name, read_text(file)) for file in sorted(path.rglob(f"*{suffix}")) if file.is_file()]
    elif path.name.endswith((".tar.gz", ".tgz")):
        found = sorted(_members(path, suffix))
    else:
        found = [(path.name, read_text(path))] if path.name.removesuffix(".gz").endswith(suffix) else []
    if not found:
        raise UsageError(f"{path}: holds no {suffix} file")
    yield from found


def _members(path: Path, suffix: str) -> Iterator[tuple[str, str]]:
    # Unpacked as a whole first: the reader of archives would follow headers and skip members of any size.
    packed = io.BytesIO(_unpacked(path, FILE_LIMIT))
    try:
        with tarfile.open(fileobj=packed, mode="r:") as archive:
            for number, member in enumerate(archive, 1):
                if number > MEMBER_LIMIT:
                    raise FormatError(f"{path}: holds over {MEMBER_LIMIT:,} files")
                if member.isreg() and not member.issparse() and member.name.endswith(suffix):
                    file = archive.extractfile(member)
                    assert file is not None, "a regular file"
                    yield Path(member.name).name, _decoded(file.read(), f"{path}: {member.name}")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise FormatError(f"{path}: is not a sound archive ({error})") from error


def read_rows(path: Path) -> list[Row]:
    """Every row of a file (see the module; CSV has a header line), or of the files of these kinds in a folder, by name.

    Raises FormatError naming file and line for what is no row, UsageError for a kind that is not read.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in KINDS)
        if not files:
            raise UsageError(f"{path}: holds no file of these kinds: {', '.join(KINDS)}")
        return [row for file in files for row in read_rows(file)]
    kind = _kind(path)
    if kind not in KINDS:
        raise UsageError(f"{path}: of these kinds files are read: {', '.join(KINDS)}, also .gz")
    if kind == ".parquet":
        return _parquet(path)
    text = read_text(path)
    if kind in (".csv", ".tsv"):
        return list(_csv(path, text, "\t" if kind == ".tsv" else ","))
    if kind == ".json":
        rows = load_json(text, str(path))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise FormatError(f"{path}: must be a list of objects, or JSON lines in a .jsonl file")
        return rows
    found: list[Row] = []
    if _values(text) > VALUE_LIMIT * 4:
        raise FormatError(f"{path}: over {VALUE_LIMIT * 4:,} values: split it")
    for number, line in enumerate(io.StringIO(text), 1):
        if line.strip():
            if len(found) == ROW_LIMIT:
                raise _too_many(path)
            row = load_json(line, f"{path}:{number}")
            if not isinstance(row, dict):
                raise FormatError(f"{path}:{number}: a row must be an object")
            found.append(row)
    return found


def _csv(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    try:
        reader = csv.DictReader(io.StringIO(text), strict=True, delimiter=delimiter)
        columns = reader.fieldnames or ()
        if len(columns) > COLUMN_LIMIT:
            raise FormatError(f"{path}: over {COLUMN_LIMIT:,} columns: is the first line its header?")
        twice = [name for name, count in Counter(columns).items() if name and count > 1]
        if twice:
            raise FormatError(f"{path}: the column {twice[0][:40]!r} occurs twice: which one is meant?")
        for number, row in enumerate(reader):
            if number == ROW_LIMIT:
                raise _too_many(path)
            yield row
    except csv.Error as error:
        raise FormatError(f"{path}: not CSV: {error}") from error


def _too_many(path: Path) -> FormatError:
    return FormatError(f"{path}: over {ROW_LIMIT:,} rows: split it")


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _values(text: str) -> int:
    """At least as many as JSON text has values."""
    return sum(map(text.count, ",[{"))


def load_json(text: str, where: str) -> Any:
    """A JSON value. Raises FormatError naming `where`, also for more than VALUE_LIMIT values."""
    if _values(text) > VALUE_LIMIT:
        raise FormatError(f"{where}: over {VALUE_LIMIT:,} values: split it")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON: {error}") from error


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise require_extra("pyarrow", "models") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            if sum(max(0, group.total_byte_size) for group in groups) > FILE_LIMIT:
                raise FormatError(f"{path}: claims over {FILE_LIMIT:,} bytes")
            # A repeated value is stored once, so rows may take far more than a group claims; but none takes more than
            # all of its group, and a batch thereby not more than FILE_LIMIT.
            rows, left = list[Row](), FILE_LIMIT
            largest = max((group.total_byte_size for group in groups), default=0)
            for batch in file.iter_batches(batch_size=max(1, min(_BATCH, FILE_LIMIT // max(1, largest)))):
                more = batch.to_pylist()
                left -= sum(len(str(value)) for row in more for value in row.values())
                if left < 0:
                    raise FormatError(f"{path}: unpacks to over {FILE_LIMIT:,} bytes")
                rows += more
                if len(rows) > ROW_LIMIT:
                    raise _too_many(path)
            return rows
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise FormatError(f"{path}: is not a sound Parquet file ({' '.join(str(error).split())[:200]})") from error


def field_of(row: Any, field: str, where: str) -> Any:
    """A field of a row; a dot goes into a field: `instances.0.input`. Raises FormatError naming `where`."""
    found, names = row, field.split(".") if field not in row else [field]
    for name in names:
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            raise FormatError(f"{where} has no field {field} (it has: {', '.join(map(str, row))})")
    return found

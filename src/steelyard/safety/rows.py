"""Rows out of files that other people wrote: CSV, JSON lines, JSON lists and Parquet, also gzipped; bounded."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steelyard.base.errors import FormatError, UsageError, require_extra
from steelyard.base.files import open_regular, read_bounded

FILE_LIMIT = 256 << 20  # bytes of a file, unpacked
KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
csv.field_size_limit(1 << 24)

Row = dict[str, Any]


def read_text(path: Path, limit: int = FILE_LIMIT) -> str:
    """A UTF-8 text file, unpacked where its name ends in .gz; bounded. Raises FormatError."""
    data = read_bounded(path, limit)
    if path.name.endswith(".gz"):
        try:
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(limit + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise FormatError(f"{path}: cannot be unpacked: {error}") from error
        if len(data) > limit:
            raise FormatError(f"{path}: unpacks to over {limit:,} bytes")
    return _decoded(data, str(path))


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
    left = FILE_LIMIT
    try:
        with open_regular(path) as raw, tarfile.open(fileobj=raw, mode="r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() and member.name.endswith(suffix) else None
                if file is not None:
                    data = file.read(left + 1)
                    left -= len(data)
                    if left < 0:
                        raise FormatError(f"{path}: unpacks to over {FILE_LIMIT:,} bytes")
                    yield Path(member.name).name, _decoded(data, f"{path}: {member.name}")
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
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
        try:
            return list(csv.DictReader(io.StringIO(text), strict=True, delimiter="\t" if kind == ".tsv" else ","))
        except csv.Error as error:
            raise FormatError(f"{path}: not CSV: {error}") from error
    if kind == ".json":
        rows = load_json(text, str(path))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise FormatError(f"{path}: must be a list of objects, or JSON lines in a .jsonl file")
        return rows
    found = []
    for number, line in enumerate(io.StringIO(text), 1):
        if line.strip():
            row = load_json(line, f"{path}:{number}")
            if not isinstance(row, dict):
                raise FormatError(f"{path}:{number}: a row must be an object")
            found.append(row)
    return found


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def load_json(text: str, where: str) -> Any:
    """A JSON value. Raises FormatError naming `where`."""
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
            if sum(group.total_byte_size for group in groups) > FILE_LIMIT:
                raise FormatError(f"{path}: claims over {FILE_LIMIT:,} bytes")
            rows: list[Row] = file.read().to_pylist()
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

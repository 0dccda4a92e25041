"""The texts of training data, streamed, whatever holds them: text files, JSON, JSON lines, Parquet, token shards.

Every text value of a row counts, whatever its key: what a model may have read is asked here, not how it was taught. At
most one file's text (64 MB), one row or one batch of rows is in memory.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from steelyard.base.canonical import digest, sha256_file
from steelyard.base.errors import FormatError, SteelyardError, UsageError, require_extra
from steelyard.base.files import open_regular, read_bounded
from steelyard.corpus.shards import MANIFEST, Shards, tokenizer_digest
from steelyard.corpus.text import MAX_FILE, SUFFIXES, file_texts

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
READ = (*SUFFIXES, *LINES, ".json", ".parquet")
MAX_LINE = 16 << 20  # bytes
MAX_ROW_GROUP = 2 << 30  # bytes of a Parquet row group once unpacked
_ROWS = 256  # of a Parquet batch


@dataclass(frozen=True)
class TrainingData:
    """A file, or a folder with what of it is read; `unread` are the other files' names. `digest` is over names and
    contents of the files read. `shards` where the folder holds token shards, with the tokenizer that reads them."""

    path: Path
    files: tuple[Path, ...]
    unread: tuple[str, ...]
    digest: str
    bytes: int
    shards: bool = False
    tokenizer: Path | None = None

    def texts(self) -> Iterator[str]:
        """Every text, in the order of the files' names. Raises FormatError naming file and line of what cannot be read,
        MissingDependencyError for Parquet without pyarrow and shards without tokenizers."""
        if self.shards:
            yield from _decoded(self.path, self.tokenizer)
            return
        for file in self.files:
            if file.suffix == ".parquet":
                yield from _parquet(file)
            elif file.name.endswith(LINES):
                yield from _lines(file)
            elif file.suffix == ".json":
                yield from _strings(_json(read_bounded(file, MAX_FILE), str(file)))
            else:
                yield from (text for _, text in file_texts(file))


def open_training_data(path: Path, tokenizer: Path | None = None) -> TrainingData:
    """What there is to read at `path`, hashed. `tokenizer`: the folder of the tokenizer of token shards.

    Raises UsageError where there is nothing that can be read, or shards lie there and `tokenizer` is not theirs.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    found = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    shards = path.is_dir() and (path / MANIFEST).is_file()
    if shards:
        manifest = Shards.open(path, verify=False).manifest
        if tokenizer is None or tokenizer_digest(tokenizer) != manifest.tokenizer:
            raise UsageError(f"{path}: holds token shards: give the folder of the tokenizer they were made with")
        names = {name for shard in manifest.shards for name in (shard.tokens_file, shard.ends_file)} | {MANIFEST}
        read = [file for file in found if file.parent == path and file.name in names]
    else:
        read = [file for file in found if file.name.endswith(READ)]
    if not read:
        raise UsageError(f"{path}: holds nothing that can be read (read are: {', '.join(READ)}, and token shards)")
    listed = [[file.relative_to(root).as_posix(), sha256_file(file)] for file in read]
    unread = tuple(file.relative_to(root).as_posix() for file in found if file not in set(read))
    size = sum(file.stat().st_size for file in read)
    return TrainingData(path, tuple(read), unread, digest(listed), size, shards, tokenizer if shards else None)


def _decoded(folder: Path, tokenizer: Path | None) -> Iterator[str]:
    from steelyard.model.tokenizer import Tokenizer

    assert tokenizer is not None, "open_training_data asks for it"
    shards, reader = Shards.open(folder), Tokenizer.load(tokenizer)
    for document, length in enumerate(shards.lengths):
        yield reader.decode(shards.tokens(document, 0, int(length)).tolist())


def _lines(path: Path) -> Iterator[str]:
    try:
        with open_regular(path) as raw:
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise FormatError(f"{path}:{number}: is over {MAX_LINE:,} bytes")
                if line.strip():
                    yield from _strings(_json(line, f"{path}:{number}"))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: is not a sound gzip file ({error})") from error
    except OSError as error:
        raise SteelyardError(f"{path}: {error.strerror or error}") from error


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON ({' '.join(str(error).split())[:100]})") from error


def _strings(value: Any) -> Iterator[str]:
    """Every text value within a JSON value, in order."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting.extend(reversed(one.values()))
        elif isinstance(one, list):
            waiting.extend(reversed(one))


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise require_extra("pyarrow", "models") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).total_byte_size
                if not 0 <= size <= MAX_ROW_GROUP:
                    raise FormatError(f"{path}: row group {group} claims {size:,} bytes, over {MAX_ROW_GROUP:,}")
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    yield from _strings(row)
    except (pyarrow.ArrowException, ValueError, ArithmeticError, LookupError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{path}: is not a sound Parquet file ({reason})") from error

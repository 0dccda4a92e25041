"""Tokenised documents on disk: raw little-endian token files with document ends, named by a manifest of digests.

    manifest.json      what is there: dtype, tokenizer, counts, and of each file its SHA-256
    tokens-00000.bin   uint16 or uint32, documents one after another, each with its end token
    ends-00000.bin     uint64, where each document of tokens-00000.bin ends, in tokens

Files are written aside and renamed; the manifest comes last, so a folder with a manifest is whole. An interrupted
write goes on where it was. Reading maps the files; nothing in them is believed before it is checked.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from steelyard.base.canonical import digest, sha256_file, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import inside, open_regular, read_bounded, write_atomic
from steelyard.base.progress import Progress, Silent

if TYPE_CHECKING:
    from steelyard.model.tokenizer import Tokenizer

MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 25
MAX_MANIFEST = 16 << 20  # bytes: room for some 50,000 shards
_MAX_VOCABULARY = 1 << 31
_BATCH = 64  # documents tokenised at a time

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class Shard(BaseModel):
    """One pair of files. `text` is the SHA-256 chained over the texts of all documents up to its end."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tokens: _Count
    documents: _Count
    bytes: _Count
    tokens_file: str
    tokens_sha256: Sha256
    ends_file: str
    ends_sha256: Sha256
    text: Sha256


class Manifest(BaseModel):
    """What a folder of shards holds. `bytes` are those of the documents as UTF-8; `tokenizer` is a SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["steelyard-shards-1"]
    dtype: Literal["uint16", "uint32"]
    tokenizer: Sha256
    vocab_size: Annotated[int, Field(ge=1, le=_MAX_VOCABULARY)]
    tokens: _Count
    documents: _Count
    bytes: _Count
    shards: Annotated[tuple[Shard, ...], Field(strict=False)]


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of the tokenizer.json of a model's or tokenizer's folder: what shards are made with."""
    return sha256_file(folder / "tokenizer.json")


def write_shards(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    out: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> Manifest:
    """Tokenise `documents` into `out`, each between the beginning-of-sequence token (where the tokenizer adds one) and
    the end-of-sequence token. Special tokens written in a text are its characters.

    Called again after an interruption with the same documents, it goes on behind the last whole shard. Raises
    SteelyardError where `out` is finished already, or was begun with other documents or another tokenizer, and where
    there is no document; UsageError for a tokenizer without an end token.
    """
    end = tokenizer.named_ids().get("eos_token")
    if end is None:
        raise UsageError(f"{tokenizer.folder}: the tokenizer names no eos_token to put behind each document")
    if (out / MANIFEST).exists():
        raise SteelyardError(f"{out} holds finished shards: remove it or choose another place")
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    made_with = tokenizer_digest(tokenizer.folder)
    out.mkdir(parents=True, exist_ok=True)
    progress = progress or Silent()
    texts = iter(documents)
    shards, chain = _go_on(texts, out, made_with, progress)
    while True:
        shard, chain = _write_shard(
            texts, tokenizer, out, len(shards), dtype, begin, end, chain, shard_tokens, made_with, progress
        )
        if shard is None:
            break
        shards.append(shard)
    if not shards:
        raise SteelyardError(f"{out}: there is no document to tokenise")
    manifest = Manifest(
        format="steelyard-shards-1",
        dtype=dtype,
        tokenizer=made_with,
        vocab_size=tokenizer.vocab_size,
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=tuple(shards),
    )
    write_atomic(out / MANIFEST, (json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n").encode())
    for note in out.glob("part-*.json"):
        note.unlink()
    return manifest


class _Part(BaseModel):
    """The note beside a whole shard of an unfinished folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tokenizer: Sha256
    shard: Shard


def _go_on(texts: Iterator[str], out: Path, made_with: str, progress: Progress) -> tuple[list[Shard], str]:
    """The whole shards of an interrupted write; their documents are taken off `texts`, and checked to be the same."""
    shards: list[Shard] = []
    chain = sha256_hex(b"")
    for number in itertools.count():
        note = out / f"part-{number:05d}.json"
        if not note.exists():
            break
        part = _parsed(_Part, note)
        if part.tokenizer != made_with:
            raise SteelyardError(f"{out}: begun with another tokenizer: remove it")
        for text in itertools.islice(texts, part.shard.documents):
            chain = _chained(chain, text)
        if chain != part.shard.text:
            raise SteelyardError(f"{out}: begun with other documents (shard {number} differs): remove it")
        shards.append(part.shard)
    if shards:
        progress.say(f"{out}: going on behind shard {len(shards) - 1}")
    return shards, chain


def _chained(chain: str, text: str) -> str:
    return hashlib.sha256(bytes.fromhex(chain) + hashlib.sha256(text.encode()).digest()).hexdigest()


def _write_shard(
    texts: Iterator[str],
    tokenizer: Tokenizer,
    out: Path,
    number: int,
    dtype: str,
    begin: list[int],
    end: int,
    chain: str,
    shard_tokens: int,
    made_with: str,
    progress: Progress,
) -> tuple[Shard | None, str]:
    parts: list[npt.NDArray[np.uint32]] = []
    ends: list[int] = []
    tokens = size = 0
    with progress.task(f"tokenise, shard {number}", shard_tokens, "tokens") as task:
        while tokens < shard_tokens:
            taken = list(itertools.islice(texts, _BATCH))
            if not taken:
                break
            before = tokens
            for text, ids in zip(taken, tokenizer.encode_batch(taken), strict=True):
                parts.append(np.array([*begin, *ids, end], dtype=np.uint32))
                tokens += len(parts[-1])
                ends.append(tokens)
                size += len(text.encode())
                chain = _chained(chain, text)
            task.advance(tokens - before)
    if not ends:
        return None, chain
    flat = np.concatenate(parts)
    if int(flat.max()) > np.iinfo(dtype).max:
        raise FormatError(f"{tokenizer.folder}: token {int(flat.max())} does not fit {dtype}")
    files = {f"tokens-{number:05d}.bin": flat.astype(f"<u{np.dtype(dtype).itemsize}").tobytes()}
    files[f"ends-{number:05d}.bin"] = np.array(ends, dtype="<u8").tobytes()
    for name, data in files.items():
        write_atomic(out / name, data)
    (tokens_file, tokens_data), (ends_file, ends_data) = files.items()
    shard = Shard(
        tokens=tokens,
        documents=len(ends),
        bytes=size,
        tokens_file=tokens_file,
        tokens_sha256=sha256_hex(tokens_data),
        ends_file=ends_file,
        ends_sha256=sha256_hex(ends_data),
        text=chain,
    )
    note = _Part(tokenizer=made_with, shard=shard)
    write_atomic(out / f"part-{number:05d}.json", note.model_dump_json().encode())
    return shard, chain


# -- reading ---------------------------------------------------------------------------------------------------------


M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class _Mapped:
    tokens: npt.NDArray[np.unsignedinteger]
    ends: npt.NDArray[np.uint64]


class Shards:
    """A folder of shards, mapped: `packing.Samples` and `packing.Stream`. Open one with `Shards.open`."""

    def __init__(self, folder: Path, manifest: Manifest, mapped: list[_Mapped]) -> None:
        self.folder, self.manifest, self._mapped = folder, manifest, mapped
        ends = [piece.ends.astype(np.int64) for piece in mapped]
        shard_sizes = np.array([len(piece.tokens) for piece in mapped], dtype=np.int64)
        self._offsets = np.cumsum(shard_sizes) - shard_sizes  # where each shard begins in the stream
        self.ends = np.concatenate([part + offset for part, offset in zip(ends, self._offsets, strict=True)])
        self._starts = np.concatenate([[0], self.ends[:-1]])
        self.lengths: npt.NDArray[np.int64] = self.ends - self._starts
        self.digest = digest(manifest.model_dump(mode="json"))

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True, progress: Progress | None = None) -> Shards:
        """Map the shards of `folder`.

        `verify` reads every file against its SHA-256, and every token against the vocabulary; without it only sizes
        and document ends are checked. Raises FormatError for whatever is missing, damaged or contradicts itself.
        """
        if not (folder / MANIFEST).is_file():
            unfinished = "is unfinished: make it again to go on" if list(folder.glob("part-*.json")) else "has none"
            raise FormatError(f"{folder / MANIFEST}: is missing: the folder {unfinished}")
        manifest = _parsed(Manifest, folder / MANIFEST)
        _check_sums(folder, manifest)
        mapped = []
        progress = progress or Silent()
        with progress.task(f"open {folder.name}", manifest.tokens, "tokens") as task:
            for shard in manifest.shards:
                mapped.append(_mapped(folder, manifest, shard, verify))
                task.advance(shard.tokens)
        return cls(folder, manifest, mapped)

    def __len__(self) -> int:
        return self.manifest.tokens

    def tokens(self, sample: int, start: int, end: int) -> npt.NDArray[np.int64]:
        """Tokens `start` to `end` of document `sample`."""
        if not 0 <= start <= end <= self.lengths[sample]:
            raise IndexError(f"document {sample} has {self.lengths[sample]} tokens, not {start} to {end}")
        first = int(self._starts[sample])
        return self.stream(first + start, first + end)

    def taught(self, sample: int, start: int, end: int) -> None:
        """None: every token is to be predicted."""

    def stream(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Tokens `start` to `end` of all documents in a row."""
        if not 0 <= start <= end <= len(self):
            raise IndexError(f"{self.folder} has {len(self):,} tokens, not {start} to {end}")
        found: list[npt.NDArray[np.int64]] = []
        shard = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while start < end:
            offset, data = int(self._offsets[shard]), self._mapped[shard].tokens
            stop = min(end, offset + len(data))
            found.append(data[start - offset : stop - offset].astype(np.int64))
            start, shard = stop, shard + 1
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _parsed(model: type[M], path: Path) -> M:
    try:
        return model.model_validate_json(read_bounded(path, MAX_MANIFEST))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise FormatError(f"{path}: {where}: {first['msg']}: make the shards again") from error


def _check_sums(folder: Path, manifest: Manifest) -> None:
    where = folder / MANIFEST
    for name in ("tokens", "documents", "bytes"):
        total = sum(getattr(shard, name) for shard in manifest.shards)
        if getattr(manifest, name) != total:
            raise FormatError(f"{where}: {name} is {getattr(manifest, name):,}, its shards have {total:,}")
    if not manifest.documents:
        raise FormatError(f"{where}: holds no document")
    names = [name for shard in manifest.shards for name in (shard.tokens_file, shard.ends_file)]
    if len(set(names)) != len(names):
        raise FormatError(f"{where}: names a file twice")
    if manifest.dtype == "uint16" and manifest.vocab_size > 1 << 16:
        raise FormatError(f"{where}: vocab_size {manifest.vocab_size:,} does not fit uint16")


def _mapped(folder: Path, manifest: Manifest, shard: Shard, verify: bool) -> _Mapped:
    width = np.dtype(manifest.dtype).itemsize
    tokens = _map(inside(folder, shard.tokens_file), f"<u{width}", shard.tokens)
    ends = _map(inside(folder, shard.ends_file), "<u8", shard.documents)
    if not shard.documents or int(ends[-1]) != shard.tokens or int(ends[0]) < 1 or not (ends[1:] > ends[:-1]).all():
        raise FormatError(f"{folder / shard.ends_file}: document ends must rise to the {shard.tokens:,} tokens")
    if verify:
        for name, expected in (
            (shard.tokens_file, shard.tokens_sha256),
            (shard.ends_file, shard.ends_sha256),
        ):
            if sha256_file(folder / name) != expected:
                raise FormatError(f"{folder / name}: has changed since it was written: make the shards again")
        step = 1 << 24
        highest = max(int(tokens[at : at + step].max()) for at in range(0, len(tokens), step))
        if highest >= manifest.vocab_size:
            raise FormatError(
                f"{folder / shard.tokens_file}: holds token {highest}, vocab_size is {manifest.vocab_size}"
            )
    return _Mapped(tokens, ends)


def _map(path: Path, dtype: str, count: int) -> npt.NDArray[np.unsignedinteger]:
    expected = count * np.dtype(dtype).itemsize
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            if size != expected:
                raise FormatError(f"{path}: has {size:,} bytes, the manifest says {expected:,}: make the shards again")
            return np.memmap(file, dtype=dtype, mode="r", shape=(count,))
    except OSError as error:
        raise FormatError(f"{path}: is missing or cannot be read ({error.strerror}): make the shards again") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise FormatError(f"{path}: holds nothing") from error

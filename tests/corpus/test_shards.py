"""Shards: what goes in comes out, an interrupted write goes on, and a lying folder is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steelyard.base.canonical import sha256_file
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.corpus import shards as module
from steelyard.corpus.shards import MANIFEST, Shards, write_shards

pytest.importorskip("tokenizers")
from steelyard.model.tokenizer import Tokenizer
from steelyard.train.tokenizer import BOS, EOS, train_tokenizer

TEXTS = [f"Document {number} says: the cat sat on the mat, {number * 7} times. <|im_end|>" for number in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("t") / "tokenizer"
    train_tokenizer(TEXTS, folder, vocab_size=320, max_length=64)
    return Tokenizer.load(folder)


@pytest.fixture
def made(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    write_shards(TEXTS, tokenizer, tmp_path / "s", shard_tokens=2000)
    return tmp_path / "s"


def test_documents_come_back(made: Path, tokenizer: Tokenizer) -> None:
    found = Shards.open(made)
    assert len(found.manifest.shards) > 2
    assert sorted(path.name for path in made.iterdir() if path.suffix == ".json") == [MANIFEST]
    begin, end = tokenizer.special_ids[BOS], tokenizer.special_ids[EOS]
    for number, text in enumerate(TEXTS):
        tokens = found.tokens(number, 0, int(found.lengths[number])).tolist()
        assert tokens == [begin, *tokenizer.encode(text, bos=False), end]  # what looks like a special token is none
    assert tokens.count(tokenizer.special_ids["<|im_end|>"]) == 0
    assert found.manifest.bytes == sum(len(text.encode()) for text in TEXTS)
    whole = found.stream(0, len(found))
    assert (found.stream(1990, 4321) == whole[1990:4321]).all()  # over shards' ends
    assert found.tokens(5, 2, 4).tolist() == whole[found.ends[4] + 2 : found.ends[4] + 4].tolist()
    for wrong in ((-1, 2), (2, len(found) + 1), (3, 2)):
        with pytest.raises(IndexError):
            found.stream(*wrong)
    with pytest.raises(IndexError):
        found.tokens(0, 0, 10_000)


def test_an_interrupted_write_goes_on(made: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def cut_off(after: int) -> Iterator[str]:
        for number, text in enumerate(TEXTS):
            if number == after:
                raise KeyboardInterrupt
            yield text

    out = tmp_path / "again"
    for after in (0, 100, 200):
        with pytest.raises(KeyboardInterrupt):
            write_shards(cut_off(after), tokenizer, out, shard_tokens=2000)
        with pytest.raises(FormatError, match=r"manifest\.json: is missing"):
            Shards.open(out)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("tokens-*")}
    assert kept
    write_shards(TEXTS, tokenizer, out, shard_tokens=2000)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert {p.name: sha256_file(p) for p in out.iterdir()} == {p.name: sha256_file(p) for p in made.iterdir()}
    with pytest.raises(SteelyardError, match="holds finished shards"):
        write_shards(TEXTS, tokenizer, out)


def test_a_write_begun_with_something_else_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def cut_off(texts: list[str]) -> Iterator[str]:
        yield from texts
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(cut_off(TEXTS[:200]), tokenizer, tmp_path / "s", shard_tokens=2000)
    with pytest.raises(SteelyardError, match=r"begun with other documents \(shard 0 differs\)"):
        write_shards(["other", *TEXTS[1:]], tokenizer, tmp_path / "s")
    train_tokenizer(TEXTS[:9], tmp_path / "other", vocab_size=270, max_length=64)
    with pytest.raises(SteelyardError, match="begun with another tokenizer"):
        write_shards(TEXTS, Tokenizer.load(tmp_path / "other"), tmp_path / "s")
    with pytest.raises(SteelyardError, match="no document"):
        write_shards([], tokenizer, tmp_path / "none")


def test_a_large_vocabulary_takes_four_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Wide(Tokenizer):
        vocab_size = 70_000

    wide = Wide(tokenizer.folder, tokenizer._serialized, bos_id=None, eos_ids=frozenset(), adds_bos=False)
    assert write_shards(TEXTS, wide, tmp_path / "s").dtype == "uint32"
    assert len(Shards.open(tmp_path / "s")) * 4 == (tmp_path / "s" / "tokens-00000.bin").stat().st_size


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return apply


def _bytes(name: str, change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        change(data)
        (folder / name).write_bytes(data)

    return apply


def _rising(data: bytearray) -> None:
    data[:8] = np.uint64(0).tobytes()


LIES = [
    (_manifest(lambda m: m.update(tokens=m["tokens"] + 1)), r"tokens is .*, its shards have"),
    (_manifest(lambda m: m["shards"][0].update(tokens=2**52)), r"tokens is"),
    (_manifest(lambda m: (m["shards"][0].update(tokens=2**52), m.update(tokens=2**52 + sum(
        s["tokens"] for s in m["shards"][1:])))), r"tokens-00000\.bin: has [\d,]+ bytes, the manifest says 9,007"),
    (_manifest(lambda m: m["shards"][0].update(tokens=-1)), r"shards\.0\.tokens: Input should be greater"),
    (_manifest(lambda m: m["shards"][0].update(tokens_file="../tokens-00000.bin")), r"must be relative"),
    (_manifest(lambda m: m["shards"][0].update(tokens_file="/etc/passwd")), r"must be relative"),
    (_manifest(lambda m: m["shards"][1].update(tokens_file="tokens-00000.bin")), r"names a file twice"),
    (_manifest(lambda m: m.update(dtype="float32")), r"dtype: Input should be 'uint16' or 'uint32'"),
    (_manifest(lambda m: m.update(dtype="uint32")), r"tokens-00000\.bin: has [\d,]+ bytes, the manifest says"),
    (_manifest(lambda m: m.update(vocab_size=100)), r"tokens-00000\.bin: holds token \d+, vocab_size is 100"),
    (_manifest(lambda m: m.update(vocab_size=100_000)), r"vocab_size 100,000 does not fit uint16"),
    (_manifest(lambda m: m.update(extra=1)), r"extra: Extra inputs are not permitted"),
    (_manifest(lambda m: m.pop("shards")), r"shards: Field required"),
    (_manifest(lambda m: m.update(shards=[], tokens=0, documents=0, bytes=0)), r"holds no document"),
    (_bytes("tokens-00001.bin", lambda d: d.__setitem__(7, d[7] ^ 1)), r"tokens-00001\.bin: has changed since"),
    (_bytes("tokens-00001.bin", lambda d: d.pop()), r"tokens-00001\.bin: has [\d,]+ bytes"),
    (_bytes("ends-00000.bin", _rising), r"ends-00000\.bin: document ends must rise"),
    (_bytes("ends-00000.bin", lambda d: d.extend(b"\0" * 8)), r"ends-00000\.bin: has [\d,]+ bytes"),
    (lambda folder: (folder / "tokens-00001.bin").unlink(), r"tokens-00001\.bin: is missing or cannot be read"),
    (lambda folder: (folder / MANIFEST).unlink(), r"manifest\.json: is missing: the folder has none"),
    (lambda folder: (folder / MANIFEST).write_text("{"), r"manifest\.json: the file: Invalid JSON"),
    (_bytes("tokens-00000.bin", lambda d: d.__setitem__(slice(0, 2), b"\xff\xff")), r"has changed since"),
]  # fmt: skip


@pytest.mark.parametrize(("lie", "reason"), LIES)
def test_a_folder_that_lies_is_refused(made: Path, lie: Callable[[Path], Any], reason: str) -> None:
    lie(made)
    with pytest.raises(FormatError, match=reason):
        Shards.open(made, progress=Silent())


def test_links_are_not_followed(made: Path, tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere.bin"
    (made / "tokens-00000.bin").rename(secret)
    (made / "tokens-00000.bin").symlink_to(secret)
    with pytest.raises(FormatError, match="link"):
        Shards.open(made)


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer.folder / "tokenizer.json").read_bytes())
    with pytest.raises(UsageError, match="names no eos_token"):
        write_shards(TEXTS, Tokenizer.load(tmp_path), tmp_path / "s")


def test_shards_can_be_opened_without_reading_them(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sha256_file", lambda path: pytest.fail(f"{path} was read"))
    found = Shards.open(made, verify=False)
    assert len(found.stream(0, len(found))) == found.manifest.tokens

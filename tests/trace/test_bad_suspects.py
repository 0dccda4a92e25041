"""Suspects that lie, are broken, or attack: each is answered with its reason, in bounded time and memory.

A row makes a suspect in an empty folder; `trace_all` must call it unreadable, for the reason that the row names, or
refuse the tree with that reason. The same files through the command line give exit code 1 and no sighting.
"""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from suspects_made import (
    SMALL,
    array,
    gguf_bytes,
    number,
    put,
    references,
    safetensors_bytes,
    string,
    tensor,
    weights,
    write,
    write_gguf,
)

from steelyard.base.errors import FormatError
from steelyard.trace.lineage import UNREADABLE, UNRELATED
from steelyard.trace.registry import Reference
from steelyard.trace.suspects import trace_all

SECONDS, MEMORY = 10.0, 200 << 20  # of processor time and of Python's heap: a real suspect takes a tenth of it
F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
Made = Callable[[Path], Path]


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    return references(tmp_path_factory.mktemp("registry"), {"ours": ("release", weights(0))})


def tensors(header: Any, data: bytes = b"", **lies: Any) -> Made:
    return lambda folder: put(folder / "model.safetensors", safetensors_bytes(header, data, **lies))


def gguf(*given: Any, **lies: Any) -> Made:
    return lambda folder: put(folder / "model.gguf", gguf_bytes(*given, **lies))


def bytes_of(name: str, data: bytes) -> Made:
    return lambda folder: put(folder / name, data)


def stored_zip(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return made.getvalue()


def torrent(info: bytes) -> Made:
    return bytes_of("model.torrent", b"d4:info" + info + b"e")


def with_value(value: float) -> Made:
    def made(folder: Path) -> Path:
        held = weights(1)
        held["model.layers.2.mlp.up_proj.weight"][3, 4] = value
        return write(folder / "model", held)

    return made


def shaped(name: str, shape: tuple[int, ...]) -> Made:
    def made(folder: Path) -> Path:
        held = weights(1)
        held[name] = held[name].reshape(-1)[: int(np.prod(shape))].reshape(shape)
        return write(folder / "model", held)

    return made


def transposed(folder: Path) -> Path:
    return write(folder / "model", {name: one.T if "_proj" in name else one for name, one in weights(1).items()})


def changed_gguf(change: Callable[[bytes], bytes]) -> Made:
    def made(folder: Path) -> Path:
        path = write_gguf(folder / "model.gguf", config=SMALL, weights=weights(1))
        return put(path, change(path.read_bytes()))

    return made


def cut(folder: Path) -> Path:
    path = write(folder / "model", weights(1)) / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    return path


def index_to(value: Any) -> Made:
    def made(folder: Path) -> Path:
        write(folder / "model", weights(1))
        (folder / "model" / "model.safetensors").rename(folder / "model" / "a.safetensors")
        put(folder / "model" / "model.safetensors.index.json", json.dumps({"weight_map": value}).encode())
        return folder / "model"

    return made


def link_round(folder: Path) -> Path:
    (folder / "model.safetensors").symlink_to(folder / "other.safetensors")
    (folder / "other.safetensors").symlink_to(folder / "model.safetensors")
    return folder / "model.safetensors"


def link_nowhere(folder: Path) -> Path:
    (folder / "model.gguf").symlink_to(folder / "gone.gguf")
    return folder / "model.gguf"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors")
    return folder / "model.safetensors"


def deep(folder: Path) -> Path:
    inner = folder / "tree"
    for _ in range(70):
        inner = inner / "d"
    inner.mkdir(parents=True)
    return folder / "tree"


def empty_tree(folder: Path) -> Path:
    (folder / "tree" / "a" / "b").mkdir(parents=True)
    put(folder / "tree" / "a" / "readme.md", b"nothing")
    return folder / "tree"


def not_a_model(folder: Path) -> Path:
    return write(folder / "model.safetensors", {"a": np.ones((96, 7)), "b": np.ones((7, 96))})


HUGE = 1 << 62
ROWS: dict[str, tuple[Made, str]] = {
    # headers that lie
    "no byte": (bytes_of("model.safetensors", b""), "short"),
    "a header of 2^63 bytes": (tensors({}, length=1 << 63), "header"),
    "a header longer than the file": (tensors({"a": F32}, length=5_000), "header"),
    "no JSON": (tensors("{nonsense"), "JSON"),
    "a list for a header": (tensors("[]"), "header"),
    "nested 100,000 deep": (tensors("[" * 100_000), "header"),
    "one name twice": (tensors('{"a": %s, "a": %s}' % ((json.dumps(F32),) * 2), bytes(16)), "twice"),
    "a tensor past the end": (tensors({"a": F32 | {"data_offsets": [0, 4096], "shape": [32, 32]}}, bytes(16)), "a"),
    "negative offsets": (tensors({"a": F32 | {"data_offsets": [-16, 0]}}, bytes(16)), "offsets"),
    "overlapping tensors": (tensors({"a": F32, "b": F32}, bytes(16)), "b"),
    "a hole between tensors": (tensors({"a": F32, "b": F32 | {"data_offsets": [24, 40]}}, bytes(40)), "b"),
    "a shape of 2^62": (tensors({"a": F32 | {"shape": [HUGE, HUGE]}}, bytes(16)), "a"),
    "a shape that the bytes do not have": (tensors({"a": F32 | {"shape": [3, 3]}}, bytes(16)), "a"),
    "an unknown type": (tensors({"a": F32 | {"dtype": "F33"}}, bytes(16)), "F33"),
    "a name that is no text": (tensors(b'{"\xff\xfe": {}}'), "JSON"),
    "a file cut by a byte": (cut, "model.safetensors"),
    "a million tiny tensors": (
        tensors({f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(1_000_000)},
                bytes(1_000_000)), "",
    ),
    # GGUF
    "GGUF: magic alone": (bytes_of("model.gguf", b"GGUF"), "cut short"),
    "GGUF: big-endian": (gguf(order=">"), "endian"),
    "GGUF: version 1": (gguf(version=1), "version"),
    "GGUF: 2^60 tensors": (gguf(counts=(1 << 60, 0)), "tensors"),
    "GGUF: 2^60 keys": (gguf(counts=(0, 1 << 60)), "key"),
    "GGUF: a text of 2^40 bytes": (gguf([struct.pack("<Q", 1 << 40)], counts=(0, 1)), "claims 1,099,511,627,776"),
    "GGUF: an array of 2^40 numbers": (gguf([array("a", 4, 1 << 40, b"")], counts=(0, 1)), "claims 1,099,511,627,776"),
    "GGUF: arrays of arrays": (gguf([array("a", 9, 1, struct.pack("<IQ", 9, 1) * 50)]), "array"),
    "GGUF: a key twice": (gguf([number("a", 1), number("a", 2)]), "twice"),
    "GGUF: an unknown type": (gguf([], [tensor("a", (32,), kind=999)], bytes(64)), "999"),
    "GGUF: a tensor past the end": (gguf([], [tensor("a", (32, 32), offset=1 << 50)], bytes(64)), "a"),
    "GGUF: five dimensions": (gguf([], [tensor("a", (2, 2, 2, 2, 2))], bytes(128)), "dimension"),
    "GGUF: part of a split file": (gguf([number("split.count", 3)], [tensor("a", (4,))], bytes(32)), "part"),
    "GGUF: no tensor": (gguf([string("general.architecture", "llama")]), "no tensor"),
    "GGUF: the tail missing": (changed_gguf(lambda data: data[:-100]), "model.gguf"),
    # weights with which nothing can be compared
    "a norm that is a number": (shaped("model.layers.1.input_layernorm.weight", ()), "a vector belongs"),
    "a norm that is a matrix": (shaped("model.layers.1.post_attention_layernorm.weight", (8, 8)), "a vector belongs"),
    "gates that lie": (transposed, "gate and up rows"),
    "NaN": (with_value(float("nan")), "not finite"),
    "infinity": (with_value(float("inf")), "not finite"),
    "no model at all": (not_a_model, ""),
    # checkpoints that would have to be run
    "a bare pickle": (bytes_of("pytorch_model.bin", b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR."), "without running"),
    "a zip bomb": (
        bytes_of("pytorch_model.bin", stored_zip(("m/data/0", bytes(50 << 20)), method=zipfile.ZIP_DEFLATED)),
        "compressed",
    ),
    "a zip without storages": (bytes_of("model.pt", stored_zip(("m/data.pkl", b"x"))), "storages"),
    "a zip cut short": (bytes_of("model.pt", stored_zip(("m/data/0", bytes(64)))[:-30]), "zip"),
    # what names copies elsewhere
    "a torrent nested 10,000 deep": (torrent(b"l" * 10_000), "nested"),
    "a torrent's endless text": (torrent(b"d4:name999999999:xe"), "broken string"),
    "a torrent's key twice": (torrent(b"d4:name1:a4:name1:be"), "twice"),
    "a torrent of negative length": (torrent(b"d6:lengthi-5e4:name1:a12:piece lengthi16384e6:pieces0:e"), "neither"),
    "pieces that are no digests": (torrent(b"d6:lengthi5e4:name1:a12:piece lengthi16384e6:pieces3:abce"), "20 bytes"),
    "pieces of one byte": (torrent(b"d6:lengthi5e4:name1:a12:piece lengthi1e6:pieces0:e"), "piece length"),
    "a listing that is a number": (bytes_of("listing.json", b'{"siblings": 7}'), "siblings"),
    "a listing nested 100,000 deep": (bytes_of("listing.json", b"[" * 100_000), ""),
    "a listing of nameless files": (bytes_of("listing.json", b'{"siblings": [{"size": 3}]}'), "without a name"),
    # folders, links and devices
    "a link round in a circle": (link_round, "cannot be opened"),
    "a link to nowhere": (link_nowhere, "cannot be opened"),
    "a pipe that never ends": (pipe, "not a plain file"),
    "folders 70 deep": (deep, "deeper"),
    "a tree without a model": (empty_tree, "nothing to compare"),
    "an index out of its folder": (index_to({"a": "../../../etc/passwd"}), "not there"),
    "an index of numbers": (index_to({"a": 7}), "weight_map"),
}  # fmt: skip


def answered(path: Path, registered: list[Reference]) -> tuple[str, str]:
    """(verdict, reason), the refusal of a whole tree being the verdict of all in it."""
    try:
        (answer,) = trace_all(path, registered)
    except FormatError as error:
        return UNREADABLE, str(error)
    return answer.verdict, answer.reason


@pytest.mark.parametrize("name", ROWS)
def test_it_is_answered_with_its_reason(name: str, tmp_path: Path, registered: list[Reference]) -> None:
    made, says = ROWS[name]
    path = made(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    tracemalloc.start()
    start = time.process_time()
    verdict, reason = answered(path, registered)
    spent, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert verdict == (UNRELATED if name == "no model at all" else UNREADABLE), reason
    assert says in reason
    assert "\n" not in reason
    assert str(path) in reason or verdict == UNRELATED
    assert spent < SECONDS
    assert peak < MEMORY
    assert sorted(tmp_path.rglob("*")) == before


def test_there_are_forty() -> None:
    assert len(ROWS) >= 40


def test_a_hundred_thousand_files_are_looked_through_once(tmp_path: Path, registered: list[Reference]) -> None:
    """Only headers of what could be a model are read: one model among 100,000 other files is found."""
    tree = tmp_path / "tree"
    for folder in range(100):
        (tree / str(folder)).mkdir(parents=True)
        for file in range(1_000):
            os.close(os.open(tree / str(folder) / f"{file}.txt", os.O_CREAT | os.O_WRONLY))
    write(tree / "57" / "model", weights(0))
    (answer,) = trace_all(tree, registered)
    assert answer.verdict == "exact copy"


def test_a_file_nobody_may_read(tmp_path: Path, registered: list[Reference]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = write(tmp_path / "model.safetensors", weights(0))
    path.chmod(0)
    verdict, reason = answered(path, registered)
    assert verdict == UNREADABLE
    assert "Permission denied" in reason


def test_a_terabyte_of_zeros_is_sampled(tmp_path: Path, registered: list[Reference]) -> None:
    """A sparse file that claims to be huge costs its samples, not its size."""
    rows = 1 << 33
    header = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [rows, 32], "data_offsets": [0, rows * 128]}}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header))
    os.truncate(path, path.stat().st_size + rows * 128)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdict, _ = answered(path, registered)
    assert verdict in (UNRELATED, UNREADABLE)
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY >> 10

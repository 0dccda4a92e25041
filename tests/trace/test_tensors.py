"""Reading a suspect: the right rows, no other bytes, and hostile files refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from suspects_made import put, safetensors_bytes, weights, write, write_gguf

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.trace.tensors import decode, in_memory, open_tensors

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(("dtype", "size"), [("F32", 4), ("BF16", 2), ("F16", 2)])
def test_rows_are_read_alone_and_counted(tmp_path: Path, dtype: str, size: int) -> None:
    ours = weights()
    suspect = open_tensors(write(tmp_path / "a.safetensors", ours, dtype))
    rows = np.array([5, 3, 3, 90])
    np.testing.assert_allclose(suspect.read(GATE, rows), ours[GATE][rows], rtol=1e-3 if dtype == "F16" else 0)
    assert suspect.bytes_read == 3 * 64 * size  # row 3 once
    assert suspect.read(GATE, slice(10, 12)).shape == (2, 64)
    assert suspect.bytes_read == 5 * 64 * size
    np.testing.assert_array_equal(
        suspect.read("model.norm.weight", np.array([1])), suspect.read("model.norm.weight")[1:2]
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_rows_of_a_quantised_gguf_are_read_alone(tmp_path: Path, kind: str) -> None:
    suspect = open_tensors(write_gguf(tmp_path / "a.gguf", kind=kind))
    rows = suspect.read("blk.1.ffn_gate.weight", np.array([7, 2]))
    block = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    assert suspect.bytes_read == 2 * 2 * block
    np.testing.assert_array_equal(rows, suspect.read("blk.1.ffn_gate.weight")[[7, 2]])


def test_shards_are_one_model_and_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    ours = weights()
    half = dict(list(ours.items())[:10])
    rest = {name: value for name, value in ours.items() if name not in half}
    write(tmp_path / "first.safetensors", half)
    write(tmp_path / "second.safetensors", rest)
    assert open_tensors(tmp_path).entries.keys() == ours.keys()
    write(tmp_path / "third.safetensors", half)
    with pytest.raises(FormatError, match="is in two files"):
        open_tensors(tmp_path)


def test_an_index_chooses_the_files(tmp_path: Path) -> None:
    ours = weights()
    write(tmp_path / "a.safetensors", ours)
    write(tmp_path / "copy.safetensors", ours)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(ours, "a.safetensors")}))
    assert open_tensors(tmp_path).entries.keys() == ours.keys()
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(FormatError, match="which is not there"):
        open_tensors(tmp_path)


def test_links_are_followed_to_a_file_but_not_round_in_a_circle(tmp_path: Path) -> None:
    file = write(tmp_path / "blob.safetensors", weights())
    folder = tmp_path / "snapshot"  # as the Hub's cache has it
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(file)
    assert len(open_tensors(folder).entries) == len(weights())
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    with pytest.raises(FormatError, match="cannot be opened"):
        open_tensors(loop)


def _lying(data_offsets: list[list[int]]) -> bytes:
    header = {
        str(at): {"dtype": "F32", "shape": [2], "data_offsets": offsets} for at, offsets in enumerate(data_offsets)
    }
    return safetensors_bytes(header, bytes(16))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (_lying([[0, 8], [4, 12]]), "overlaps"),
        (_lying([[0, 8], [8, 1 << 40]]), "do not fit"),
        (_lying([[0, 8]]), "no tensor owns"),
        (_lying([[8, 16]]), "hole"),
        (safetensors_bytes({}, b""), "holds no tensor"),
        (struct.pack("<Q", 1 << 60) + b"{}", "claims a header"),
        (b"\x80\x04\x95", "cut short"),
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        open_tensors(put(tmp_path / "a.safetensors", data))


def test_a_million_tiny_tensors_are_refused(tmp_path: Path) -> None:
    entry = '"%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    header = "{" + ",".join(entry % (at, at, at + 1) for at in range(1_000_000)) + "}"
    with pytest.raises(FormatError, match=r"over the limit|more than"):
        open_tensors(put(tmp_path / "a.safetensors", safetensors_bytes(header, bytes(1_000_000))))


def test_a_big_endian_gguf_is_refused(tmp_path: Path) -> None:
    good = write_gguf(tmp_path / "good.gguf").read_bytes()
    with pytest.raises(FormatError, match="big-endian"):
        open_tensors(put(tmp_path / "a.gguf", good[:4] + struct.pack(">I", 3) + good[8:]))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", weights())
    suspect = open_tensors(path)
    last = max(suspect.entries.values(), key=lambda entry: entry.end).name
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FormatError, match="became shorter"):
        suspect.read(last)
    with pytest.raises(FormatError, match="became shorter"):
        list(suspect.chunks(last))


def test_rows_that_are_not_there_and_integers_are_errors(tmp_path: Path) -> None:
    header = {"a": {"dtype": "I32", "shape": [2, 2], "data_offsets": [0, 16]}}
    suspect = open_tensors(put(tmp_path / "a.safetensors", safetensors_bytes(header, bytes(16))))
    with pytest.raises(FormatError, match="not floating-point"):
        suspect.read("a")
    model = open_tensors(write(tmp_path / "b.safetensors", weights()))
    with pytest.raises(SteelyardError, match="row 96"):
        model.read(GATE, np.array([96]))


def test_a_terabyte_claim_is_never_held(tmp_path: Path) -> None:
    size = 1 << 41
    header = {"a": {"dtype": "F16", "shape": [1 << 20, 1 << 20], "data_offsets": [0, size]}}
    path = put(tmp_path / "a.safetensors", safetensors_bytes(header))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)  # sparse
    suspect = open_tensors(path)
    with pytest.raises(FormatError, match="too many"):
        suspect.read("a")
    assert suspect.read("a", np.array([9])).shape == (1, 1 << 20)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_eight_bit_floats_are_those_of_torch(kind: str) -> None:
    torch = pytest.importorskip("torch")
    bits = np.arange(256, dtype=np.uint8)
    dtype = torch.float8_e4m3fn if kind == "F8_E4M3" else torch.float8_e5m2
    np.testing.assert_array_equal(decode(bits, kind), torch.from_numpy(bits).view(dtype).float().numpy())


def test_memory_answers_as_a_file_does(tmp_path: Path) -> None:
    ours = weights()
    there, here = open_tensors(write(tmp_path / "a.safetensors", ours, "F32")), in_memory(ours)
    for rows in (None, slice(2, 9, 3), np.array([4, 4, 0])):
        np.testing.assert_array_equal(there.read(GATE, rows), here.read(GATE, rows))
        np.testing.assert_array_equal(there.raw(GATE, rows), here.raw(GATE, rows))
    assert b"".join(there.chunks(GATE)) == b"".join(here.chunks(GATE))

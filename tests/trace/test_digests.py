"""Digests: copies are found by bytes whatever they are called or cast to; checkpoints, listings and torrents too."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from suspects_made import SMALL, put, references, weights, write, write_gguf

from steelyard.base.errors import FormatError
from steelyard.trace import archives, elsewhere
from steelyard.trace.archives import storages
from steelyard.trace.digests import Table, cast, requantised, stored_digests, tensor_digests
from steelyard.trace.lineage import EXACT, UNREADABLE
from steelyard.trace.listings import matching_pieces, merkle_root, read_listing, read_torrent
from steelyard.trace.tensors import in_memory, open_tensors

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("wanted", ["BF16", "F16", "F32"])
def test_casts_are_found_by_bytes(tmp_path: Path, stored: str, wanted: str) -> None:
    torch = pytest.importorskip("torch")
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    rows = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    ours = torch.from_numpy(rows).to(dtypes[stored])
    table = Table(tensor_digests(open_tensors(write(tmp_path / "a.safetensors", {"a": rows}, stored))))
    theirs = ours.to(dtypes[wanted]).contiguous().view(torch.uint8).numpy().tobytes()
    found = table.find(hashlib.sha256(theirs).hexdigest())
    assert [(one.tensor, one.cast) for one in found] == [("a", stored != wanted)]


def test_a_constant_tensor_proves_nothing_and_what_is_not_finite_shows() -> None:
    tensors = in_memory({"ones": np.ones((4, 4)), "nan": np.array([1, np.nan]), "inf": np.array([np.inf, 2])})
    found = stored_digests(tensors)
    assert (found["ones"].common, found["ones"].finite) == (True, True)
    assert not found["nan"].finite
    assert not found["inf"].finite
    table = Table(tensor_digests(in_memory({"ones": np.ones((4, 4))})))
    assert not table.find(found["ones"].sha256)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_requantising_ours_gives_the_suspects_blocks(tmp_path: Path, kind: str) -> None:
    ours = weights()
    suspect = open_tensors(write_gguf(tmp_path / "a.gguf", config=SMALL, weights=ours, kind=kind))
    rows = np.arange(0, 96, 5)
    stored = suspect.raw("blk.1.ffn_gate.weight", rows)
    assert requantised(ours[GATE][rows], kind, stored) == 1.0
    assert requantised(ours[GATE][rows] * np.float32(1.01), kind, stored) < 0.5
    assert requantised(weights(1)[GATE][rows], kind, stored) == 0.0


# --- PyTorch checkpoints
# ----------------------------------------------------------------------------------------------


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def _checkpoint(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Bomb()))
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_storages_are_hashed_and_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = _checkpoint(tmp_path / "a.bin", {"archive/data/0": b"abcd", "archive/version": b"3"})
    assert list(storages(path)) == [("archive/data/0", 4, hashlib.sha256(b"abcd").hexdigest())]
    assert not Path("exploded").exists()


def test_torch_writes_storages_where_they_are_looked_for(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    torch.save({"a": values}, tmp_path / "a.pt")
    (found,) = storages(tmp_path / "a.pt")
    assert found[2] == hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()


def test_hostile_checkpoints_are_refused(tmp_path: Path) -> None:
    bare = put(tmp_path / "bare.pt", pickle.dumps(_Bomb()))
    packed = _checkpoint(tmp_path / "packed.pt", {"archive/data/0": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    empty = _checkpoint(tmp_path / "empty.pt", {})
    whole = _checkpoint(tmp_path / "whole.pt", {"archive/data/0": bytes(1000)}).read_bytes()
    cut = put(tmp_path / "cut.pt", whole[:-40])
    at = whole.rindex(b"PK\x01\x02")
    lying = put(tmp_path / "lying.pt", whole[: at + 20] + struct.pack("<II", 1 << 30, 1 << 30) + whole[at + 28 :])
    end = whole.rindex(b"PK\x05\x06")
    many = put(tmp_path / "many.pt", whole[: end + 12] + struct.pack("<I", 1 << 31) + whole[end + 16 :])
    for path, said in (
        (bare, "outside a zip"),
        (packed, "compressed"),
        (empty, "without tensors"),
        (cut, "cut short"),
        (lying, "overlap"),
        (many, "more than any model"),
    ):
        with pytest.raises(FormatError, match=said):
            list(storages(path))


def ended(length: int = 47, count: int = 1, place: int | None = None, hidden: int = 0) -> bytes:
    """A zip of `count` members' table and a zip64 end, whose locator names `place`, and with `hidden` in one field."""
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, *[0] * 6) + b"a"
    body = local + entry * count
    far = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, hidden, count, length, len(local))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(body) if place is None else place, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return body + far + locator + end


DECOY = int.from_bytes(b"PK\x06\x06", "little") << 32  # what follows it in the record would be a short table's length


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (ended(47 * 50, 50, hidden=DECOY), "more than any model"),
        (ended(47 * 50, 50, 0, DECOY), "not where it says"),
        (ended(47 * 50, 50, 0), "not where it says"),
        (ended(47 * 50, 50) + b"PK\x05\x06" + bytes(18), "two ends"),
        (ended(47 * 50, 50)[:-12] + struct.pack("<HLLH", 1, 47, 0, 0), "two tables"),
        (ended(47 * 50, 50)[:-4] + b"PK\x05\x06", "two ends"),
    ],
)
def test_the_table_is_bounded_where_zipfile_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, said: str
) -> None:
    monkeypatch.setattr(archives, "MAX_DIRECTORY", 1000)
    with pytest.raises(FormatError, match=said):
        list(storages(put(tmp_path / "a.bin", data)))


def test_members_are_counted_and_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_TENSORS", 10)
    data = ended(47 * 50, 50)
    data = data.replace(struct.pack("<2Q", 0, 50), struct.pack("<2Q", 1, 1))
    with pytest.raises(FormatError, match="more than any model"):
        list(storages(put(tmp_path / "a.bin", data)))


def test_a_large_checkpoint_and_one_with_a_comment_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)  # so that the end is a zip64 one
    path = _checkpoint(tmp_path / "a.bin", {"archive/data/0": b"abcd"})
    assert b"PK\x06\x06" in path.read_bytes()
    assert len(list(storages(path))) == 1
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"x" * 65_535
    assert len(list(storages(path))) == 1


# --- listings and torrents
# --------------------------------------------------------------------------------------------


def test_a_hub_listing_in_both_its_forms(tmp_path: Path) -> None:
    digest = "ab" * 32
    model = {"siblings": [{"rfilename": "a", "lfs": {"sha256": digest, "size": 5}}, {"rfilename": "b", "size": 1}]}
    tree = [{"type": "file", "path": "a", "lfs": {"oid": digest, "size": 5}}, {"type": "directory", "path": "d"}]
    for value in (model, tree):
        path = put(tmp_path / "a.json", json.dumps(value).encode())
        first = read_listing(path)[0]
        assert (first.path, first.size, first.sha256) == ("a", 5, digest)


@pytest.mark.parametrize("text", ["{}", "[1]", '{"siblings": [{"size": 3}]}', "[" * 100_000, "nonsense"])
def test_what_is_no_listing_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(FormatError):
        read_listing(put(tmp_path / "a.json", text.encode()))


def bencode(value: Any) -> bytes:
    if isinstance(value, int):
        return b"i%de" % value
    if isinstance(value, bytes):
        return b"%d:%s" % (len(value), value)
    if isinstance(value, list):
        return b"l" + b"".join(map(bencode, value)) + b"e"
    return b"d" + b"".join(bencode(key) + bencode(value[key]) for key in sorted(value)) + b"e"


def torrent(files: dict[str, bytes], piece: int = 1 << 14) -> dict[bytes, Any]:
    data = b"".join(files.values())
    pieces = b"".join(hashlib.sha1(data[at : at + piece]).digest() for at in range(0, len(data), piece))
    listed = [{b"length": len(content), b"path": [name.encode()]} for name, content in files.items()]
    return {b"info": {b"name": b"m", b"piece length": piece, b"pieces": pieces, b"files": listed}}


def test_pieces_inside_our_file_are_found_where_the_torrent_lays_them(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(100_000)
    ours = put(tmp_path / "ours", content)
    for files in ({"a": b"x" * 777, "w": content, "z": b"y" * 9}, {"w": content}, {"a": b"x" * 20_000, "w": content}):
        path = put(tmp_path / "a.torrent", bencode(torrent(files)))
        found = read_torrent(path)
        (file,) = (one for one in found.files if one.path == "w")
        equal, compared = matching_pieces(found, file, ours, 1 << 30)
        assert equal == compared >= 5
    changed = put(tmp_path / "changed", content[:50_000] + b"\0" + content[50_001:])
    assert matching_pieces(found, file, changed, 1 << 30) == (compared - 1, compared)
    assert matching_pieces(found, file, put(tmp_path / "longer", content + b"1"), 1 << 30) == (0, 0)


def test_a_torrent_of_many_files_of_our_length_is_compared_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = references(tmp_path, {"ours": ("release", weights())})
    size, count = ours[0].files[0].size, 50
    tried: list[str] = []

    def attempt(one: Any, file: Any, *rest: Any) -> tuple[int, int]:
        tried.append(file.path)
        return matching_pieces(one, file, *rest)

    monkeypatch.setattr(elsewhere, "matching_pieces", attempt)
    listed = [{b"length": size, b"path": [b"%d" % at]} for at in range(count)]
    info = {b"name": b"m", b"piece length": 1 << 30, b"pieces": bytes(20), b"files": listed}
    path = put(tmp_path / "a.torrent", bencode({b"info": info}))
    answer = elsewhere.trace_elsewhere(path, ours)
    assert (answer.verdict, "no piece that was compared" in answer.reason) == (UNREADABLE, True)
    assert tried == ["0"]  # a piece is as much as may be read
    # What is added up over all files is added up once.
    found = read_torrent(path)
    assert found.total == size * count
    file = ours[0].folder / ours[0].files[0].name
    parts = read_torrent(put(tmp_path / "b.torrent", bencode(torrent({"w": file.read_bytes()}))))
    whole = matching_pieces(parts, parts.files[0], file, 1 << 30)
    assert matching_pieces(replace(parts, files=()), parts.files[0], file, 1 << 30) == whole


def test_a_model_of_our_shapes_leaves_the_next_one_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = references(tmp_path, {"base": ("base", weights(1)), "ours": ("release", weights(0))})
    data = (tmp_path / "ours" / "model.safetensors").read_bytes()
    monkeypatch.setattr(elsewhere, "TORRENT_BUDGET", 4 << 14)
    answer = elsewhere.trace_elsewhere(put(tmp_path / "a.torrent", bencode(torrent({"w": data}))), held)
    assert answer.nearest is not None, answer.reason
    assert (answer.verdict, answer.nearest.name) == (EXACT, "ours")


def test_a_listing_without_digests_says_how_to_save_it(tmp_path: Path) -> None:
    listing = {"siblings": [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"}]}
    answer = elsewhere.trace_elsewhere(put(tmp_path / "a.json", json.dumps(listing).encode()), [])
    assert "holds no digests" in answer.reason
    assert "?blobs=true" in answer.reason


def test_the_root_of_a_version_2_file(tmp_path: Path) -> None:
    blocks = [bytes([at]) * 16384 for at in range(5)]
    leaves = [hashlib.sha256(block).digest() for block in blocks] + [bytes(32)] * 3

    def pair(values: list[bytes]) -> list[bytes]:
        return [hashlib.sha256(values[at] + values[at + 1]).digest() for at in range(0, len(values), 2)]

    ours = put(tmp_path / "ours", b"".join(blocks))
    assert merkle_root(ours) == pair(pair(pair(leaves)))[0]
    tree = {b"w": {b"": {b"length": 5 * 16384, b"pieces root": merkle_root(ours)}}}
    value = {b"info": {b"name": b"m", b"piece length": 1 << 14, b"meta version": 2, b"file tree": tree}}
    (file,) = read_torrent(put(tmp_path / "a.torrent", bencode(value))).files
    assert (file.path, file.root) == ("w", merkle_root(ours))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"i5e",
        b"d4:info",
        b"d4:infod4:name1:a4:name1:bee",
        b"l" * 50,
        b"9999999999:a",
        b"i00e",
        bencode({b"info": {b"name": b"m", b"piece length": 1 << 14, b"pieces": b"x" * 20, b"length": 1 << 60}}),
        bencode({b"info": {b"name": b"m", b"piece length": 0, b"pieces": b"x" * 20, b"length": 5}}),
        bencode({b"info": {b"name": b"m", b"piece length": 1 << 14, b"pieces": b"x" * 40, b"length": 5}}),
        bencode(torrent({"a": b"x"})) + b"e",
    ],
)
def test_broken_torrents_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(FormatError):
        read_torrent(put(tmp_path / "a.torrent", data))


def test_cast_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32) * np.float32(10) ** np.arange(-7, 3).repeat(
        500
    )
    values = np.ascontiguousarray(values, dtype=np.float32)
    for kind, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        assert cast(values, kind).tobytes() == torch.from_numpy(values).to(dtype).view(torch.uint8).numpy().tobytes()

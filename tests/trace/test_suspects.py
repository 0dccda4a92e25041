"""Trees of suspects: each file is read once whatever links lead to it, and what is no model is said to be none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from suspects_made import put, references, safetensors_bytes, weights, write

from steelyard.base.errors import FormatError
from steelyard.trace.registry import Reference
from steelyard.trace.suspects import trace_all


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    return references(tmp_path_factory.mktemp("registry"), {"ours": ("release", weights(0))})


def test_links_to_one_file_are_one_suspect(tmp_path: Path, registered: list[Reference]) -> None:
    (tmp_path / "kept").mkdir()
    file, tree = write(tmp_path / "kept" / "copy.safetensors", weights(0)), tmp_path / "tree"
    tree.mkdir()
    for at in range(20):
        (tree / f"a{at:02}.safetensors").symlink_to(file)
        os.link(file, tree / f"b{at:02}.safetensors")
    write(tree / "other.safetensors", weights(1))
    (alone,) = trace_all(file, registered)
    copy, other = trace_all(tree, registered)
    assert copy.suspect == f"{tree}/a00.safetensors (and 39 more names of the same file)"
    assert (copy.verdict, copy.bytes_read) == (alone.verdict, alone.bytes_read)
    assert (other.suspect, other.verdict) == (f"{tree}/other.safetensors", "unrelated")


def test_folders_of_links_to_one_model_are_one_suspect(tmp_path: Path, registered: list[Reference]) -> None:
    folder, tree = write(tmp_path / "model", weights(0)), tmp_path / "tree"
    for name in "abc":
        (tree / name).mkdir(parents=True)
        for file in folder.iterdir():
            (tree / name / file.name).symlink_to(file)
    (copy,) = trace_all(tree, registered)
    assert copy.suspect == f"{tree}/a (and 2 more names of the same file)"
    assert copy.verdict == "exact copy"


def test_a_name_by_which_a_file_is_read_otherwise_hides_no_other(tmp_path: Path, registered: list[Reference]) -> None:
    file = write(tmp_path / "z.safetensors", weights(0))
    for name in ("a.gguf", "b.bin", "c.torrent"):
        os.link(file, tmp_path / name)
    answers = trace_all(tmp_path, registered)
    assert sorted(one.verdict for one in answers) == ["exact copy", "unreadable", "unreadable", "unreadable"]


@pytest.mark.parametrize(
    ("name", "data", "remedy"),
    [
        ("request.yaml", b"release: ours\npurpose: a test\n", "give a model's folder or its weight file"),
        ("notes.txt", "größer als gedacht".encode(), "give a model's folder or its weight file"),
        ("page.safetensors", b"<!doctype html><html>", "download it again"),
        ("zip.safetensors", b"PK\x03\x04" + bytes(40), "convert it to safetensors"),
        ("pickle.safetensors", b"\x80\x02}q\x00(X\x05\x00\x00\x00", "convert it to safetensors"),
    ],
)
def test_what_is_no_weight_file_is_said_to_be_none(
    tmp_path: Path, registered: list[Reference], name: str, data: bytes, remedy: str
) -> None:
    (answer,) = trace_all(put(tmp_path / name, data), registered)
    assert "is no safetensors file (nor GGUF)" in answer.reason
    assert remedy in answer.reason
    assert "claims" not in answer.reason


def test_a_download_cut_short_is_told_from_another_file(tmp_path: Path, registered: list[Reference]) -> None:
    whole = safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))
    (answer,) = trace_all(put(tmp_path / "cut.safetensors", whole[:30]), registered)
    assert "claims a header of" in answer.reason
    assert "download it again" in answer.reason


def test_a_device_is_not_to_be_removed(registered: list[Reference]) -> None:
    with pytest.raises(FormatError, match="/dev/null: is not a plain file: give a file or a folder"):
        trace_all(Path("/dev/null"), registered)

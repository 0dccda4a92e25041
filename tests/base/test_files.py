"""Files that are whole or absent; paths that cannot escape."""

from pathlib import Path

import pytest

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import inside, new_folder, write_atomic


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fail() -> None:
        with new_folder(out) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(out) as folder:
        (folder / "whole").write_text("x")
    assert (out / "whole").read_text() == "x"
    with pytest.raises(SteelyardError, match="exists already"), new_folder(out):
        pass


@pytest.mark.parametrize("bad", ["", "/etc/passwd", "../x", "a/../../x", "a\\b", "a\x00b"])
def test_paths_that_escape_are_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(FormatError):
        inside(tmp_path, bad)


def test_a_link_that_leaves_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(FormatError, match="symbolic link"):
        inside(root, "link/file")
    assert inside(root, "a/b") == root / "a" / "b"

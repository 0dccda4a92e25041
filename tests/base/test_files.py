"""Files that are whole or absent; paths that cannot escape."""

import fcntl
import os
from pathlib import Path

import pytest

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import inside, locked, new_file, new_folder, read_bounded, write_atomic


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


def test_only_plain_files_are_read_and_no_more_than_allowed(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"12345")
    assert read_bounded(tmp_path / "plain", 5) == b"12345"
    with pytest.raises(FormatError, match="plain: is over 4 bytes"):
        read_bounded(tmp_path / "plain", 4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name, reason in (("pipe", "not a plain file"), ("endless", "a symbolic link"), (".", "not a plain file")):
        with pytest.raises(FormatError, match=reason):
            read_bounded(tmp_path / name, 5)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "absent", 5)


def test_a_lock_leaves_what_a_planted_link_points_at(tmp_path: Path) -> None:
    secret = tmp_path / "key.pem"
    secret.write_text("private")
    (tmp_path / ".lock").symlink_to(secret)
    with pytest.raises(FormatError, match="symbolic link, where a lock belongs"), locked(tmp_path / ".lock"):
        pass
    assert secret.read_text() == "private"


def test_a_lock_is_held_by_one_and_given_up(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with locked(path):
        pass
    path.write_text("kept")
    with locked(path), path.open() as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert other.read() == "kept"
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_new_file_has_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    for name, mode in (("open", None), ("sealed", 0o600)):
        with new_file(tmp_path / name) if mode is None else new_file(tmp_path / name, mode=mode) as file:
            file.write_bytes(b"x")
        assert (tmp_path / name).stat().st_mode & 0o777 == (mode or 0o644)

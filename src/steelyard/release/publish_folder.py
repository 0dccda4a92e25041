"""Publish to a folder: copied into a hidden folder beside it, checked there, and renamed into place.

The hidden folder `.NAME.partial` stays where this is interrupted, and the next call goes on from it: files there with
the right hash are kept. The files that sign are written last, when all the others are there and on the disk, and taken
away first: so that the hidden folder too verifies only when it is whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steelyard.base.canonical import sha256_file
from steelyard.base.errors import SteelyardError
from steelyard.base.files import fsync_folder, inside, write_atomic
from steelyard.base.progress import Progress
from steelyard.release.publish import Check, Published, Release, ReleaseFile

_CHUNK = 4 << 20


def publish_folder(release: Release, target: Path, check: Check, progress: Progress) -> Published:
    """Make `target` hold exactly `release`. `check` verifies the copy before it appears there.

    Raises SteelyardError where something else lies at `target`, another process is publishing there, the disk is too
    small, or the copy does not verify.
    """
    done = Published(str(target), release.name, release.manifest, already=False)
    if _occupied(target):
        if _same(target, release):
            return Published(str(target), release.name, release.manifest, already=True)
        text = "holds something else than this release, and what is published is never overwritten"
        raise SteelyardError(f"{target}: {text}: choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_name(f".{target.name}.partial")) as partial:
        _tidy(partial, release)
        _copy(partial, release, progress)
        for file in release.signing:
            assert file.data is not None
            write_atomic(partial / file.path, file.data)
        result = check(partial)
        if not result.ok:
            for file in release.signing:
                (partial / file.path).unlink(missing_ok=True)
            reasons = "; ".join(finding.message for finding in result.findings[:3])
            raise SteelyardError(f"{target}: the copy does not verify, so it is not published: {reasons}")
        if _occupied(target):
            raise SteelyardError(f"{target}: appeared meanwhile: what is published is never overwritten")
        os.rename(partial, target)
        fsync_folder(target.parent)
    return done


def _occupied(target: Path) -> bool:
    """Whether anything but an empty folder lies at `target`."""
    if target.is_symlink():
        return True
    return any(target.iterdir()) if target.is_dir() else target.exists()


def _same(folder: Path, release: Release) -> bool:
    """Whether `folder` holds the files of `release` and nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    return found == {file.path for file in release.files} and all(_there(folder, file) for file in release.files)


def _there(folder: Path, file: ReleaseFile) -> bool:
    path = inside(folder, file.path)
    plain = path.is_file() and not path.is_symlink()
    return plain and path.stat().st_size == file.size and sha256_file(path) == file.sha256


@contextmanager
def _alone(partial: Path) -> Iterator[Path]:
    """The hidden folder, held by this process only for as long as it works there (`flock` ends with the process)."""
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(handle), os.stat(partial, follow_symlinks=False))
        except OSError:
            ours = False  # held by another, or renamed by it in this moment
        if not ours:
            raise SteelyardError(f"{partial}: another process is publishing there: wait for it")
        yield partial
    finally:
        os.close(handle)


def _tidy(partial: Path, release: Release) -> None:
    """Take away the files that sign, then whatever is no content of this release (of an earlier, other try)."""
    wanted = {file.path for file in release.content}
    found = sorted(partial.rglob("*"), key=lambda path: len(path.parts), reverse=True)
    signing = {partial / file.path for file in release.signing}
    for path in sorted(found, key=lambda path: path not in signing):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.is_symlink() or not path.is_file() or path.relative_to(partial).as_posix() not in wanted:
            path.unlink()
    _fsync_folders(partial)


def _copy(partial: Path, release: Release, progress: Progress) -> None:
    """Copy what is not there yet, hashed on the way, and make it durable."""
    total = sum(file.size for file in release.content) / 1e6
    missing = []
    with progress.task("look at what is there", total, "MB") as task:
        for file in release.content:
            if not _there(partial, file):
                missing.append(file)
            task.advance(file.size / 1e6)
    left = sum(file.size for file in missing)
    free = shutil.disk_usage(partial).free
    if left > free:
        raise SteelyardError(f"{partial}: {left / 1e6:,.0f} MB are to be copied, {free / 1e6:,.0f} MB are free there")
    if len(missing) < len(release.content):
        progress.say(f"{len(release.content) - len(missing)} of {len(release.content)} files are there already")
    with progress.task(f"copy to {partial.parent}", total, "MB", done=total - left / 1e6) as task:
        for file in missing:
            path = inside(partial, file.path)
            path.parent.mkdir(exist_ok=True)
            with file.open() as source, path.open("wb") as copy:
                while data := source.read(_CHUNK):
                    copy.write(data)
                    task.advance(len(data) / 1e6, note=file.path)
                copy.flush()
                os.fsync(copy.fileno())
    _fsync_folders(partial)


def _fsync_folders(folder: Path) -> None:
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        fsync_folder(path)

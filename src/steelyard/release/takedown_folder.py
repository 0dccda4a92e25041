"""Take down a published folder: it is renamed to `NAME.withdrawn-MANIFEST8`, closed to all but its owner, and a folder
with the notice appears under its name.

Killed between the two renames, nothing is left under the name, and the same call puts the notice there. What is to be
deleted is deleted from the folder aside: first the files that sign, so that what is left no longer verifies, and the
manifest, by which the folder is known again, last. Only files of the release are deleted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import fsync_folder, inside, new_folder, read_bounded, write_atomic
from steelyard.release.layout import HOME, HUB_FILE, MANIFEST, MANIFEST_LIMIT, SIGNING, read_manifest
from steelyard.release.notice import DATA, NOTICE_LIMIT, Notice, notice_files, read_notice

Done = Literal["taken down", "already", "absent"]
Held = Literal["release", "notice", "nothing"]

_MAX_ASIDES = 99  # take-downs of one release in one place
_SHOWN = 3


class OtherReleaseError(SteelyardError):
    """The place holds another release, which is not touched."""


def take_down_folder(folder: Path, notice: Notice, *, delete: bool = False) -> tuple[Done, str]:
    """Put the notice in the place of the release; gives the state and what was done, in words.

    Raises SteelyardError where `folder` is a link or holds anything else than this release or its notice, where it was
    changed meanwhile, and where files that are not of the release are to be deleted; OSError.
    """
    is_notice = _held(folder, notice.manifest) == "notice"
    done = []
    partial = folder.with_name(f".{folder.name}.partial")  # where publishing was interrupted
    for place in (folder, partial):
        if _is_release(place, notice.manifest):
            aside = _move_aside(place, folder, notice.manifest)
            done.append(f"{place.name} moved to {aside}")
    asides = list(_asides(folder, notice.manifest))
    for aside in asides:
        if stat.S_IMODE(aside.stat().st_mode) != 0o700:
            aside.chmod(0o700)
            done.append(f"{aside} closed to others")
    if is_notice or asides:
        if _put_notice(folder, notice):
            done.append("notice put in its place")
    else:
        if not folder.parent.is_dir():
            raise SteelyardError(f"{folder}: {folder.parent} is not there: mount or restore it, and try again")
        return "absent", "nothing is there"
    if delete:
        for aside in [*asides, *_emptied(folder, notice.manifest)]:
            _delete(aside)
            done.append(f"{aside} deleted")
    return ("taken down", "; ".join(done)) if done else ("already", "the notice is there")


def _held(folder: Path, manifest: str) -> Held:
    if folder.is_symlink():
        raise SteelyardError(f"{folder}: is a symbolic link now: it is left as it is, and what it leads to as well")
    if not folder.exists():
        return "nothing"
    if not folder.is_dir():
        raise SteelyardError(f"{folder}: is no folder, so not this release: it is left as it is")
    found = _manifest_of(folder)
    if found == manifest:
        return "release"
    if found is not None:
        raise OtherReleaseError(f"{folder}: holds another release (manifest {found[:16]}): it is left as it is")
    try:
        if read_notice(read_bounded(folder / DATA, NOTICE_LIMIT), str(folder / DATA)).manifest == manifest:
            return "notice"
    except FileNotFoundError:
        if not any(folder.iterdir()):
            return "nothing"
    raise SteelyardError(f"{folder}: holds something else than this release: it is left as it is")


def _manifest_of(folder: Path) -> str | None:
    """SHA-256 of its manifest file; None where it has none."""
    if (folder / HOME).is_symlink():
        return None
    try:
        return sha256_hex(read_bounded(folder / MANIFEST, MANIFEST_LIMIT))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_release(path: Path, manifest: str) -> bool:
    return path.is_dir() and not path.is_symlink() and _manifest_of(path) == manifest


def _move_aside(place: Path, folder: Path, manifest: str) -> Path:
    handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        aside = _free(folder, manifest)
        os.fchmod(handle, 0o700)  # first: it is never readable by others under its new name
        os.rename(place, aside)
        # Somebody may have put another folder there, or another manifest into this one, since it was looked at.
        if not os.path.samestat(os.fstat(handle), aside.lstat()) or _manifest_of(aside) != manifest:
            os.fchmod(handle, mode)
            _move_back(aside, place)
            raise SteelyardError(f"{place}: was changed meanwhile, and is left as it is: look at it and try again")
    finally:
        os.close(handle)
    fsync_folder(folder.parent)
    return aside


def _move_back(aside: Path, folder: Path) -> None:
    try:
        os.rename(aside, folder)
    except OSError as error:
        text = f"was changed meanwhile, and cannot be moved back ({error.strerror}): what was there is now {aside}"
        raise SteelyardError(f"{folder}: {text}") from error


def _free(folder: Path, manifest: str) -> Path:
    for name in _names(folder, manifest):
        if not os.path.lexists(folder.with_name(name)):
            return folder.with_name(name)
    raise SteelyardError(f"{folder}: {_MAX_ASIDES} folders of this release lie beside it already: remove some")


def _names(folder: Path, manifest: str) -> list[str]:
    first = f"{folder.name}.withdrawn-{manifest[:8]}"
    return [first, *(f"{first}-{number}" for number in range(2, _MAX_ASIDES + 1))]


def _asides(folder: Path, manifest: str) -> Iterator[Path]:
    """Folders beside it to which this release was moved."""
    for name in _names(folder, manifest):
        path = folder.with_name(name)
        if _is_release(path, manifest):
            yield path


def _emptied(folder: Path, manifest: str) -> Iterator[Path]:
    """Such folders that a deletion left without a file when it was killed."""
    for name in _names(folder, manifest):
        path = folder.with_name(name)
        if path.is_dir() and not path.is_symlink() and not _files(path):
            yield path


def _put_notice(folder: Path, notice: Notice) -> bool:
    """Whether anything had to be written."""
    files = notice_files(notice)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if not folder.exists():
        with new_folder(folder) as made:
            for name, data in files.items():
                write_atomic(made / name, data)
        return True
    wrong = [name for name, data in files.items() if not _same(folder / name, data)]
    for name in wrong:
        write_atomic(folder / name, files[name])
    return bool(wrong)


def _same(path: Path, data: bytes) -> bool:
    try:
        return read_bounded(path, NOTICE_LIMIT) == data
    except (FormatError, FileNotFoundError):
        return False


def _delete(aside: Path) -> None:
    """Delete the release's files there, and the folder. Raises SteelyardError where it holds others: they are kept."""
    if _files(aside):
        listed = [file.path for file in read_manifest(aside).files]
        for name in (*SIGNING, HUB_FILE, *listed):
            inside(aside, name).unlink(missing_ok=True)
        others = [path for path in _files(aside) if path != aside / MANIFEST]
        if others:
            named = ", ".join(path.relative_to(aside).as_posix() for path in others[:_SHOWN])
            more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
            raise SteelyardError(f"{aside}: {named}{more}: not of the release, so kept: move or delete them yourself")
        (aside / MANIFEST).unlink()
    for path in sorted((path for path in aside.rglob("*")), key=lambda path: len(path.parts), reverse=True):
        path.rmdir()
    aside.rmdir()
    fsync_folder(aside.parent)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())

"""A whole tree of suspects: what in it could be a model, and the answer for each, headers first.

Links to folders are not followed, so a loop ends nowhere; what a tree may hold is bounded. A file whose shapes fit no
registered model is answered from its header alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from steelyard.base.errors import FormatError
from steelyard.base.progress import Progress, Silent
from steelyard.trace.archives import SUFFIXES
from steelyard.trace.elsewhere import is_elsewhere, trace_elsewhere
from steelyard.trace.lineage import Answer, trace
from steelyard.trace.listings import is_listing
from steelyard.trace.registry import Reference
from steelyard.trace.tensors import real_path, weight_files

MAX_FILES = 500_000
MAX_DEPTH = 64
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state")  # of a Trainer's folder; pickles, not weights


def find_suspects(path: Path) -> list[Path]:
    """The models in a file or a tree: a folder for one model's safetensors, else single files; sorted.

    Raises FormatError where the path leads nowhere or to a device or pipe, the tree is too large or too deep, or holds
    nothing to compare.
    """
    real = real_path(path)
    if not real.is_dir():
        if not real.is_file():
            raise FormatError(f"{path}: is not a plain file: give a file or a folder")
        return [path]
    found = sorted({one for folder, names in _folders(real) for one in _in_folder(folder, names)})
    if not found:
        raise FormatError(
            f"{path}: nothing to compare: no safetensors, GGUF, PyTorch checkpoint, torrent or Hub listing"
        )
    return found


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    count, level = 0, [root]
    for _ in range(MAX_DEPTH):
        inner: list[Path] = []
        for folder in level:
            names = []
            try:
                entries = list(os.scandir(folder))
            except OSError as error:
                raise FormatError(f"{folder}: cannot be read: {error.strerror}: leave it out") from error
            for entry in entries:
                count += 1
                if count > MAX_FILES:
                    raise FormatError(f"{root}: holds over {MAX_FILES:,} files: trace its parts one by one")
                if entry.is_dir(follow_symlinks=False):
                    inner.append(folder / entry.name)
                elif not entry.is_symlink() or (folder / entry.name).is_file():
                    names.append(entry.name)
            yield folder, names
        if not inner:
            return
        level = inner
    raise FormatError(f"{root}: folders nested deeper than {MAX_DEPTH}: trace its parts one by one")


def _in_folder(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    tensors = [name for name in names if name.lower().endswith(".safetensors")]
    one_model = any(name.endswith(".safetensors.index.json") for name in names) or "model.safetensors" in tensors
    if tensors and (one_model or len(tensors) == 1):
        yield folder
        yield from _beside(folder, tensors)
    else:
        yield from (folder / name for name in tensors)
    for name in names:
        lower = name.lower()
        pickle = lower.endswith(SUFFIXES) and not lower.startswith(_NOT_WEIGHTS)
        if pickle or lower.endswith((".gguf", ".torrent")) or (lower.endswith(".json") and _lists(folder / name)):
            yield folder / name


def _lists(path: Path) -> bool:
    try:
        return is_listing(path)
    except (FormatError, OSError):  # among the many JSON files of a tree, one that cannot be read is no suspect
        return False


def _beside(folder: Path, names: Sequence[str]) -> list[Path]:
    """The safetensors of a model's folder that are no part of the model: another one may be there."""
    try:
        model = set(weight_files(folder))
    except FormatError:  # said of the folder, which is a suspect too
        return []
    return [folder / name for name in names if folder / name not in model]


def trace_all(
    path: Path, references: Sequence[Reference], *, full: bool | None = None, progress: Progress | None = None
) -> list[Answer]:
    """The answer for each suspect in a file or a tree, names of the same files being one suspect: its first name, which
    says how many more there are. Raises FormatError as `find_suspects` does."""
    named: dict[object, list[Path]] = {}
    for suspect in find_suspects(path):
        named.setdefault(_files(suspect), []).append(suspect)
    suspects = list(named.values())
    progress = progress or Silent()
    if len(suspects) == 1:
        return [_same(suspects[0], _one(suspects[0][0], references, full, progress))]
    answers = []
    with progress.task("suspects", len(suspects), "models") as task:
        for names in suspects:
            answers.append(_same(names, _one(names[0], references, full, Silent())))
            task.advance()
    return answers


def _files(path: Path) -> object:
    """What the answer for a suspect depends on: its files, whatever names links give them, and the settings beside."""
    try:
        if not path.is_dir() and is_elsewhere(path):
            return _identity(path)
        real = real_path(path)
        folder = real.is_dir()
        config = (real if folder else real.parent) / "config.json"
        weights = weight_files(real) if folder else [real]
        return folder, tuple(map(_identity, weights)), _identity(config) if config.exists() else None
    except (FormatError, OSError):  # said in the answer
        return path


def _identity(path: Path) -> tuple[int, int, str]:
    """A file, and its suffix, by which it is read."""
    found = path.stat()
    return found.st_dev, found.st_ino, path.suffix.lower()


def _same(names: Sequence[Path], answer: Answer) -> Answer:
    if len(names) == 1:
        return answer
    return replace(answer, suspect=f"{answer.suspect} (and {len(names) - 1:,} more names of the same file)")


def _one(path: Path, references: Sequence[Reference], full: bool | None, progress: Progress) -> Answer:
    if not path.is_dir() and is_elsewhere(path):
        return trace_elsewhere(path, references)
    return trace(path, references, full=full, progress=progress)

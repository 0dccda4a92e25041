"""A model folder written again with other weights of the same names, shapes and types, streamed and without torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path

from steelyard.base.errors import FormatError
from steelyard.base.files import new_folder, open_regular
from steelyard.base.progress import Progress
from steelyard.model.headers import TensorInfo

Files = Mapping[str, Mapping[str, TensorInfo]]
Pieces = Iterator[bytes | memoryview]
Change = Callable[[TensorInfo, BufferedReader], Pieces]


def rewrite_folder(
    source: Path,
    out: Path,
    files: Files,
    change: Change,
    what: str,
    progress: Progress,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write `out`: `source` with each tensor replaced by what `change` makes of it.

    `files` is what `identity.weight_files(source)` gives. `change` is given a tensor and a reader that stands at its
    first byte; it must read all of it and yield as many bytes. Headers and other files stay as they are. `out` appears
    whole or not at all, and not where `check`, called at the end, raises. Raises SteelyardError where `out` exists.
    """
    size = sum(tensor.end - tensor.start for tensors in files.values() for tensor in tensors.values())
    with new_folder(out) as folder, progress.task(what, size, "bytes") as task:
        for path in sorted(source.iterdir()):
            if path.name not in files:
                shutil.copyfile(path, folder / path.name)
        for name, tensors in files.items():
            ordered = sorted(tensors.values(), key=lambda tensor: tensor.start)
            with open_regular(source / name) as reader, (folder / name).open("wb") as writer:
                writer.write(read_exactly(reader, ordered[0].start))
                for tensor in ordered:
                    for piece in change(tensor, reader):
                        writer.write(piece)
                        task.advance(len(piece) if isinstance(piece, bytes) else piece.nbytes)
        check()


def read_exactly(reader: BufferedReader, count: int) -> bytes:
    """`count` bytes. Raises FormatError where the file has become shorter since its header was read."""
    data = reader.read(count)
    if len(data) != count:
        raise FormatError(f"{reader.name}: was cut short while it was read: try again")
    return data

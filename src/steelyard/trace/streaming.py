"""A model's weights by Hugging Face name, read from the disk whenever they are asked for: memory holds one tensor.

>>> weights = Weights(hugging_face(open_tensors(Path("model"))))
>>> weights["model.norm.weight"].shape, len(weights)
((576,), 272)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from steelyard.trace.roles import Named
from steelyard.trace.tensors import Float32


class Weights(Mapping[str, Float32]):
    """The tensors of `named` as float32, layer after layer. The last one read is held, the others are read again.

    Who goes through it in its order reads everything once; `told` gets the bytes of each. Raises FormatError as
    `Tensors.read` does.
    """

    def __init__(self, named: Named, told: Callable[[int], object] = lambda _: None) -> None:
        self._named, self._entries, self._told = named, named.entries, told
        self._names = sorted(self._entries, key=_place)
        self._held: tuple[str, Float32] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Float32:
        if self._held is None or self._held[0] != name:
            if name not in self._entries:
                raise KeyError(name)
            self._held = None  # let go of the one before the next is read
            self._held = name, self._named.read(name)
            self._told(self._entries[name].end - self._entries[name].start)
        return self._held[1]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return self._entries[name].shape

    def rows(self, name: str, rows: slice) -> Float32:
        """Some rows of a tensor; nothing else of it is read."""
        return self._named.read(name, rows)


def _place(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return (int(parts[2]) if parts[:2] == ["model", "layers"] else -1), name


def shape_of(tensors: Mapping[str, Float32], name: str) -> tuple[int, ...]:
    """A tensor's shape, without reading it where it need not be."""
    return tensors.shape(name) if isinstance(tensors, Weights) else tensors[name].shape


def rows_of(tensors: Mapping[str, Float32], name: str, rows: slice) -> Float32:
    """Some rows of a tensor, without reading the others where they need not be."""
    return tensors.rows(name, rows) if isinstance(tensors, Weights) else tensors[name][rows]

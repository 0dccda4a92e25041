"""A suspect's weights in its release's layout, whatever file they come in and however they were disguised.

Names and row order are read through `roles.py` (a folder, a GGUF, other names), rotations, permutations, folded norms
and removed layers are undone by `alignment.py`. An edit of the refusals changes the embedding, from which the rotation
is first told, and blurs it along the very direction that was taken out; what reads the stream is not edited, so the
rotation is told again from there.

    >>> release, suspect = Weights.of(Path("release")), Weights.of(Path("suspect.gguf"))
    >>> found = in_layout(release, suspect)
    >>> found.undone
    ('the residual stream was rotated', '46,080 neurons were in another order')
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from steelyard.base.errors import FormatError
from steelyard.trace.alignment import Aligned, align, distance, nearest_rotation
from steelyard.trace.independence import unit_rows
from steelyard.trace.matching import stretch
from steelyard.trace.roles import DOWN, EMBEDDING, GATE, OUTPUT, Named, hugging_face, layer_name
from steelyard.trace.tensors import open_tensors
from steelyard.trace.transforms import READERS
from steelyard.trace.uncensored import Array, writers

ANOTHER_LAYOUT = 0.7  # relative distance from which matrices with the same name are not the same matrices
MOST_ALIGNED = 2_000_000_000  # weights: aligning holds both models, 4 bytes a weight
_ROWS = 256


class Weights(Mapping[str, Array]):
    """A model's weights by Hugging Face name, float32, each read when it is asked for."""

    def __init__(self, named: Named) -> None:
        self.named = named

    @classmethod
    def of(cls, path: Path) -> Weights:
        """Of a folder, a safetensors file or a GGUF. Raises FormatError for what `open_tensors` or `hugging_face`
        refuse."""
        return cls(hugging_face(open_tensors(path)))

    def __getitem__(self, name: str) -> Array:
        if name not in self.named.stored:
            raise KeyError(name)
        return np.ascontiguousarray(self.named.read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.named.stored)

    def __len__(self) -> int:
        return len(self.named.stored)

    @property
    def size(self) -> int:
        """How many weights there are, by the headers."""
        return sum(int(np.prod(entry.shape, dtype=object)) for entry in self.named.entries.values())


@dataclass(frozen=True)
class InLayout:
    """`tensors`: the suspect in the release's layout, None where that could not be. `undone` and `limits` say in words
    what was undone and what could not be recovered."""

    tensors: Mapping[str, Array] | None
    undone: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()


def in_layout(release: Weights, suspect: Weights) -> InLayout:
    """The suspect in the layout of `release`: as it is, where its matrices lie near those of the same name; else
    aligned, which reads both models whole. Raises FormatError for broken files."""
    if _alike(release, suspect):
        return InLayout(suspect)
    most = max(release.size, suspect.size)
    if most > MOST_ALIGNED:
        said = f"the weights are in another layout, and {most:,} are too many to align (at most {MOST_ALIGNED:,})"
        return InLayout(None, limits=(said,))
    sizes = release.named.sizes
    try:
        ours = dict(release)
        aligned = _turned(ours, align(ours, dict(suspect), sizes.heads, sizes.kv_heads))
    except FormatError as error:
        return InLayout(None, limits=(f"the weights could not be put in the release's layout: {error}",))
    except KeyError as error:
        return InLayout(None, limits=(f"the weights could not be put in the release's layout: it lacks {error}",))
    far = [name for name in writers(aligned.tensors) if aligned.residual[name] > ANOTHER_LAYOUT]
    kept = {name: tensor for name, tensor in aligned.tensors.items() if name not in far}
    limits = [f"{len(far)} matrices stayed unlike the release's and are left out: {', '.join(far[:3])}"] if far else []
    gone = sorted({layer for layer in writers(release).values() if layer >= 0} - set(aligned.found.layers))
    if gone:
        limits.append(f"layers {', '.join(map(str, gone))} of the release are not in it")
    if not any(layer >= 0 for layer in writers(kept).values()):
        return InLayout(None, aligned.found.words(), (*limits, "no matrix of a layer is like the release's"))
    return InLayout(kept, aligned.found.words(), tuple(limits))


def _alike(release: Weights, suspect: Weights) -> bool:
    """Whether sampled rows of what writes to the stream and of the gates lie near those of the same name, at their
    size."""
    layers = release.named.layers
    if suspect.named.layers != layers:
        return False
    some = {layers[0], layers[len(layers) // 2], layers[-1]}
    names = [EMBEDDING, *(layer_name(layer, part) for layer in some for part in (OUTPUT, DOWN, GATE))]
    for name in names:
        if name not in release or name not in suspect:
            return False
        ours, theirs = (_sample(of.named, name) for of in (release, suspect))
        if ours.shape != theirs.shape or distance(theirs, ours) > ANOTHER_LAYOUT or _stretched(theirs, ours):
            return False
    return True


def _stretched(theirs: Array, ours: Array) -> bool:
    """Whether it is ours times a factor, more than noise explains."""
    wide, narrow = theirs.astype(np.float64), ours.astype(np.float64)
    sizes = float(np.linalg.norm(wide)), float(np.linalg.norm(narrow))
    if not all(sizes):
        return False
    return stretch(sizes[0] / sizes[1], float((wide * narrow).sum()) / (sizes[0] * sizes[1])) != 1


def _sample(named: Named, name: str) -> Array:
    return named.read(name, np.arange(min(_ROWS, named.entries[name].shape[0])))


def _turned(reference: Mapping[str, Array], aligned: Aligned) -> Aligned:
    """The rotation told again, from all matrices that read the stream (orthogonal Procrustes)."""
    if not aligned.found.rotated:
        return aligned
    tensors, crossed = dict(aligned.tensors), np.zeros((1, 1))
    pairs = [
        (f"model.layers.{layer}.{reader}.weight", f"model.layers.{layer}.{norm}.weight")
        for layer in aligned.found.layers
        for norm, readers in READERS.items()
        for reader in readers
    ]
    for name, norm in pairs:
        if name in tensors:
            ours, theirs = (of[name] * unit_rows(of[norm]) for of in (reference, tensors))
            crossed = crossed + unit_rows(ours).T @ unit_rows(theirs)  # no row counts for more than another
    turn = nearest_rotation(crossed.astype(np.float64))[0]
    for name, layer in writers(tensors).items():
        tensors[name] = tensors[name] @ turn.T if layer < 0 else turn @ tensors[name]
    residual = aligned.residual | {name: distance(tensors[name], reference[name]) for name in writers(tensors)}
    return replace(aligned, tensors=tensors, residual=residual)

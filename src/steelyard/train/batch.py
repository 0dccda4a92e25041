"""What a training step reads: packed micro-batches, and loaders that give any step's batches from its number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

IGNORE = -100
"""The target of a position that is not supervised (PyTorch's own default for cross-entropy)."""

B_co = TypeVar("B_co", covariant=True)


@dataclass(frozen=True)
class Batch:
    """One micro-batch, flat: documents one after another, no padding.

    tokens: int64 [T].
    targets: int64 [T], the token that follows; `IGNORE` where it is not supervised, and always at a document's end.
    positions: int64 [T], from 0 in each document.
    lengths: tokens of each document; their sum is T. Attention never crosses from one to another.
    sample_ids: which samples of the data set are in it, for messages and tests.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    sample_ids: tuple[int, ...]


class Loader(Protocol[B_co]):
    """Global batches as a pure function of the step's number: a loader's whole state is that one integer."""

    @property
    def digest(self) -> str:
        """SHA-256 of data, order and packing: a checkpoint made on other data is refused."""
        ...

    @property
    def steps_per_epoch(self) -> int: ...

    def step(self, index: int) -> Sequence[B_co]:
        """Every micro-batch of global step `index`, from 0 on; rank r of w takes `[r::w]`."""
        ...

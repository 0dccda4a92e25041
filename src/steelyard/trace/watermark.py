"""A mark in the weights that names the recipient (signatures first; the bodies follow)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steelyard.base.progress import Progress

Array = NDArray[np.float32]


@dataclass(frozen=True)
class MarkReport:
    """What marking changed: relative RMS change over all weights, entries moved, entries in all."""

    relative_rms: float
    changed: int
    entries: int


@dataclass(frozen=True)
class Detection:
    """Per grant, in the order given: score and log10 of the p-value's bound. `accused`: p times all grants <= 1e-9."""

    scores: NDArray[np.float64]
    log10_p: NDArray[np.float64]
    accused: tuple[str, ...]

    @property
    def p_values(self) -> NDArray[np.float64]:
        """The bounds themselves; 0 where one is below the smallest float."""
        return np.asarray(10.0**self.log10_p)


def mark_folder(source: Path, out: Path, key: bytes, grant: str, progress: Progress) -> MarkReport:
    """Write the marked copy of a model folder."""
    raise NotImplementedError


def detect(original: Mapping[str, Array], suspect: Mapping[str, Array], key: bytes, grants: Sequence[str]) -> Detection:
    """Whose mark `suspect` carries."""
    raise NotImplementedError

"""Which row belongs to which, and by what factor: what `alignment` needs of two sets of heads or neurons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from steelyard.trace.independence import unit_rows

Array = NDArray[np.float32]
Floats = NDArray[np.float64]
Order = NDArray[np.int64]

EXACT_MATCHING = 4096  # neurons; above, each takes its best match, which noise alone never makes ambiguous
_SCALED = 0.02  # a factor nearer to 1 is noise, or too small to matter
_UNSCALED = 0.95  # share of factors near 1 that says the others are mishaps


def cosines(ours: Array, theirs: Array) -> Array:
    """Sizes of the cosines between all heads of two sets, each [heads, ...] -> [heads, heads]."""
    return np.asarray(np.abs(unit_rows(ours.reshape(len(ours), -1)) @ unit_rows(theirs.reshape(len(theirs), -1)).T))


def assign(likeness: Array) -> Order:
    """For each row its column, each column once, at the greatest sum."""
    best: Order = likeness.argmax(axis=1)
    if len(np.unique(best)) == len(best):  # no conflict: no sum can be greater
        return best
    if len(best) <= EXACT_MATCHING:
        return np.asarray(linear_sum_assignment(likeness, maximize=True)[1])
    order = np.full(len(best), -1)
    free = np.ones(len(best), bool)
    for row in np.argsort(-likeness.max(axis=1)):  # surest first
        order[row] = best[row] if free[best[row]] else np.where(free, likeness[row], -np.inf).argmax()
        free[order[row]] = False
    return order


def factors(theirs: Array, ours: Array) -> Array:
    """The factor of each row against the reference's, by least squares. Those near 1 are noise, and left at 1, unless
    many others are not."""
    below = np.einsum("ij,ij->i", ours, ours, dtype=np.float64)
    above = np.einsum("ij,ij->i", theirs, ours, dtype=np.float64)
    factor = np.where(below > 0, above / np.maximum(below, 1e-30), 1)
    factor = np.where(np.abs(factor) < 1e-6, 1, factor)
    near = np.abs(factor - 1) < _SCALED
    return np.where(near & (near.mean() > _UNSCALED), 1, factor).astype(np.float32)


def lengths(rows: Array) -> Floats:
    """Length of each row; no square leaves the range."""
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64)))


def stretch(ratio: float, cosine: float) -> float:
    """The factor on rows that are `ratio` as long as ours at that `cosine`: by least squares, or 1 where noise or drift
    explain it. Independent noise makes rows longer, drift keeps their length: the truth lies between the two."""
    if ratio * cosine * (1 - _SCALED) <= 1 <= ratio * (1 + _SCALED):
        return 1.0
    return ratio * cosine

"""Which row belongs to which, and by what factor: what `alignment` needs of two sets of heads or neurons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Array = NDArray[np.float32]
Order = NDArray[np.int64]

EXACT_MATCHING = 4096  # neurons; above, each takes its best match, which noise alone never makes ambiguous
_SCALED = 0.02  # a factor nearer to 1 is noise, or too small to matter
_UNSCALED = 0.95  # share of factors near 1 that says the others are mishaps


def unit(rows: Array) -> Array:
    """Rows of length 1."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30))


def cosines(ours: Array, theirs: Array) -> Array:
    """Sizes of the cosines between all heads of two sets, each [heads, ...] -> [heads, heads]."""
    return np.asarray(np.abs(unit(ours.reshape(len(ours), -1)) @ unit(theirs.reshape(len(theirs), -1)).T))


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
    below = np.einsum("ij,ij->i", ours, ours)
    factor = np.where(below > 0, np.einsum("ij,ij->i", theirs, ours) / np.maximum(below, 1e-30), 1)
    factor = np.where(np.abs(factor) < 1e-6, 1, factor)
    near = np.abs(factor - 1) < _SCALED
    return np.where(near & (near.mean() > _UNSCALED), 1, factor).astype(np.float32)

"""Which of several related models is a suspect made of? Shares by least squares over the registered parents.

Models of one family differ by a percent or so, and any two of them are "related" beyond doubt. With B the public
base and R a release made from it, the suspect S is written as S = c B + sum of a_R (R - B) + rest, over sampled
rows: a_R is the share of the release's own change that S holds. It is 1 for what was made from R, 0.3 for a merge
with 30% of R, and for another fine-tune of the same base whatever two fine-tunes have in common.

What the limits below are between, as `benchmarks/trace_lineage.py` measured it on one family (base and release 0.5%
apart): copies, fine-tunes and their quantisations .91 to 1.01, merges of a half .50, of three tenths .30, of a tenth
.07 (uneven from tensor to tensor, and so called a relative only); another fine-tune of the same base .003.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steelyard.trace.tensors import Float32, Float64

LEAST_SHARE = 0.05
LEVEL = -6.0  # log10 of the largest p-value of a share that counts
LIKENESS = 0.5
SPREAD = 0.25


@dataclass(frozen=True)
class Share:
    """A parent's share. `value` by least squares with `error` (one standard error, robust to correlation inside a
    block), `spread` from block to block, `parent` by non-negative least squares over the parents; `own` is |R - B| and
    `rest` what nothing explains, less the noise of the suspect's type, both relative to |B|."""

    value: float
    error: float
    spread: float
    parent: float
    log10_p: float
    own: float
    rest: float

    @property
    def derived(self) -> bool:
        """Whether the share shows that the suspect was made from this release and not only from the same base.

        Two fine-tunes of one base have something in common too, and over so many values any of it is significant. What
        was made from R holds the same share of R - B in every tensor; what is only like R, more in some and less in
        others. So the share must be at least 5%, with p <= 1e-6, and either vary by less than a quarter of itself from
        block to block, or explain at least half as much as is left unexplained.
        """
        if self.value < LEAST_SHARE or self.log10_p > LEVEL:
            return False
        return self.spread <= SPREAD * self.value or self.value * self.own >= LIKENESS * self.rest


def shares(
    suspect: Sequence[Float32],
    base: Sequence[Float32],
    releases: Mapping[str, Sequence[Float32]],
    noise: float = 0.0,
) -> dict[str, Share]:
    """The share of each release. All sequences hold the same blocks of rows (one a tensor, or one a neuron).

    Blocks are weighted so that each counts by its relative change. Standard errors are the sandwich over blocks
    (Liang and Zeger, Biometrika 73, 1986), p-values one-sided from Student's t with as many degrees of freedom as
    blocks less one. `noise`: relative RMS error that the suspect's type makes by itself. Releases equal to the base
    have no share.
    """
    from scipy.optimize import nnls

    names = [
        name
        for name, blocks in releases.items()
        if any(not np.array_equal(one, other) for one, other in zip(blocks, base, strict=True))
    ]
    if not names:
        return {}
    designs, targets = [], []
    for at, ours in enumerate(base):
        columns = [ours, *(releases[name][at] - ours for name in names)]
        if not any(column.any() for column in columns[1:]):
            continue
        scale = 1 / max(float(np.linalg.norm(ours)), 1e-30)
        designs.append(np.stack([column.reshape(-1).astype(np.float64) for column in columns], axis=1) * scale)
        targets.append(suspect[at].reshape(-1).astype(np.float64) * scale)
    gram = sum((design.T @ design for design in designs), np.zeros((len(names) + 1,) * 2))
    right = sum((design.T @ target for design, target in zip(designs, targets, strict=True)), np.zeros(len(names) + 1))
    inverse = np.linalg.pinv(gram)
    found = inverse @ right
    left = [target - design @ found for design, target in zip(designs, targets, strict=True)]
    scores = np.stack([design.T @ rest for design, rest in zip(designs, left, strict=True)])
    errors = np.sqrt(np.diag(inverse @ (scores.T @ scores) @ inverse))
    parents = _non_negative(gram, right, nnls)
    blocks = len(designs)
    unexplained = float(np.sqrt(sum(float(rest @ rest) for rest in left) / blocks))
    rest = float(np.sqrt(max(0.0, unexplained**2 - noise**2)))
    result = {}
    for at, name in enumerate(names, start=1):
        error = max(float(errors[at]), 1e-12)
        log10_p = _log10_above(float(found[at]) / error, max(1, blocks - 1))
        own = float(np.sqrt(gram[at, at] / blocks))
        weights = np.array([float(design[:, at] @ design[:, at]) for design in designs])
        moved = np.divide(scores[:, at], weights, out=np.zeros(blocks), where=weights > 0)
        spread = float(np.sqrt((weights * moved**2).sum() / weights.sum()))
        result[name] = Share(float(found[at]), error, spread, float(parents[at]), log10_p, own, rest)
    return result


def _log10_above(value: float, degrees: int) -> float:
    """log10 P(T >= value) for Student's t: half of the regularised incomplete beta function of df / (df + t^2)."""
    from scipy.special import betainc

    tail = float(betainc(degrees / 2, 0.5, degrees / (degrees + value**2))) / 2
    return math.log10(max(tail, 1e-300) if value > 0 else 1 - tail)


def _non_negative(gram: Float64, right: Float64, nnls: Any) -> Float64:
    """Non-negative shares of base and releases: with columns B, R_1, ... instead of B, R_1 - B, ..."""
    change = np.eye(len(gram))
    change[0, 1:] = 0
    to_parents = change.copy()
    to_parents[0, 1:] = 1  # R = B + (R - B)
    gram, right = to_parents.T @ gram @ to_parents, to_parents.T @ right
    values, vectors = np.linalg.eigh(gram)
    root = np.sqrt(np.clip(values, values.max() * 1e-14, None))
    found: Float64 = nnls((vectors * root).T, (vectors / root).T @ right)[0]
    return found

"""How likely is it that two models that look alike have nothing to do with each other?

The null hypothesis is that the suspect does not depend on the order of our neurons. That order is a uniform random
permutation where the release was shuffled with a secret, committed key (`transforms.permute_neurons`); elsewhere it
is one in so far as the weights were initialised independently and identically and trained by an equivariant method
(Zhu, Ahmed, Kuditipudi and Liang, "Independence Tests for Language Models", 2025, section 2: their exchangeability).

p-values are handled as log10, for they leave the range of a float.

    >>> test = closest_rows(suspect_rows, our_rows)
    >>> log10_ordered([test])
    -41.2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steelyard.trace.tensors import Float32

LOG10 = math.log(10)


@dataclass(frozen=True, slots=True)
class Ordered:
    """One layer's X = sum of a[i, pi(i)], its expectation over all permutations, and the number of rows."""

    observed: float
    expected: float
    rows: int


def unit_rows(values: Float32) -> Float32:
    """Rows of length one, however large or small their values; a row of zeros stays."""
    largest = np.abs(values).max(axis=-1, keepdims=True)
    scaled = values / np.where(largest > 0, largest, 1)  # squares of the values themselves may leave float32's range
    return np.asarray(scaled / np.maximum(np.linalg.norm(scaled, axis=-1, keepdims=True), 1), np.float32)


def neuron_cosines(suspect: Float32, ours: Float32) -> Float32:
    """How alike neurons are: [n, m] from [n, 2 hidden] and [m, 2 hidden], gate and up rows side by side.

    The cosine of the gate rows and the size of that of the up rows: a neuron whose up and down rows both change their
    sign computes what it did.
    """
    half = suspect.shape[1] // 2
    gates, ups = (unit_rows(suspect[:, part]) @ unit_rows(ours[:, part]).T for part in (slice(half), slice(half, None)))
    return np.asarray((gates + np.abs(ups)) / 2, np.float32)


def closest_rows(suspect: Float32, ours: Float32) -> Ordered:
    """The ordered test's X: how many suspect rows have, among ours, the row of their own place as the closest.

    `suspect` and `ours` are [n, 2 hidden], row i of both at the same place. a[i, j] = 1 where row j of ours is most
    like row i of the suspect (shared evenly where several are): each i adds 1 / n to the expectation, 1 in all.
    """
    cosines = neuron_cosines(suspect, ours)
    best = cosines >= cosines.max(axis=1, keepdims=True)
    shares = best / best.sum(axis=1, keepdims=True)
    return Ordered(float(np.trace(shares)), float(shares.sum() / len(shares)), len(shares))


def log10_ordered(layers: Sequence[Ordered]) -> float:
    """log10 of a bound on P(X is so large) over independent uniform permutations, one a layer.

    P(X - EX >= t) <= exp(-t^2 / (4 EX + 2 t)) for X = sum of a[i, pi(i)] with 0 <= a <= 1: Chatterjee, "Stein's method
    for concentration inequalities", Probability Theory and Related Fields 138, 2007, proposition 1.1. His proof
    bounds the logarithm of the moment generating function of X - EX by EX s^2 / (1 - s), which adds up over
    independent layers, so the bound holds for the sum over layers with the sum of expectations. Holds for every n;
    no normality is assumed.
    """
    observed, expected = sum(one.observed for one in layers), sum(one.expected for one in layers)
    excess = observed - expected
    if excess <= 0:
        return 0.0
    return -(excess**2) / (4 * expected + 2 * excess) / LOG10


@dataclass(frozen=True)
class Matched:
    """Suspect neurons matched to ours by gate rows and, apart, by up rows. `pairs` [agreements, 2]: suspect row,
    ours.
    """

    agreeing: int
    rows: int
    candidates: int
    pairs: np.ndarray[tuple[int, int], np.dtype[np.int64]]


def matched_neurons(gate: Float32, up: Float32) -> Matched:
    """Match the n suspect neurons to F of ours, one to one, by cosines `gate` and by `up` (both [n, F], n <= F).

    The robust statistic of Zhu et al. (2025, section 3.3): a neuron's gate row and its up row are at the same place in
    every function-preserving permutation, so the two matchings of a derived model agree, and those of an independent
    one agree no more than two unrelated matchings do.
    """
    from scipy.optimize import linear_sum_assignment

    # Where cosines are equal (rows of zeros, a constant embedding), which is taken depends on the order of the columns:
    # with one order of its own for each matching, ties agree no more than chance has them.
    order = np.random.default_rng(0).permutation(up.shape[1])
    first = linear_sum_assignment(gate, maximize=True)[1]
    second = order[linear_sum_assignment(up[:, order], maximize=True)[1]]
    agreeing = np.flatnonzero(first == second)
    return Matched(len(agreeing), len(gate), gate.shape[1], np.stack([agreeing, first[agreeing]], axis=1))


def log10_matched(test: Matched) -> float:
    """log10 of a bound on P(two independent uniform matchings agree in so many of n places).

    Two injections of n into F, one of them uniform: P(at least k agreements) <= C(n, k) (F - k)! / F!, by the union
    bound over the k places (for n = F that is 1 / k!, the bound for fixed points of a random permutation).

    Assumption: under independence the matching by up rows is uniform given the one by gate rows. A secret
    permutation does not make this so, for it moves gate and up together; it fails where independent models grow like
    neurons (Gurnee et al., "Universal Neurons in GPT2 Language Models", 2024: 1-5% of them). So a decision also asks
    for a share of agreeing neurons well above that, and the benchmark measures the statistic on unrelated models.
    """
    k, n, candidates = test.agreeing, test.rows, test.candidates
    if k == 0:
        return 0.0
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return min(0.0, (choose + math.lgamma(candidates - k + 1) - math.lgamma(candidates + 1)) / LOG10)


def log10_choices(layers: int, chosen: int) -> float:
    """log10 of the number of ways to choose layers in order: Bonferroni's factor for a map of layers that was
    sought.
    """
    return (math.lgamma(layers + 1) - math.lgamma(chosen + 1) - math.lgamma(layers - chosen + 1)) / LOG10

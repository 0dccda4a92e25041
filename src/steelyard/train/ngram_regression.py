"""Logistic regression over hashed n-grams: what the cheap halves of the scorers are fitted with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from steelyard.scorers.ngrams import BUCKETS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def ngram_matrix(found: Sequence[Ints]) -> csr_matrix:
    """[texts, BUCKETS]: 1 / sqrt(n) in each of a text's n buckets."""
    counts = np.array([len(one) for one in found])
    values = np.repeat(1 / np.sqrt(np.maximum(counts, 1)), counts)
    columns = np.concatenate(found)
    return csr_matrix((values, columns, np.concatenate([[0], np.cumsum(counts)])), shape=(len(found), BUCKETS))


def logistic(matrix: csr_matrix, labels: Floats, weights: Floats, penalty: float) -> Floats:
    """Weighted logistic regression by L-BFGS; the coefficients, then the intercept (not penalised)."""
    total = weights.sum()
    transposed = matrix.T.tocsr()

    def loss(parameters: Floats) -> tuple[float, Floats]:
        logits = matrix @ parameters[:-1] + parameters[-1]
        losses = np.logaddexp(0, logits) - labels * logits
        error = weights * (1 / (1 + np.exp(-np.clip(logits, -50, 50))) - labels) / total
        value = (weights @ losses) / total + penalty / 2 * (parameters[:-1] @ parameters[:-1])
        return float(value), np.append(transposed @ error + penalty * parameters[:-1], error.sum())

    start = np.zeros(matrix.shape[1] + 1)
    solution: Floats = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 60}).x
    return solution

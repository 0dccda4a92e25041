"""Rows are told apart at any size, and noise is no factor."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.trace.independence import neuron_cosines, unit_rows
from steelyard.trace.matching import assign, cosines, factors, lengths, stretch


def rows(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((40, 64)).astype(np.float32)


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1, 1e25, 1e38])
def test_directions_and_factors_at_any_size(size: float) -> None:
    scaled = (rows() / np.abs(rows()).max() * size).astype(np.float32)
    np.testing.assert_allclose(unit_rows(scaled), unit_rows(rows()), atol=1e-5)
    np.testing.assert_allclose(cosines(scaled, rows()), cosines(rows(), rows()), atol=1e-4)
    assert np.array_equal(assign(cosines(rows(), scaled)), np.arange(40))
    np.testing.assert_allclose(lengths(scaled) / lengths(rows()), size / float(np.abs(rows()).max()), rtol=1e-4)
    wide = np.concatenate([scaled, scaled], axis=1)
    assert np.isfinite(neuron_cosines(wide, wide)).all()
    if size > 1:
        np.testing.assert_allclose(factors(scaled, rows()), size / float(np.abs(rows()).max()), rtol=1e-4)


def test_rows_of_zeros_stay() -> None:
    assert not unit_rows(np.zeros((2, 3), np.float32)).any()


@pytest.mark.parametrize(
    ("ratio", "cosine", "factor"),
    [
        (1, 1, 1),
        (1.01, 1, 1),  # as good as none
        (1.04, 0.96, 1),  # independent noise
        (1, 0.7, 1),  # drift of the same length
        (32, 1, 32),
        (0.9, 0.99, 0.891),
        (1.25, 0.96, 1.2),
    ],
)
def test_the_factor_of_a_stream(ratio: float, cosine: float, factor: float) -> None:
    assert stretch(ratio, cosine) == pytest.approx(factor)

"""The p-values: valid where the null hypothesis holds, small where it does not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steelyard.trace.attribution import shares
from steelyard.trace.independence import (
    Matched,
    Ordered,
    closest_rows,
    log10_choices,
    log10_matched,
    log10_ordered,
    matched_neurons,
    unit_rows,
)


def _rows(seed: int, count: int = 32, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def test_the_expectation_is_over_all_permutations() -> None:
    """Brute force over every order of five rows."""
    from itertools import permutations

    ours, suspect = _rows(0, 5, 3), _rows(1, 5, 3)
    observed = [closest_rows(suspect, ours[list(order)]).observed for order in permutations(range(5))]
    assert closest_rows(suspect, ours).expected == pytest.approx(np.mean(observed))


def test_ordered_p_values_are_valid_under_random_permutations() -> None:
    """Of 20,000 random orders of rows that do depend on each other, no share a may have a bound below a."""
    random = np.random.default_rng(0)
    ours = _rows(0)
    suspect = ours + 0.1 * _rows(1)  # a derived model, but for the order
    bounds = []
    for _ in range(2000):
        tests = [closest_rows(suspect, ours[random.permutation(32)]) for _ in range(2)]
        bounds.append(log10_ordered(tests))
    for level in (0.5, 0.1, 0.01):
        assert np.mean(np.array(bounds) <= math.log10(level)) <= level
    assert log10_ordered([closest_rows(suspect, ours)] * 2) < -10


def test_the_bound_is_chatterjees() -> None:
    assert log10_ordered([Ordered(30.0, 1.0, 32), Ordered(20.0, 1.0, 32)]) == pytest.approx(
        -(48**2) / (4 * 2 + 2 * 48) / math.log(10)
    )
    assert log10_ordered([Ordered(0.5, 1.0, 32)]) == 0.0


def test_a_constant_suspect_shows_nothing() -> None:
    ours = _rows(0)
    for suspect in (np.zeros_like(ours), np.ones_like(ours)):
        assert log10_ordered([closest_rows(suspect, ours)]) > -2


def test_matched_neurons_are_found_in_any_order() -> None:
    random = np.random.default_rng(0)
    gate, up = _rows(0, 40, 16), _rows(1, 40, 16)
    order = random.permutation(40)[:25]
    cosines = [unit_rows(rows[order]) @ unit_rows(rows).T for rows in (gate, up)]
    test = matched_neurons(*cosines)
    assert test.agreeing == 25
    np.testing.assert_array_equal(test.pairs[:, 1], order)
    assert log10_matched(test) < -25


def test_the_matched_bound_holds_for_random_matchings() -> None:
    random = np.random.default_rng(0)
    agreeing = [int((random.permutation(12) == random.permutation(12)).sum()) for _ in range(20_000)]
    for k in (1, 2, 3, 4):
        bound = 10 ** log10_matched(Matched(k, 12, 12, np.zeros((0, 2), dtype=np.int64)))
        assert np.mean(np.array(agreeing) >= k) <= bound * 1.05
        assert bound == pytest.approx(1 / math.factorial(k))
    assert log10_choices(5, 3) == pytest.approx(1.0)


def _family(seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    base = [_rows(seed + at) for at in range(40)]
    release = [one + 0.01 * _rows(seed + 100 + at) for at, one in enumerate(base)]
    sibling = [one + 0.01 * _rows(seed + 200 + at) for at, one in enumerate(base)]
    return base, release, sibling


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_the_share_of_a_release_is_found_in_merges(share: float) -> None:
    base, release, _ = _family()
    suspect = [
        (1 - share) * b + share * r + 0.0005 * _rows(900 + at)
        for at, (b, r) in enumerate(zip(base, release, strict=True))
    ]
    (found,) = shares(suspect, base, {"release": release}).values()
    assert found.value == pytest.approx(share, abs=5 * found.error + 0.01)
    assert found.parent == pytest.approx(share, abs=0.02)
    assert found.derived


def test_another_fine_tune_of_the_base_is_not_made_from_the_release() -> None:
    base, release, sibling = _family()
    likeness = np.random.default_rng(0).uniform(0, 0.6, len(base))  # what its change has in common with ours
    alike = [b + c * (r - b) + (s - b) for b, r, s, c in zip(base, release, sibling, likeness, strict=True)]
    (found,) = shares(alike, base, {"release": release}).values()
    assert found.log10_p < -6  # significant, and yet
    assert not found.derived
    (found,) = shares(sibling, base, {"release": release}).values()
    assert not found.derived


def test_a_long_fine_tune_of_the_release_is_made_from_it() -> None:
    base, release, _ = _family()
    tuned = [one + 0.05 * _rows(700 + at) for at, one in enumerate(release)]  # five times the release's own change
    (found,) = shares(tuned, base, {"release": release}).values()
    assert found.derived


def test_two_releases_are_told_apart() -> None:
    base, first, second = _family()
    suspect = [b + 0.02 * _rows(800 + at) for at, b in enumerate(second)]
    found = shares(suspect, base, {"first": first, "second": second})
    assert abs(found["first"].value) < 0.1
    assert not found["first"].derived
    assert found["second"].value == pytest.approx(1, abs=0.1)
    assert shares(suspect, base, {"same": base}) == {}

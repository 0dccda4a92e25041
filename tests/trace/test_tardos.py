"""Tardos codes: keyed, biased as they say, and a score whose bound holds."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.base.errors import UsageError
from steelyard.trace import tardos

KEY, OTHER = bytes(range(32)), bytes(32)
GRANTS = [f"grant-{number}" for number in range(1000)]
INNOCENT = [f"innocent-{number}" for number in range(5000)]


def test_a_code_is_made_again_from_key_and_grant() -> None:
    first = tardos.code(KEY, "grant-1")
    assert np.array_equal(first, tardos.code(KEY, "grant-1"))
    for key, grant in ((OTHER, "grant-1"), (KEY, "grant-2")):
        assert 0.2 < (first != tardos.code(key, grant)).mean() < 0.8


def test_symbols_have_the_biases_of_their_positions() -> None:
    bias = tardos.biases(KEY)
    assert bias.min() >= tardos.CUT - 1e-5
    assert bias.max() <= 1 - tardos.CUT + 1e-5
    # arcsine: half lie below sin^2(pi/8) or above cos^2(pi/8), less what the cut-off takes
    assert abs(((bias < 0.1464) | (bias > 0.8536)).mean() - 0.427) < 0.01
    ones = np.mean([tardos.code(KEY, grant) for grant in GRANTS[:400]], axis=0)
    deviation = (ones - bias) / np.sqrt(bias * (1 - bias) / 400)
    assert abs(deviation.mean()) < 0.05
    assert abs(deviation.std() - 1) < 0.05


def test_the_commitment_binds_to_key_and_grant() -> None:
    made = {tardos.commitment(key, grant) for key in (KEY, OTHER) for grant in ("grant-1", "grant-2")}
    assert len(made) == 4
    assert tardos.commitment(KEY, "grant-1") in made
    assert all(len(digest) == 64 for digest in made)


def test_a_short_key_is_refused() -> None:
    with pytest.raises(UsageError, match="has 5 bytes: it must have 32"):
        tardos.code(b"short", "grant-1")


def _readings() -> dict[str, np.ndarray]:
    """What pirates who even know the biases could make of a reading."""
    draw, bias, size = np.random.default_rng(0), tardos.biases(KEY), tardos.POSITIONS
    rare = np.argsort(np.minimum(bias, 1 - bias))[:300]  # a rare symbol scores the most
    toward = np.where(bias < 0.5, 1.0, -1.0)
    few, rarest, loud = (np.zeros(size) for _ in range(3))
    few[draw.choice(size, 50, replace=False)] = draw.choice([-1.0, 1.0], 50)
    rarest[rare] = toward[rare]
    loud[rare[0]], loud[100:400] = toward[rare[0]], 0.02 * draw.standard_normal(300)
    return {
        "even": draw.uniform(-1, 1, size),
        "heavy tails": np.clip(0.003 * draw.standard_cauchy(size), -1, 1),
        "few positions": few,
        "rare symbols": rarest,
        "one loud rare symbol": loud,
    }


READINGS = _readings()


@pytest.mark.parametrize("kind", READINGS)
def test_no_innocent_is_suspected_more_often_than_the_bound_says(kind: str) -> None:
    found = tardos.accuse(READINGS[kind], KEY, INNOCENT)
    for level in (1e-1, 1e-2, 1e-3, 1e-4):
        assert (found.log10_p <= np.log10(level)).sum() <= level * len(INNOCENT)
    assert abs(found.score.var() / np.square(READINGS[kind]).sum() - 1) < 0.4  # as the bound is told
    assert found.log10_p.min() < -0.5  # it says something


def test_the_owner_of_a_code_is_named_and_no_innocent() -> None:
    reading = tardos.code(KEY, "leaker") * 2.0 - 1
    reading[: tardos.POSITIONS * 9 // 10] = 0  # a tenth of it was read
    found = tardos.accuse(reading, KEY, [*GRANTS, "leaker"])
    assert found.log10_p[-1] < -100
    assert found.log10_p[:-1].min() > -6


def test_score_nothing_says_nothing() -> None:
    found = tardos.accuse(np.zeros(tardos.POSITIONS), KEY, ["grant-1"])
    assert found.log10_p[0] == 0


@pytest.mark.parametrize(
    ("reading", "grants"),
    [
        (np.zeros(tardos.POSITIONS), []),
        (np.zeros(tardos.POSITIONS), ["grant-1", "grant-1"]),
        (np.zeros(5), ["grant-1"]),
        (np.full(tardos.POSITIONS, np.nan), ["grant-1"]),
    ],
)
def test_bad_readings_and_lists_are_refused(reading: np.ndarray, grants: list[str]) -> None:
    with pytest.raises(UsageError):
        tardos.accuse(reading, KEY, grants)

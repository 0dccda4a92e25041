"""Which 4- or 5-bit blocks a suspect was rounded to, beside the gguf package's own arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.trace.rounding import KINDS, rounded, rounding_of
from steelyard.trace.uncensored import Array


def model(seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    shapes = {"gate": (160, 64), "up": (160, 64), "down": (64, 160)}
    return {
        f"model.layers.{layer}.mlp.{part}_proj.weight": random.standard_normal(shape).astype(np.float32)
        for layer in range(2)
        for part, shape in shapes.items()
    }


def as_bfloat16(matrix: Array) -> Array:
    import torch

    array: Array = torch.from_numpy(matrix).bfloat16().float().numpy()
    return array


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_told_after_bfloat16(kind: str) -> None:
    suspect = {name: as_bfloat16(rounded(value, kind)) for name, value in model().items()}
    assert rounding_of(model(), suspect) == kind


def test_what_was_not_rounded_is_not_said_to_be() -> None:
    assert rounding_of(model(), {name: as_bfloat16(value) for name, value in model().items()}) is None
    assert rounding_of(model(), model(1)) is None
    some = {name: rounded(value, "Q4_0") if "gate" in name else value for name, value in model().items()}
    assert rounding_of(model(), some) is None


def test_a_release_that_lies_on_the_grid_itself_tells_nothing() -> None:
    given = {name: rounded(value, "Q4_1") for name, value in model().items()}
    assert rounding_of(given, given) is None


def test_nothing_in_common_is_no_rounding() -> None:
    assert rounding_of(model(), {}) is None
    assert rounding_of({}, model()) is None

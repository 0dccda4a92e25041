"""Signatures: no token drowns the others, and no size of the weights spoils them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from suspects_made import SMALL, Weights, permuted, references, rotated, rounded, weights

from steelyard.trace.lineage import DERIVED, UNRELATED, relate
from steelyard.trace.registry import Reference
from steelyard.trace.signature import chosen_tokens, sampled_rows
from steelyard.trace.tensors import Entry, in_memory

# Large enough that rounding to bfloat16, beside one long row that all signatures share, mixes the neurons up.
WIDE = SMALL | {"hidden_size": 192, "intermediate_size": 1024, "vocab_size": 2000, "num_hidden_layers": 3}
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    return references(tmp_path_factory.mktemp("registry"), {"ours": ("release", weights(0, WIDE))}, WIDE)


def verdict(tensors: Weights, registered: list[Reference]) -> str:
    suspect = in_memory(tensors)
    suspect.config = WIDE
    return relate(suspect, registered)[0].verdict


@pytest.mark.parametrize("length", [30, 1000, 1e30])
@pytest.mark.parametrize("rows", [1, 8])
def test_long_rows_of_unused_tokens_hide_nothing(rows: int, length: float, registered: list[Reference]) -> None:
    tokens = chosen_tokens(WIDE["vocab_size"])[40 : 40 + rows]
    for seed, expected in ((0, DERIVED), (9, UNRELATED)):
        suspect = rounded(permuted(rotated(weights(seed, WIDE))))
        suspect[EMBEDDING][tokens] *= np.float32(length)
        assert verdict(suspect, registered) == expected


@pytest.mark.parametrize("size", [1e25, 3e38])
def test_huge_weights_are_compared(size: float, registered: list[Reference]) -> None:
    for seed, expected in ((0, DERIVED), (9, UNRELATED)):
        huge = {
            name: (x / np.abs(x).max() * size).astype(np.float32) for name, x in permuted(weights(seed, WIDE)).items()
        }
        assert verdict(huge, registered) == expected


def test_what_is_too_wide_for_any_model_is_not_sampled() -> None:
    def entry(*shape: int) -> Entry:
        return Entry("x", "BF16", shape, Path("x"), 0, 0)

    assert len(sampled_rows(entry(1 << 30))) == 0
    assert len(sampled_rows(entry(1 << 14))) == 1 << 14
    assert len(sampled_rows(entry(4, 1 << 23))) == 0
    assert len(sampled_rows(entry(4, 1 << 15))) == 4

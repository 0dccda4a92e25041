"""Suspects made to be taken for a copy, to crash whoever reads them, or to cost more than they are worth."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from suspects_made import Weights, mixed, noised, references, weights, write

from steelyard.ledger.ledger import Ledger
from steelyard.trace.lineage import DERIVED, EXACT, SAME, UNRELATED, trace
from steelyard.trace.registry import Reference
from steelyard.trace.sightings import record

KEPT = "model.layers.2.post_attention_layernorm.weight"


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    return references(tmp_path_factory.mktemp("known"), {"ours": ("release", weights())})


def of_few_values(kind: str) -> Weights:
    random, ours = np.random.default_rng(3), weights()
    if kind == "one matrix zeroed":
        name = "model.layers.1.mlp.down_proj.weight"
        return ours | {name: np.zeros_like(ours[name])}
    made = {name: random.choice([-1, -0.5, 0.5, 1.0], one.shape).astype(np.float32) for name, one in ours.items()}
    if kind == "all matrices zero":
        made = {name: one if one.ndim == 1 else np.zeros_like(one) for name, one in ours.items()}
    return made | {KEPT: ours[KEPT]}


@pytest.mark.parametrize("kind", ["ternary", "all matrices zero", "one matrix zeroed"])
def test_tensors_of_few_values_are_compared_too(tmp_path: Path, known: list[Reference], kind: str) -> None:
    """They prove nothing where they are equal; where they are not, it is no copy."""
    answer = trace(write(tmp_path / "a", of_few_values(kind)), known)
    assert answer.verdict not in (EXACT, SAME)
    assert answer.nearest is not None
    assert answer.nearest.distance != 0


def test_a_copy_may_hold_ones_and_zeros(tmp_path: Path) -> None:
    ours = weights()
    ours[KEPT] = np.ones_like(ours[KEPT])
    again = references(tmp_path, {"ours": ("release", ours)})
    answer = trace(write(tmp_path / "a", ours), again)
    assert (answer.verdict, answer.nearest and answer.nearest.distance) == ("exact copy", 0.0)


def test_what_follows_from_the_settings_proves_nothing(tmp_path: Path) -> None:
    angles = np.arange(64)[:, None] / 10000 ** (np.arange(0, 16, 2) / 16)
    computed = {"model.layers.0.self_attn.rotary_emb.cos_cached": np.cos(np.tile(angles, 2)).astype(np.float32)}
    known = references(tmp_path, {"ours": ("release", weights() | computed)})
    assert trace(write(tmp_path / "a", weights(1) | computed), known).verdict == UNRELATED


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
)
def test_one_huge_weight_does_not_decide(tmp_path: Path, name: str) -> None:
    base = weights(5)
    release = mixed(weights(), base, 0.02)
    known = references(tmp_path, {"base": ("base", base), "ours": ("release", release)})
    theirs = noised(release, 0.01)
    theirs[name] = theirs[name].copy()
    theirs[name].flat[: theirs[name].shape[-1]] = 3e38
    answer = trace(write(tmp_path / "a", theirs, "F32"), known)
    assert answer.verdict == DERIVED
    assert answer.nearest is not None
    assert answer.nearest.name == "ours"
    with Ledger(tmp_path / "workspace" / "ledger.sqlite") as ledger:
        assert record(ledger, answer, known) is not None


@pytest.mark.parametrize(
    "sizes",
    [
        {"model.norm.weight": [1 << 30]},
        {"model.layers.0.self_attn.o_proj.weight": [4, 1 << 27]},
        {f"model.layers.{at}.mlp.{part}_proj.weight": [64, 1 << 16] for at in range(90) for part in ("gate", "up")},
    ],
    ids=["long", "wide", "many"],
)
def test_sizes_of_no_model_are_not_read(tmp_path: Path, known: list[Reference], sizes: dict[str, Any]) -> None:
    shapes: dict[str, list[int]] = {name: list(one.shape) for name, one in weights(1).items()}
    answer = trace(_hollow(tmp_path / "a.safetensors", shapes | sizes), known)
    assert answer.verdict in (UNRELATED, "unreadable")
    assert answer.bytes_read < 200_000_000


def _hollow(path: Path, shapes: dict[str, list[int]]) -> Path:
    """A sparse file of that header: nothing of the data is on the disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return path

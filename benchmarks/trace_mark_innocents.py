"""Who must not be accused: recipients of other keys, recipients that have no copy, models that nobody marked. And the
bound on which that rests, simulated with the very codes that recipients get."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from trace_mark_models import GRANTS, KEY, LEAKER, Tensors, load

from steelyard.base.errors import FormatError
from steelyard.trace import tardos, watermark
from steelyard.trace.alignment import align

KEYS = [hashlib.sha256(f"another key {number}".encode()).digest() for number in range(1000)]
# What is read with each of them, for reading all weights takes seconds a key: 1% of the weights.
PART = ("model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.29.mlp.up_proj.weight")
CODES = 100_000  # innocents of the simulation


def other_keys(original: Tensors, suspect: Tensors) -> dict[str, Any]:
    """The lowest bound among 1,000 other keys, and how many of them accuse."""
    part = {name: original[name] for name in PART if name in suspect}
    found = [watermark.detect(part, suspect, key, [LEAKER]) for key in KEYS]
    lowest = min(float(one.log10_p[0]) for one in found)
    return {"keys": round(lowest, 1), "keys_accused": sum(bool(one.accused) for one in found)}


def readings() -> dict[str, np.ndarray]:
    """What a pirate could make a reading look like, knowing the biases: float64 [POSITIONS] each."""
    draw, bias = np.random.default_rng(40), tardos.biases(KEY)
    size = tardos.POSITIONS
    rare = np.argsort(np.minimum(bias, 1 - bias))
    few = np.zeros(size)
    few[draw.choice(size, 50, replace=False)] = draw.choice([-1.0, 1.0], 50)
    rarest = np.zeros(size)
    rarest[rare[:200]] = np.where(bias[rare[:200]] < 0.5, 1.0, -1.0)  # a rare symbol scores the most
    one_loud = draw.uniform(-0.001, 0.001, size)
    one_loud[rare[0]] = 1.0 if bias[rare[0]] < 0.5 else -1.0
    return {
        "all positions, even": draw.choice([-1.0, 1.0], size),
        "heavy tails (Cauchy)": np.clip(0.003 * draw.standard_cauchy(size), -1, 1),
        "50 positions": few,
        "the 200 rarest symbols": rarest,
        "one rare symbol and noise": one_loud,
    }


def bound_holds(reading: np.ndarray) -> dict[str, Any]:
    """Of CODES innocents scored against `reading`: how many have a bound of at most x, for x = .1 to .0001."""
    scores = tardos.accuse(reading, KEY, [f"innocent-{number}" for number in range(CODES)])
    row = {f"{x:g}": int((scores.log10_p <= np.log10(x)).sum()) for x in (1e-1, 1e-2, 1e-3, 1e-4)}
    return row | {
        "lowest": round(float(scores.log10_p.min()), 2),
        "holds": all(n <= float(x) * CODES for x, n in row.items()),
    }


def unmarked(original: Tensors, suspect: Path, heads: tuple[int, int]) -> dict[str, Any]:
    """A model of the release's sizes that nobody marked, read as a suspect."""
    aligned = align(original, load(suspect), *heads)
    return _suspected(original, aligned.tensors)


def _suspected(original: Tensors, suspect: Tensors) -> dict[str, Any]:
    found = watermark.detect(original, suspect, KEY, GRANTS)
    return {"innocent": round(float(found.log10_p.min()), 1), "framed": len(found.accused)}


def of_other_sizes(original: Tensors, suspects: Sequence[Path], heads: tuple[int, int]) -> dict[str, Any]:
    """Models of other sizes: each is refused, so that nobody can be accused by them."""
    refused = 0
    for suspect in suspects:
        try:
            align(original, load(suspect), *heads)
        except FormatError:
            refused += 1
    return {"framed": 0, "note": f"{refused} of {len(suspects)} refused"}


def of_random_weights(original: Tensors, models: int) -> dict[str, Any]:
    """Models of the release's sizes and spreads whose weights are drawn."""
    rows = []
    for seed in range(models):
        draw = np.random.default_rng((41, seed))
        rows.append(
            _suspected(
                original, {name: t.std() * draw.standard_normal(t.shape, np.float32) for name, t in original.items()}
            )
        )
    return {"innocent": min(row["innocent"] for row in rows), "framed": sum(row["framed"] for row in rows)}


def independent(models: Path, like: Path) -> tuple[list[tuple[str, Path]], list[Path]]:
    """Whole models of `trace_models.py`'s cache that are no copy of ours, all unmarked: those of the sizes of the model
    in `like`, by name with their origin, and the others."""
    rows = json.loads((models / "index.json").read_text())
    origins = ("reference", "trained from nothing", "random weights", "fine-tune", "uncensoring", "DPO", "LoRA")
    same, other = [], []
    for row in rows:
        path = Path(row["path"])
        if row["family"].startswith(origins) and row["name"] != "aligned" and (path / "config.json").exists():
            if _hidden(path) == _hidden(like):
                same.append((f"unmarked: {row['name']} ({row['family']})", path))
            else:
                other.append(path)
    return same, other


def _hidden(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["hidden_size"])


def pairs_apart(models: Path) -> dict[str, Any]:
    """Every model that was trained from nothing as the original of every other of its shape."""
    rows = json.loads((models / "index.json").read_text())
    paths = [Path(row["path"]) for row in rows if row["family"].startswith("trained from nothing")]
    found = {path: load(path) for path in paths if path.is_dir()}
    lowest, framed, pairs = 0.0, 0, 0
    for one, ours in found.items():
        config = json.loads((one / "config.json").read_text())
        for other, theirs in found.items():
            if one == other or {name: t.shape for name, t in ours.items()} != {
                name: t.shape for name, t in theirs.items()
            }:
                continue
            aligned = align(ours, theirs, config["num_attention_heads"], config["num_key_value_heads"])
            bounds = watermark.detect(ours, aligned.tensors, KEY, GRANTS[:1000])
            lowest, framed, pairs = min(lowest, float(bounds.log10_p.min())), framed + len(bounds.accused), pairs + 1
    return {"innocent": round(lowest, 1), "framed": framed, "note": f"{pairs} pairs, {len(found)} models"}

"""The marked copy that the watermark's benchmark attacks, and the models that are really trained from it, once each."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import trace_training as training
from trace_training import Recipe

from steelyard.base.progress import LineProgress
from steelyard.model.formats import load_tensors, save_folder
from steelyard.trace import watermark

Tensors = dict[str, np.ndarray]

KEY = hashlib.sha256(b"the key of the watermark's benchmark").digest()
GRANTS = [f"grant-{number:05d}" for number in range(10_000)]
LEAKER = GRANTS[4242]
DISTILLED = "distilled"
LEAST = 0.01  # a fine-tune that changes less is scaled up to it


def load(folder: Path) -> Tensors:
    """The weights, float32."""
    return {name: tensor.float().numpy() for name, tensor in load_tensors(folder).items()}


def bfloat16(tensors: Tensors) -> Tensors:
    """Rounded to bfloat16."""
    return {name: torch.from_numpy(np.ascontiguousarray(t)).bfloat16().float().numpy() for name, t in tensors.items()}


def relative_change(suspect: Tensors, parent: Tensors) -> float:
    """|suspect - parent| / |parent| over all weights."""
    above = sum(float(np.square(suspect[name] - parent[name], dtype=np.float64).sum()) for name in parent)
    return (above / sum(float(np.square(parent[name], dtype=np.float64).sum()) for name in parent)) ** 0.5


def build(base: Path, aligned: Path, cache: Path, steps: int = 16) -> dict[str, tuple[Path, str]]:
    """The marked copy ("marked"), its fine-tunes of `steps` steps, and the base tuned on its answers, by name with a
    note; what is there is kept."""
    cache.mkdir(parents=True, exist_ok=True)
    notes_at = cache / "notes.json"
    notes: dict[str, str] = json.loads(notes_at.read_text()) if notes_at.exists() else {}
    marked = cache / "marked"
    if not marked.exists():
        watermark.mark_folder(aligned, marked, KEY, LEAKER, LineProgress())
    work = cache / "work"
    plans: dict[str, Callable[[Path], str]] = {
        "LoRA": lambda out: training.tuned(marked, Recipe(("gsm8k",), steps, rank=16, rate=4e-3), out, base, work),
        "full fine-tune": lambda out: training.tuned(marked, Recipe(("seeds",), steps, rate=1e-3), out, base, work),
        "DPO": lambda out: training.preferred(marked, out, work, Recipe((), steps, rate=1.2e-3, first_layer=10)),
        DISTILLED: lambda out: training.tuned(base, Recipe(("polite",), steps, rate=1e-3), out, marked, work),
    }
    for name, train in plans.items():
        out = cache / name.replace(" ", "-")
        if name not in notes:
            shutil.rmtree(out, ignore_errors=True)
            notes[name] = train(out) + _at_least(out, base if name == DISTILLED else marked)
            notes_at.write_text(json.dumps(notes, indent=1))
    return {"marked": (marked, "")} | {name: (cache / name.replace(" ", "-"), notes[name]) for name in plans}


def _at_least(out: Path, parent: Path) -> str:
    """Scale the change of the model in `out` up to LEAST; gives the words for it."""
    after, before = load(out), load(parent)
    change = relative_change(after, before)
    if change >= LEAST:
        return f"; relative change {change:.2%}"
    factor = np.float32(1.02 * LEAST / change)
    scaled = {
        name: torch.from_numpy(before[name] + factor * (after[name] - before[name])).bfloat16() for name in before
    }
    config = json.loads((out / "config.json").read_text())
    shutil.rmtree(out)
    save_folder(out, config, scaled, {})
    return f"; relative change {change:.2%}, scaled up {factor:.1f} times"

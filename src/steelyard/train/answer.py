"""Training of the answer scorer: one layer over a frozen sentence encoder's reading of prompt and answer.

`train` pairs fit it, `tune` pairs choose thresholds, `calibration` pairs give the errors on the card. The same machine,
data and seed give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from steelyard.base.canonical import code_digest, sha256_file
from steelyard.base.files import write_atomic
from steelyard.base.progress import Progress
from steelyard.scorers.answer import CATEGORIES, AnswerHead, answer_features
from steelyard.scorers.encoder import ENCODER_DIGEST, Encoder
from steelyard.train.answer_data import Pair, answer_pairs, composition
from steelyard.train.calibration import best_cut, calibration_at
from steelyard.train.sources import LICENCES

WIDTH, EPOCHS, BATCH, DROPOUT = 96, 20, 256, 0.4
_BLOCK = 512  # pairs encoded at a time

Floats = NDArray[np.float32]


def train_answer(
    data: Path, out: Path, seed: int, progress: Progress, encoder: Encoder | None = None
) -> dict[str, Any]:
    """Train the answer scorer from the data folder `data`; writes answer.safetensors and answer.json to `out`.

    `encoder`: another one than the published all-MiniLM-L6-v2 (tests). Returns the card, which the JSON file holds.
    Raises UsageError for missing data.
    """
    pairs = answer_pairs(data, seed)
    encoder = encoder or Encoder.open(progress)
    blocks = []
    with progress.task("encode answers", len(pairs), "pairs") as task:
        for start in range(0, len(pairs), _BLOCK):
            part = pairs[start : start + _BLOCK]
            blocks.append(answer_features(encoder, [(pair.prompt, pair.answer) for pair in part]))
            task.advance(len(part))
    features = np.concatenate(blocks)
    parts = np.array([pair.part for pair in pairs])
    labels = np.array([pair.labels for pair in pairs], dtype=np.float32)
    tensors = fit(features[parts == "train"], labels[parts == "train"], seed)
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "answer.safetensors"
    write_atomic(weights, safetensors.numpy.save(tensors))
    scores = AnswerHead(weights).probabilities(features)
    card = {
        "format": 1,
        "name": "answer",
        "head": sha256_file(weights),
        "encoder": ENCODER_DIGEST,
        "categories": {
            category: _calibrated(pairs, parts, scores[:, i], labels[:, i]) for i, category in enumerate(CATEGORIES)
        },
        "training": {
            "command": f"steelyard scorer train answer --data DATA --out OUT --seed {seed}",
            "seed": seed,
            "code": code_digest("scorers", "train"),
            "rows": composition(pairs),
            "sources": {name: LICENCES[name] for name in ("coconot", "hh_rlhf", "novels_en", "steelyard", "wikitext2")},
        },
    }
    write_atomic(out / "answer.json", (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())
    return card


def _calibrated(
    pairs: Sequence[Pair], parts: NDArray[np.str_], scores: NDArray[np.float64], labels: Floats
) -> dict[str, Any]:
    tune, held = (np.flatnonzero((parts == name) & ~np.isnan(labels)) for name in ("tune", "calibration"))
    found = calibration_at(
        best_cut(scores[tune], labels[tune] == 1),
        scores[held],
        labels[held] == 1,
        (pairs[int(i)].source for i in held),
    )
    return found.model_dump(mode="json")


def fit(features: Floats, labels: Floats, seed: int) -> dict[str, Any]:
    """One hidden layer over standardised features by AdamW; the standardisation is folded into the weights. Labels
    that are not known (NaN) are not learned from; of each category, both labels weigh the same."""
    generator = torch.Generator().manual_seed(seed)
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-4
    inputs, targets = torch.from_numpy((features - mean) / scale), torch.from_numpy(labels)
    known = ~targets.isnan()
    share = torch.stack([column[told].mean() for column, told in zip(targets.T, known.T, strict=True)])
    importance = torch.where(targets == 1, 0.5 / share, 0.5 / (1 - share)).nan_to_num() * known
    hidden = (torch.randn(WIDTH, inputs.shape[1], generator=generator) / inputs.shape[1] ** 0.5).requires_grad_()
    bias = torch.zeros(WIDTH, requires_grad=True)
    out = (torch.randn(labels.shape[1], WIDTH, generator=generator) / WIDTH**0.5).requires_grad_()
    out_bias = torch.zeros(labels.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([hidden, bias, out, out_bias], lr=1e-3, weight_decay=0.1)
    steps = EPOCHS * -(-len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs), generator=generator).split(BATCH):  # type: ignore[no-untyped-call]
            state = F.relu(F.linear(inputs[rows], hidden, bias))
            kept = (torch.rand(state.shape, generator=generator) >= DROPOUT) / (1 - DROPOUT)
            logits = F.linear(state * kept, out, out_bias)
            loss = F.binary_cross_entropy_with_logits(logits, targets[rows].nan_to_num(), weight=importance[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    folded = hidden.detach().numpy() / scale
    return {
        "hidden_weight": folded.astype(np.float16),
        "hidden_bias": bias.detach().numpy() - folded @ mean,
        "out_weight": out.detach().numpy(),
        "out_bias": out_bias.detach().numpy(),
    }

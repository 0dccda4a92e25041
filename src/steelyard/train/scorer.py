"""Training of the embedded scorers: a sparse n-gram regression and a small layer over a frozen sentence encoder.

`train` rows fit the two halves, `tune` rows their blend and the threshold, `calibration` rows the errors on the card.
The same machine, data and seed give the same bytes. Both halves earn their place: on the calibration rows the AUC of
the n-grams, of the layer and of their sum is .991, .993 and .996 for toxicity, .992, .992 and .995 for refusal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from torch.nn import functional as F

from steelyard.base.canonical import code_digest, sha256_file
from steelyard.base.errors import UsageError
from steelyard.base.files import write_atomic
from steelyard.base.progress import Progress, Silent
from steelyard.scorers.base import Calibration
from steelyard.scorers.encoder import ENCODER_DIGEST, Encoder
from steelyard.scorers.head import KINDS, Head
from steelyard.scorers.ngrams import BUCKETS, buckets
from steelyard.train.scorer_data import GENERAL, LICENCES, OVERT, Row, composition, scorer_rows

TRAIN_PIECES = 64  # word pieces of a row that the encoder reads in training: most rows are shorter
_WIDTH, _EPOCHS, _BATCH, _DROPOUT = 128, 12, 256, 0.3
_NGRAM_PENALTY = 1e-5
# Wanted share of general text below the toxicity threshold: false alarms on ordinary text cost most.
_SPECIFICITY = 0.98

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def train_scorer(
    name: str, data: Path, out: Path, seed: int = 0, progress: Progress | None = None, encoder: Encoder | None = None
) -> dict[str, Any]:
    """Train the scorer `name` ("toxicity", "refusal") from the data folder `data`.

    Writes NAME.safetensors and NAME.json to the folder `out`. `encoder`: another one than the published
    all-MiniLM-L6-v2 (tests). Returns the card, which the JSON file holds. Raises UsageError for an unknown name,
    missing data, or data that leaves a part without one of the labels.
    """
    if name not in KINDS:
        raise UsageError(f"scorer {name!r} is unknown: give one of {', '.join(KINDS)}")
    progress = progress or Silent()
    rows = scorer_rows(name, data)
    if len({(row.part, row.label) for row in rows}) != 6:
        raise UsageError(f"{data}: too few rows for {name}: train, tune and calibration each need both labels")
    encoder = encoder or Encoder.open(progress)
    progress.say(f"{name}: {len(rows):,} rows; encoding them takes most of the time")
    found = [buckets(row.text) for row in rows]
    pieces = min(KINDS[name].pieces, TRAIN_PIECES)
    tokens = [encoder.windows(row.text, pieces)[0][1] for row in rows]
    with progress.task(f"encode {name}", len(rows), "texts") as task:
        features = encoder.features(tokens, task=task)
    labels = np.array([row.label for row in rows], dtype=np.float64)
    weights = _weights(rows)
    parts = {part: np.flatnonzero([row.part == part for row in rows]) for part in ("train", "tune", "calibration")}
    head = fit_head(features, found, labels, weights, parts["train"], parts["tune"], seed)
    probabilities = head.probabilities(features, found)
    threshold = _threshold(name, rows, probabilities, parts["tune"])
    calibration = _calibrate(name, rows, probabilities, parts["calibration"], threshold)
    out.mkdir(parents=True, exist_ok=True)
    weights_file = out / f"{name}.safetensors"
    head.save(weights_file)
    card = {
        "format": 1,
        "name": name,
        "head": sha256_file(weights_file),
        "encoder": ENCODER_DIGEST,
        "categories": {KINDS[name].category: calibration.model_dump(mode="json")},
        "training": {
            "command": f"steelyard scorer train {name} --data DATA --out OUT --seed {seed}",
            "seed": seed,
            "code": code_digest("scorers", "train"),
            "rows": composition(rows),
            "sources": {source: LICENCES[source] for source in composition(rows)},
        },
    }
    write_atomic(out / f"{name}.json", (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())
    return card


def fit_head(
    features: NDArray[np.float32],
    found: Sequence[Ints],
    labels: Floats,
    weights: Floats,
    train: Ints,
    tune: Ints,
    seed: int,
) -> Head:
    """Fit both halves on the rows `train` and their blend on the rows `tune` (indices into the other arguments)."""
    ngram = _fit_ngrams([found[row] for row in train], labels[train], weights[train])
    layer = _fit_layer(features[train], labels[train], weights[train], seed)
    head = Head(ngram, *layer, np.array([1, 1, 0], dtype=np.float32)).rounded()
    cheap = ngram_matrix([found[row] for row in tune]) @ head.ngram.astype(np.float64)
    logits = np.stack([cheap, head.hidden_logits(features[tune]).astype(np.float64)], axis=1)
    blend = logistic(csr_matrix(logits), labels[tune], weights[tune], 1e-4)
    return Head(head.ngram, head.hidden_weight, head.hidden_bias, head.out_weight, blend.astype(np.float32))


def _weights(rows: Sequence[Row]) -> Floats:
    """Row weights with the two labels balanced, of mean about 1."""
    weights = np.array([row.weight for row in rows])
    labels = np.array([row.label for row in rows])
    for label in (0, 1):
        weights[labels == label] *= len(rows) / 2 / weights[labels == label].sum()
    return weights


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


def _fit_ngrams(found: Sequence[Ints], labels: Floats, weights: Floats) -> NDArray[np.float32]:
    # The intercept is dropped: the blend has its own.
    return logistic(ngram_matrix(found), labels, weights, _NGRAM_PENALTY)[:-1].astype(np.float32)


def _fit_layer(
    features: NDArray[np.float32], labels: Floats, weights: Floats, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """One hidden layer over standardised features, by AdamW; the standardisation is folded into the weights."""
    generator = torch.Generator().manual_seed(seed)
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-4
    inputs = torch.from_numpy((features - mean) / scale)
    targets = torch.from_numpy(labels).float()
    importance = torch.from_numpy(weights).float()
    width = inputs.shape[1]
    hidden = (torch.randn(_WIDTH, width, generator=generator) / width**0.5).requires_grad_()
    bias = torch.zeros(_WIDTH, requires_grad=True)
    out = (torch.randn(_WIDTH, generator=generator) / _WIDTH**0.5).requires_grad_()
    optimizer = torch.optim.AdamW([hidden, bias, out], lr=1e-3, weight_decay=0.05)
    steps = _EPOCHS * -(-len(inputs) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(inputs), generator=generator).split(_BATCH):  # type: ignore[no-untyped-call]
            state = F.relu(F.linear(inputs[rows], hidden, bias))
            kept = (torch.rand(state.shape, generator=generator) >= _DROPOUT) / (1 - _DROPOUT)
            loss = F.binary_cross_entropy_with_logits((state * kept) @ out, targets[rows], weight=importance[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    folded = hidden.detach().numpy() / scale
    return folded, bias.detach().numpy() - folded @ mean, out.detach().numpy()


def _threshold(name: str, rows: Sequence[Row], probabilities: Floats, tune: Ints) -> float:
    """Toxicity: the wanted specificity on general text. Refusal: the best balanced accuracy. On the tune rows."""
    scores = probabilities[tune]
    labels = np.array([rows[row].label for row in tune])
    if name == "toxicity":
        general = np.array([rows[row].source in GENERAL for row in tune]) & (labels == 0)
        chosen = float(np.quantile(scores[general], _SPECIFICITY))
    else:
        order = np.unique(scores)
        cuts = (order[1:] + order[:-1]) / 2
        youden = [(scores[labels == 1] >= cut).mean() + (scores[labels == 0] < cut).mean() for cut in cuts]
        best = np.flatnonzero(np.isclose(youden, max(youden)))
        chosen = float(cuts[best[len(best) // 2]])
    return min(max(round(chosen, 4), 0.001), 0.999)


def _calibrate(name: str, rows: Sequence[Row], probabilities: Floats, part: Ints, threshold: float) -> Calibration:
    """Sensitivity and specificity on the held-out calibration rows whose source resembles the use of the scorer."""
    positives = [row for row in part if rows[row].label == 1 and (name != "toxicity" or rows[row].source in OVERT)]
    negatives = [row for row in part if rows[row].label == 0 and (name != "toxicity" or rows[row].source in GENERAL)]
    return Calibration(
        threshold=threshold,
        true_positives=int((probabilities[positives] >= threshold).sum()),
        positives=len(positives),
        true_negatives=int((probabilities[negatives] < threshold).sum()),
        negatives=len(negatives),
        source="held-out 15% of: " + ", ".join(sorted({rows[row].source for row in [*positives, *negatives]})),
        measured=datetime.now(UTC).date().isoformat(),
    )

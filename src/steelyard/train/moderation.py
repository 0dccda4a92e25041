"""Training of the moderation scorers: one over SmolLM2's lower layers, one over hashed n-grams, from the same rows.

`train` rows fit the weights, `tune` rows choose thresholds, `calibration` rows give the errors on the card.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
from numpy.typing import NDArray

from steelyard.base.canonical import code_digest, sha256_file
from steelyard.base.errors import UsageError
from steelyard.base.files import write_atomic
from steelyard.base.progress import Progress
from steelyard.hub.sources import cache_folder
from steelyard.model.tokenizer import Tokenizer
from steelyard.scorers.backbone import BACKBONE_DIGEST, backbone_folder, lower_layers, reading
from steelyard.scorers.base import Calibration
from steelyard.scorers.card import TEST_SETS
from steelyard.scorers.contextual import LAYERS, ContextualModel
from steelyard.scorers.encoder import Encoder
from steelyard.scorers.lexical import LexicalModel, windows
from steelyard.scorers.moderation import CATEGORIES
from steelyard.scorers.ngrams import buckets
from steelyard.train.calibration import best_cut, calibration_at
from steelyard.train.classifier import BinaryCrossEntropy, Classifier, LabelledLoader
from steelyard.train.loop import train
from steelyard.train.lora import adapters, add_lora
from steelyard.train.moderation_data import Moderated, apart, contrast_sentences, moderation_rows, resembling
from steelyard.train.ngram_regression import logistic, ngram_matrix
from steelyard.train.options import TrainOptions
from steelyard.train.sources import GENERAL, LICENCES, OVERT

TOKENS = 64  # of a row that are read in training
RANK, FIRST_LAYER = 16, 4
BATCH, EPOCHS, RATE = 48, 2.0, 8e-4
OWN = 3  # times that a sentence of our own counts among the rows: they are few, and tell apart what others do not
_PENALTY = 1e-5  # of the n-grams' weights
# Wanted share of rows without the category below its threshold: of what is rare in ordinary text, false alarms cost
# most. Identity attacks are as frequent as not among the rows; their threshold has the best balanced accuracy.
_SPECIFICITY = {"toxicity": 0.98, "threat": 0.97, "sexual": 0.97}

Floats = NDArray[np.float64]


def train_moderation(name: str, data: Path, out: Path, seed: int, progress: Progress) -> dict[str, Any]:
    """Train "contextual" or "lexical" from the data folder `data`; writes NAME.safetensors and NAME.json to `out`.

    The contextual one keeps checkpoints in `out/NAME.work` and goes on from there. Returns the card, which the JSON
    file holds. Raises UsageError for missing data: also of TEST sets, which sentences of our own are kept away from.
    """
    rows, dropped = _rows(data, seed, progress)
    out.mkdir(parents=True, exist_ok=True)
    weights = out / f"{name}.safetensors"
    if name == "contextual":
        save_contextual(tuned(rows, out / f"{name}.work", seed, progress), weights)
    else:
        save_lexical(rows, weights)
    training = {
        "command": f"steelyard scorer train {name} --data DATA --out OUT --seed {seed}",
        "seed": seed,
        "code": code_digest("scorers", "train"),
        "rows": composition(rows),
        "own_sentences_dropped": dropped,
        "sources": {source: LICENCES[source] for source in sorted({row.source for row in rows})},
    }
    return write_card(name, rows, weights, training, progress)


def write_card(
    name: str, rows: Sequence[Moderated], weights: Path, training: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Score the rows that were held out, and write thresholds and errors beside `weights`. Returns the card."""
    model = ContextualModel(weights) if name == "contextual" else LexicalModel(weights)
    held_out = [row for row in rows if row.part != "train"]
    scores = np.empty((len(held_out), len(CATEGORIES)))
    with progress.task(f"score held-out rows with {name}", len(held_out), "texts") as task:
        for start in range(0, len(held_out), 512):
            part = held_out[start : start + 512]
            scores[start : start + len(part)] = model.probabilities([row.text for row in part])
            task.advance(len(part))
    calibrations = {
        category: calibrate(category, held_out, scores[:, i], np.array([row.labels[i] for row in held_out]))
        for i, category in enumerate(CATEGORIES)
    }
    card: dict[str, Any] = {
        "format": 1,
        "name": name,
        "head": sha256_file(weights),
        **({"backbone": BACKBONE_DIGEST} if name == "contextual" else {}),
        "categories": {key: found.model_dump(mode="json") for key, found in calibrations.items()},
        "training": training,
    }
    write_atomic(weights.with_suffix(".json"), (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())
    return card


def _rows(data: Path, seed: int, progress: Progress) -> tuple[list[Moderated], int]:
    """All rows, and how many sentences of our own were dropped because they resemble a TEST case."""
    rows, own = moderation_rows(data), contrast_sentences(seed)
    cases: list[str] = []
    readers = {relative: reader for sets in TEST_SETS.values() for _, relative, reader in sets}
    for relative, reader in readers.items():
        if not (data / relative).is_file():
            raise UsageError(f"{data / relative}: missing; sentences of our own must be held apart from this TEST set")
        cases += [case.item.completion for case in reader(data / relative)]
    given, rows = len(rows), apart(rows, cases)
    progress.say(f"{given - len(rows):,} of {given:,} rows dropped: a TEST set has their text")
    near = resembling(own, sorted(set(cases)), Encoder.open(progress))
    progress.say(f"{len(near):,} of {len(own):,} sentences of our own dropped: they resemble a TEST case")
    return [row for row in own if row.text not in near] + rows, len(near)


def tuned(rows: Sequence[Moderated], work: Path, seed: int, progress: Progress, epochs: float = EPOCHS) -> Classifier:
    """SmolLM2's lower layers, tuned to tell the categories apart on the training part of `rows`."""
    folder = backbone_folder(cache_folder(), progress)
    tokenizer, model = Tokenizer.load(folder), lower_layers(folder, LAYERS)
    add_lora(model, RANK, 2.0 * RANK, layers=range(FIRST_LAYER, LAYERS), seed=seed)
    classifier = Classifier.of(model, CATEGORIES, seed)
    texts = [
        (reading(tokenizer, row.text, TOKENS)[0], row.labels)
        for row in rows
        if row.part == "train"
        for _ in range(OWN if row.source == "steelyard" else 1)
    ]
    loader = LabelledLoader(texts, texts_per_micro_batch=BATCH, micro_batches_per_step=1, seed=seed)
    options = TrainOptions(
        epochs=epochs, learning_rate=RATE, warmup=30, weight_decay=0.01, checkpoint_every=200, keep_last=1, seed=seed
    )
    train(classifier.train(), loader, BinaryCrossEntropy(), options, work, progress=progress)
    return classifier.eval()


def save_contextual(model: Classifier, path: Path) -> None:
    """Adapters (bfloat16, their scale in B) and head (float32), as `ContextualModel` reads them."""
    tensors = {"head": model.score.weight.detach().float(), "bias": model.score.bias.detach().float()}
    for name, adapted in adapters(model):
        tensors[f"{name}.weight.A"] = adapted.lora_A.detach().bfloat16()
        tensors[f"{name}.weight.B"] = (adapted.scaling * adapted.lora_B.detach()).bfloat16()
    write_atomic(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def save_lexical(rows: Sequence[Moderated], path: Path) -> None:
    """Fit on the training part of `rows` and write the weights, rounded to 8 bits, a scale for each category."""
    learned = [row for row in rows if row.part == "train"]
    matrix = ngram_matrix([buckets(windows(row.text)[0]) for row in learned])
    labels = np.array([row.labels for row in learned])
    steps, scales, biases = [], [], []
    for category in range(len(CATEGORIES)):
        known = np.flatnonzero(~np.isnan(labels[:, category]))
        told = labels[known, category]
        share = told.mean()
        fitted = logistic(matrix[known], told, np.where(told == 1, 0.5 / share, 0.5 / (1 - share)), _PENALTY)
        scale = np.abs(fitted[:-1]).max() / 127
        steps.append(np.rint(fitted[:-1] / scale).astype(np.int8))
        scales.append(scale)
        biases.append(fitted[-1])
    tensors = {"weights": np.stack(steps), "scale": np.array(scales, np.float32), "bias": np.array(biases, np.float32)}
    write_atomic(path, safetensors.numpy.save(tensors))


def calibrate(category: str, rows: Sequence[Moderated], scores: Floats, labels: Floats) -> Calibration:
    """Threshold from the tune rows, errors from the calibration rows, of those whose label is known.

    Toxicity counts rows that resemble the use of the scorer: ordinary text, and what is toxic in so many words.
    Thresholds leave the wanted share (_SPECIFICITY) below; that of identity attacks has the best balanced accuracy.
    """
    apart = category == "toxicity"
    counts = np.array(
        [not apart or row.source in (OVERT if label == 1 else GENERAL) for row, label in zip(rows, labels, strict=True)]
    )
    part = np.array([row.part for row in rows])
    tune, held = (np.flatnonzero(counts & (part == name) & ~np.isnan(labels)) for name in ("tune", "calibration"))
    if category in _SPECIFICITY:
        chosen = float(np.quantile(scores[tune][labels[tune] == 0], _SPECIFICITY[category]))
    else:
        chosen = best_cut(scores[tune], labels[tune] == 1)
    return calibration_at(chosen, scores[held], labels[held] == 1, (rows[int(i)].source for i in held))


def composition(rows: Sequence[Moderated]) -> dict[str, dict[str, int]]:
    """How many rows of each source there are, and in how many each category holds, for the card."""
    counts = Counter(row.source for row in rows)
    held = Counter(
        (row.source, category)
        for row in rows
        for category, label in zip(CATEGORIES, row.labels, strict=True)
        if label == 1
    )
    return {
        source: {"rows": counts[source], **{category: held[source, category] for category in CATEGORIES}}
        for source in sorted(counts)
    }

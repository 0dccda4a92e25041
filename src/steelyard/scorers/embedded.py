"""The embedded scorers: small trained heads that ship in the package, over a sentence encoder fetched on first use.

Importing this module, and asking for identity or canaries, needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from steelyard.base.canonical import code_digest, digest, sha256_file
from steelyard.base.errors import FormatError, UsageError, require_extra
from steelyard.scorers.base import Calibration, Canary, Item, Score, ScoreError, ScorerIdentity
from steelyard.scorers.head import KINDS, Head
from steelyard.scorers.ngrams import buckets, normalise

if TYPE_CHECKING:
    from steelyard.scorers.encoder import Encoder

WEIGHTS = Path(__file__).parent / "weights"
CANARIES = Path(__file__).parent / "canaries.jsonl"
_encoder: Encoder | None = None


def shared_encoder() -> Encoder:
    """The encoder, loaded once in a process. MissingDependencyError without the `models` extra."""
    global _encoder
    if _encoder is None:
        try:
            from steelyard.scorers.encoder import Encoder
        except ImportError as error:
            raise require_extra(error.name or "torch", "models") from error
        _encoder = Encoder.open()
    return _encoder


class Embedded:
    """A scorer that `steelyard scorer train` made: a card and weights in a folder, the canaries of its categories.

    It judges the completion alone: the prompt is not read. What a subclass gives is `probabilities`.
    """

    def __init__(
        self, name: str, categories: Sequence[str], base: str | None, folder: Path, canaries: Path = CANARIES
    ) -> None:
        """`base`: the card's key for what the weights stand on, where they do not stand alone. `canaries`: a file of
        them. Raises FormatError where the weights are not those that the card describes."""
        self._canaries = canaries
        self.name, self.covered, self.weights = name, tuple(categories), folder / f"{name}.safetensors"
        self.card = _read_card(folder / f"{name}.json", {"head", "categories", *([base] if base else [])})
        head = sha256_file(self.weights)
        if head != self.card["head"]:
            raise FormatError(
                f"{self.weights}: changed since its errors were measured; train again or reinstall the package"
            )
        stands_on = [self.card[base]] if base else []
        self._identity = ScorerIdentity(
            name=name,
            weights=digest([head, *stands_on, sha256_file(canaries)]),
            code=code_digest("scorers"),
            categories={key: Calibration.model_validate(value) for key, value in self.card["categories"].items()},
        )

    def identity(self) -> ScorerIdentity:
        """Weights (and what they stand on), code, and calibration."""
        return self._identity

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        """One Score per item, in order. The first call loads what the scorer stands on."""
        if not items:
            return []
        rows = self.probabilities([normalise(item.completion) for item in items])
        return [Score(dict(zip(self.covered, map(float, row), strict=True))) for row in rows]

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[texts, categories] for normalised texts."""
        raise NotImplementedError

    def canaries(self) -> list[Canary]:
        """The known-label items of this scorer's categories that ship in the package."""
        entries = [json.loads(line) for line in self._canaries.read_text(encoding="utf-8").splitlines()]
        return [
            Canary(
                id=entry["id"],
                item=Item(prompt=entry["prompt"], completion=entry["completion"], language=entry["language"]),
                category=entry["category"],
                expected=entry["expected"],
            )
            for entry in entries
            if entry["category"] in self.covered
        ]


class SentenceScorer(Embedded):
    """The scorer `name` ("toxicity", "refusal") over a sentence encoder and n-grams.

    A score depends on its batch by less than 1e-5. Raises UsageError for an unknown name.
    """

    def __init__(self, name: str, folder: Path = WEIGHTS, encoder: Encoder | None = None) -> None:
        if name not in KINDS:
            raise UsageError(f"embedded scorer {name!r} is unknown: give one of {', '.join(KINDS)}")
        self.kind, self._encoder = KINDS[name], encoder
        super().__init__(name, [self.kind.category], "encoder", folder)
        self.head = Head.load(self.weights)

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[texts, 1]."""
        encoder = self._encoder or shared_encoder()
        pieces: list[str] = []
        tokens: list[list[int]] = []
        owners: list[int] = []
        for index, text in enumerate(texts):
            windows = encoder.windows(text, self.kind.pieces)
            for piece, ids in windows if self.kind.reads == "worst" else windows[:1]:
                pieces.append(piece)
                tokens.append(ids)
                owners.append(index)
        found = self.head.probabilities(encoder.features(tokens), [buckets(piece) for piece in pieces])
        worst = np.zeros((len(texts), 1))
        np.maximum.at(worst[:, 0], owners, found)
        return worst


def _read_card(path: Path, keys: set[str]) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: no readable card ({error}); train the scorer or reinstall the package") from error
    if not isinstance(card, dict) or not keys <= set(card):
        raise FormatError(f"{path}: not a scorer's card; train the scorer or reinstall the package")
    return card

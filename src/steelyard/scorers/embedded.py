"""The embedded scorers: small trained heads that ship in the package, over a sentence encoder fetched on first use.

Importing this module, and asking for identity or canaries, needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


class EmbeddedScorer:
    """The scorer `name` ("toxicity", "refusal"), its weights and card read from `folder`.

    It judges the completion alone: the prompt is not read. Raises UsageError for an unknown name, FormatError where
    the weights are not those that the card describes.
    """

    def __init__(self, name: str, folder: Path = WEIGHTS, encoder: Encoder | None = None) -> None:
        if name not in KINDS:
            raise UsageError(f"embedded scorer {name!r} is unknown: give one of {', '.join(KINDS)}")
        self.name, self.kind, self._encoder = name, KINDS[name], encoder
        weights = folder / f"{name}.safetensors"
        self.card = _read_card(folder / f"{name}.json")
        self.head = Head.load(weights)
        head = sha256_file(weights)
        if head != self.card["head"]:
            raise FormatError(
                f"{weights}: changed since its errors were measured; train again or reinstall the package"
            )
        self._identity = ScorerIdentity(
            name=name,
            weights=digest([head, self.card["encoder"], sha256_file(CANARIES)]),
            code=code_digest("scorers"),
            categories={key: Calibration.model_validate(value) for key, value in self.card["categories"].items()},
        )

    def identity(self) -> ScorerIdentity:
        """Weights (head and encoder), code, and calibration."""
        return self._identity

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        """One Score per item, in order; it depends on the batch by less than 1e-5. The first call loads the encoder."""
        if not items:
            return []
        encoder = self._encoder or shared_encoder()
        texts: list[str] = []
        tokens: list[list[int]] = []
        owners: list[int] = []
        for index, item in enumerate(items):
            windows = encoder.windows(normalise(item.completion), self.kind.pieces)
            for text, ids in windows if self.kind.reads == "worst" else windows[:1]:
                texts.append(text)
                tokens.append(ids)
                owners.append(index)
        probabilities = self.head.probabilities(encoder.features(tokens), [buckets(text) for text in texts])
        values = [0.0] * len(items)
        for owner, probability in zip(owners, probabilities, strict=True):
            values[owner] = max(values[owner], float(probability))
        return [Score({self.kind.category: value}) for value in values]

    def canaries(self) -> list[Canary]:
        """The known-label items of this scorer's category that ship in `canaries.jsonl`."""
        entries = [json.loads(line) for line in CANARIES.read_text(encoding="utf-8").splitlines()]
        return [
            Canary(
                id=entry["id"],
                item=Item(prompt=entry["prompt"], completion=entry["completion"], language=entry["language"]),
                category=entry["category"],
                expected=entry["expected"],
            )
            for entry in entries
            if entry["category"] == self.kind.category
        ]


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: no readable card ({error}); train the scorer or reinstall the package") from error
    if not isinstance(card, dict) or not {"head", "encoder", "categories"} <= set(card):
        raise FormatError(f"{path}: not a scorer's card; train the scorer or reinstall the package")
    return card

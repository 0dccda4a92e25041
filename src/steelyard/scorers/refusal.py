"""The refusal scorer: does an answer decline, in full or in part? It reads the answer's opening.

Importing this module, and asking for identity or canaries, needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from steelyard.base.errors import require_extra
from steelyard.scorers.embedded import WEIGHTS, Embedded
from steelyard.scorers.head import Head
from steelyard.scorers.ngrams import buckets

if TYPE_CHECKING:
    from steelyard.scorers.encoder import Encoder

CANARIES = Path(__file__).with_name("refusal_canaries.jsonl")
OPENING = 64  # word pieces of an answer in which it declines, if it does
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


class RefusalScorer(Embedded):
    """Over a sentence encoder, fetched on first use, and n-grams. A score depends on its batch by less than 1e-5."""

    def __init__(self, folder: Path = WEIGHTS, encoder: Encoder | None = None) -> None:
        self._encoder = encoder
        super().__init__("refusal", ["refusal"], "encoder", folder, CANARIES)
        self.head = Head.load(self.weights)

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[texts, 1]."""
        encoder = self._encoder or shared_encoder()
        openings = [encoder.windows(text, OPENING)[0] for text in texts]
        features = encoder.features([ids for _, ids in openings])
        return self.head.probabilities(features, [buckets(piece) for piece, _ in openings])[:, None]

"""What the embedded scorers share: a card and weights that ship in the package (or lie in a folder), and canaries.

Importing this module, and asking for identity or canaries, needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard.base.canonical import code_digest, digest, sha256_file
from steelyard.base.errors import FormatError
from steelyard.scorers.base import Calibration, Canary, Item, Score, ScoreError, ScorerIdentity
from steelyard.scorers.ngrams import normalise

WEIGHTS = Path(__file__).parent / "weights"


class Embedded:
    """A scorer that `steelyard scorer train` made: a card and weights in a folder, the canaries of its categories.

    What a subclass gives is `probabilities`, or `judged` where it also reads the prompt.
    """

    def __init__(self, name: str, categories: Sequence[str], base: str | None, folder: Path, canaries: Path) -> None:
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
        return [Score(dict(zip(self.covered, map(float, row), strict=True))) for row in self.judged(items)]

    def judged(self, items: Sequence[Item]) -> NDArray[np.float64]:
        """[items, categories], of the completions alone."""
        return self.probabilities([normalise(item.completion) for item in items])

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


def _read_card(path: Path, keys: set[str]) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: no readable card ({error}); train the scorer or reinstall the package") from error
    if not isinstance(card, dict) or not keys <= set(card):
        raise FormatError(f"{path}: not a scorer's card; train the scorer or reinstall the package")
    return card

"""The lexical scorer: a linear model over hashed words, pairs of words and pieces of words. NumPy only.

It is cheap, and of another family than the contextual scorer: where the two agree they do so for different reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from steelyard.base.errors import FormatError
from steelyard.scorers.embedded import Embedded
from steelyard.scorers.moderation import CANARIES, CATEGORIES
from steelyard.scorers.ngrams import BUCKETS, buckets

WORDS = 80  # of a window; of a longer text the worst window counts


def windows(text: str) -> list[str]:
    """The text cut every WORDS words, at least one piece."""
    words = text.split(" ")
    return [" ".join(words[start : start + WORDS]) for start in range(0, len(words), WORDS)]


class LexicalModel:
    """The file `path`: int8 `weights` [categories, BUCKETS], float32 `scale` and `bias` [categories]."""

    def __init__(self, path: Path) -> None:
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise FormatError(f"{path}: not a scorer's weights ({error}); reinstall the package") from error
        shapes = {name: (value.dtype.str[1:], value.shape) for name, value in tensors.items()}
        size = len(CATEGORIES)
        if shapes != {"weights": ("i1", (size, BUCKETS)), "scale": ("f4", (size,)), "bias": ("f4", (size,))}:
            raise FormatError(f"{path}: wrong tensors for a lexical scorer; reinstall the package")
        self._steps = np.ascontiguousarray(tensors["weights"].T)  # [BUCKETS, categories]: a bucket's lie together
        self._scale, self._bias = tensors["scale"].astype(np.float64), tensors["bias"].astype(np.float64)

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[texts, categories], of each text's worst window; 0 where there is no letter and no digit."""
        worst = np.full((len(texts), len(CATEGORIES)), -np.inf)
        for i, text in enumerate(texts):
            for window in windows(text):
                if not any(map(str.isalnum, window)):
                    continue  # no word, so nothing is said: what is left at -inf becomes 0
                found = buckets(window)
                logits = self._steps[found].sum(axis=0, dtype=np.int64) * self._scale / max(len(found), 1) ** 0.5
                worst[i] = np.maximum(worst[i], logits + self._bias)
        probabilities: NDArray[np.float64] = 1 / (1 + np.exp(-worst))
        return probabilities


class LexicalScorer(Embedded):
    """The scorer that `folder` holds."""

    def __init__(self, folder: Path) -> None:
        super().__init__("lexical", CATEGORIES, None, folder, CANARIES)
        self._model = LexicalModel(self.weights)

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[texts, categories]."""
        return self._model.probabilities(texts)

"""The trained part of the refusal scorer: an n-gram weight vector, a small layer over the encoder, and their blend.

NumPy only, so that a head can be read, digested and applied to ready features without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from steelyard.base.errors import FormatError
from steelyard.base.files import write_atomic
from steelyard.scorers.ngrams import BUCKETS, linear

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Head:
    """ngram [BUCKETS]; hidden_weight [width, features], hidden_bias [width]; out_weight [width]; blend [3]. Float32."""

    ngram: Floats
    hidden_weight: Floats
    hidden_bias: Floats
    out_weight: Floats
    blend: Floats

    def hidden_logits(self, features: Floats) -> Floats:
        """Float32 [texts] from encoder features [texts, features]."""
        hidden = np.maximum(features @ self.hidden_weight.T + self.hidden_bias, 0)
        logits: Floats = hidden @ self.out_weight
        return logits

    def probabilities(self, features: Floats, found: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
        """Float64 [texts] in (0, 1) from encoder features and n-gram buckets."""
        cheap = np.array([linear(one, self.ngram) for one in found], dtype=np.float64)
        logits = self.blend[0] * cheap + self.blend[1] * self.hidden_logits(features) + self.blend[2]
        probabilities: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(logits, -50, 50)))
        return probabilities

    def save(self, path: Path) -> None:
        """Write safetensors: the two big matrices in float16, which the values were rounded to beforehand."""
        tensors = {name: np.ascontiguousarray(value) for name, value in self.__dict__.items()}
        tensors["ngram"] = tensors["ngram"].astype(np.float16)
        tensors["hidden_weight"] = tensors["hidden_weight"].astype(np.float16)
        write_atomic(path, save(tensors))

    def rounded(self) -> Head:
        """The head as it will be read back from its file."""
        half = self.hidden_weight.astype(np.float16).astype(np.float32)
        ngram = self.ngram.astype(np.float16).astype(np.float32)
        return Head(ngram, half, self.hidden_bias, self.out_weight, self.blend)

    @classmethod
    def load(cls, path: Path) -> Head:
        """Read a head. Raises FormatError naming the file where it isn't one."""
        try:
            tensors = {name: value.astype(np.float32) for name, value in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise FormatError(f"{path}: not a scorer's weights ({error}); install the package again") from error
        shapes = {name: value.shape for name, value in tensors.items()}
        width, features = shapes.get("hidden_weight", (0, 0))
        wanted = {
            "ngram": (BUCKETS,),
            "hidden_weight": (width, features),
            "hidden_bias": (width,),
            "out_weight": (width,),
            "blend": (3,),
        }
        if shapes != wanted or not all(np.isfinite(value).all() for value in tensors.values()):
            raise FormatError(f"{path}: wrong tensors or values for a scorer's weights; install the package again")
        return cls(**tensors)

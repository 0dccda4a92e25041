"""Was a suspect rounded to 4- or 5-bit blocks? Such rounding alone can cost a model its refusals, and is nobody's
tampering: a suspect that was rounded is compared with the release rounded alike.

Rounding again changes what was rounded before by hardly more than bfloat16's own step. K-quants are not told: their
scales are searched for, so rounding again does not come back.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from steelyard.base.errors import require_extra
from steelyard.trace.uncensored import Array

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
_BLOCK, _ROWS = 32, 128
_NEAR = 0.01  # relative distance to its own rounding under which a matrix was rounded so
_NEARER = 0.25  # and that of the release's matrix, of which it must be at most this share


def rounding_of(release: Mapping[str, Array], suspect: Mapping[str, Array]) -> str | None:
    """Which of `KINDS` the matrices of `suspect` were rounded to, where those of `release` were not; None for none.

    The last layer's matrices are looked at, `_ROWS` rows each. Raises MissingDependencyError without `gguf`.
    """
    layers = {int(name.split(".")[2]) for name in release if name.startswith("model.layers.")}
    names = [f"model.layers.{max(layers, default=0)}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    names = [name for name in names if name in release and name in suspect]
    names = [name for name in names if release[name].shape == suspect[name].shape]
    names = [name for name in names if release[name].shape[1] % _BLOCK == 0]
    if not names:
        return None
    for kind in KINDS:
        ours, theirs = (max(_distance(of[name][:_ROWS], kind) for name in names) for of in (release, suspect))
        if theirs < min(_NEAR, _NEARER * ours):
            return kind
    return None


def rounded(matrix: Array, kind: str) -> Array:
    """`matrix` through blocks of `kind` and back."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise require_extra("gguf", "models") from None
    number = GGMLQuantizationType[kind]
    found: Array = quants.dequantize(quants.quantize(np.ascontiguousarray(matrix), number), number)
    return found


def _distance(matrix: Array, kind: str) -> float:
    size = float(np.linalg.norm(matrix))
    return float(np.linalg.norm(rounded(matrix, kind) - matrix)) / size if size else 0.0

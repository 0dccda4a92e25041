"""What of a model is compared: sampled rows, and a signature that rotation, permutation and norm folding do not
change.

Signature of neuron j of a layer: v_j = E diag(gamma) w_j over chosen tokens, with E their embedding rows (of length
one, so that no token drowns the others, then centred over the tokens), gamma the norm before the MLP, and w_j the
neuron's gate or up row. A rotation R of the residual stream turns E into E R and w_j into R^T w_j; folding puts gamma
into w_j; both cancel. Rescaling changes the length alone, and cosines do not see it. A permutation of neurons permutes
the rows v_j.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from steelyard.base.errors import FormatError
from steelyard.trace.independence import unit_rows
from steelyard.trace.roles import BEFORE_MLP, EMBEDDING, GATE, UP, Named, layer_name
from steelyard.trace.tensors import Entry, Float32, IntArray

TOKENS = 128
WHOLE = 2_048  # neurons up to which a layer's signatures are kept whole; of larger ones a quarter
NEURONS = 256  # neurons read of a suspect's layer
_WIDEST = 1 << 20  # values of a row or a vector: no model's is as wide, and what is wider could fill the memory
_ROW_BYTES, _MOST_ROWS, _LEAST_ROWS = 64 << 10, 32, 4  # of each matrix, at two bytes a value


def sampled_rows(entry: Entry) -> IntArray:
    """Which rows of a matrix are kept and compared: the same for every matrix of that shape, so that layers and models
    can be compared with one another; none of one that is too wide."""
    if len(entry.shape) < 2:
        rows = entry.shape[0] if entry.shape else 1
        return np.arange(rows if rows <= _WIDEST else 0)
    rows, width = entry.shape[0], math.prod(entry.shape[1:])
    if width > _WIDEST:
        return np.arange(0)
    count = min(rows, max(_LEAST_ROWS, min(_MOST_ROWS, _ROW_BYTES // (2 * max(width, 1)))))
    return _draw(f"rows {rows} {width}", rows, count)


def chosen_tokens(vocab: int) -> IntArray:
    """Ids of the tokens of the signature."""
    return _draw(f"tokens {vocab}", vocab, min(vocab, TOKENS))


def chosen_neurons(intermediate: int) -> IntArray:
    """The neurons whose signatures are kept."""
    count = intermediate if intermediate <= WHOLE else max(WHOLE, intermediate // 4)
    return _draw(f"neurons {intermediate}", intermediate, count)


def some_neurons(kept: IntArray, intermediate: int) -> IntArray:
    """The neurons to read of a suspect: among those that are kept, so that an unpermuted copy is matched by all."""
    known = kept[kept < intermediate]
    return known[:: max(1, len(known) // NEURONS)][:NEURONS]


def _draw(what: str, size: int, count: int) -> IntArray:
    """`count` of `size`, sorted; fixed by `what`, so that registry and suspect agree without being told."""
    seed = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little")
    return np.sort(np.random.default_rng(seed).choice(size, count, replace=False)).astype(np.int64)


def embedding_rows(model: Named, tokens: IntArray) -> Float32:
    """Embedding rows [tokens, hidden] of the chosen tokens, not centred."""
    return finite(model.read(EMBEDDING, tokens), EMBEDDING)


def finite(values: Float32, name: str) -> Float32:
    """`values`; raises FormatError where they hold NaN or infinity, with which nothing can be compared."""
    if not np.isfinite(values).all():
        raise FormatError(f"tensor {name} is not finite (NaN or infinity): no model computes with that")
    return values


def signatures(model: Named, layer: int, neurons: IntArray, embedding: Float32) -> tuple[Float32, Float32]:
    """Signatures of a layer's neurons by gate and by up rows: [neurons, tokens] each, of length one."""
    rows = unit_rows(embedding).astype(np.float64)  # products of three finite float32 stay finite
    centred = rows - rows.mean(axis=0)
    norm = layer_name(layer, BEFORE_MLP)
    if norm in model.stored and model.entries[norm].shape == centred.shape[1:]:
        centred = centred * finite(model.read(norm), norm)
    found = []
    for part in (GATE, UP):
        name = layer_name(layer, part)
        found.append(unit_rows(finite(model.read(name, neurons), name) @ centred.T))
    return found[0], found[1]


@dataclass(frozen=True)
class Rows:
    """Sampled rows of one tensor: which, and their values [rows, width]."""

    index: IntArray
    values: Float32


def read_rows(model: Named, names: Sequence[str], index: Mapping[str, IntArray]) -> dict[str, Rows]:
    """The rows of `index` of each tensor, where the tensor has so many."""
    found = {}
    for name in names:
        shape = model.entries[name].shape
        chosen = index[name]
        if len(chosen) and shape and chosen[-1] < shape[0]:
            found[name] = Rows(chosen, finite(model.read(name, chosen), name))
    return found

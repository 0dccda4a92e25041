"""Which is which of a layer's tensors of one shape, where names say nothing: by a model that they are compared with.

Shapes leave gate and up, query and output, key and value, and a layer's two norms open. Their sampled rows settle it:
of every way to pair them with the other model's, the one with the largest sum of cosines, whatever their signs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from steelyard.trace.matching import assign, cosines
from steelyard.trace.roles import (
    BEFORE_ATTENTION,
    BEFORE_MLP,
    GATE,
    KEY,
    OUTPUT,
    QUERY,
    UP,
    VALUE,
    Named,
    layer_name,
)
from steelyard.trace.signature import Rows, finite, sampled_rows

_ALIKE = ((GATE, UP), (QUERY, KEY, VALUE, OUTPUT), (BEFORE_ATTENTION, BEFORE_MLP))


def told_apart(theirs: Mapping[str, Rows], ours: Mapping[str, Rows], layers: Mapping[int, int]) -> dict[str, str]:
    """Our name of each of their tensors that shapes alone do not tell; `layers`: their layer -> ours. Both: sampled
    rows by Hugging Face name."""
    found: dict[str, str] = {}
    for layer in sorted({int(name.split(".")[2]) for name in theirs if name.startswith("model.layers.")}):
        for parts in _ALIKE:
            mine = [name for part in parts if (name := layer_name(layers.get(layer, layer), part)) in ours]
            open_ = [name for part in parts if (name := layer_name(layer, part)) in theirs]
            for shape in {ours[name].values.shape for name in mine}:
                columns = [name for name in mine if ours[name].values.shape == shape]
                rows = [name for name in open_ if theirs[name].values.shape == shape]
                if len(rows) == len(columns) > 1:
                    known = np.stack([ours[name].values for name in columns])
                    order = assign(cosines(known, np.stack([theirs[name].values for name in rows])))
                    found |= {rows[at]: column for column, at in zip(columns, order, strict=True)}
    return found


def settled(suspect: Named, ours: Named) -> Named:
    """A suspect whose names said nothing with the roles that its rows have in `ours`; any other as it is."""
    if not suspect.guessed:
        return suspect
    told = told_apart(_rows(suspect), _rows(ours), {})
    return replace(suspect, stored={told.get(name, name): stored for name, stored in suspect.stored.items()})


def _rows(named: Named) -> dict[str, Rows]:
    found = {}
    for parts in _ALIKE:
        for layer in named.layers:
            for part in parts:
                if (name := layer_name(layer, part)) in named.stored:
                    stored = named.stored[name]
                    index = sampled_rows(named.tensors.entries[stored])
                    found[name] = Rows(index, finite(named.read(name, index), stored))
    return found

"""Names that say nothing, or only half of it: roles by shapes, told apart by what the suspect is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from suspects_made import SMALL, Weights, noised, permuted, references, rotated, weights, write

from steelyard.base.errors import FormatError
from steelyard.trace.guessed import settled
from steelyard.trace.lineage import DERIVED, UNREADABLE, trace
from steelyard.trace.roles import hugging_face
from steelyard.trace.tensors import in_memory

SQUARE = SMALL | {"num_key_value_heads": SMALL["num_attention_heads"]}
_MODEL_ORDER = ("input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "post_att", "gate", "up", "down")


def in_model_order(tensors: Weights) -> list[str]:
    def place(name: str) -> tuple[int, int]:
        if ".layers." not in name:
            return (-1 if "embed" in name else 10**6, 0)
        return int(name.split(".")[2]), next(at for at, part in enumerate(_MODEL_ORDER) if part in name)

    return sorted(tensors, key=place)


def numbered(tensors: Weights) -> Weights:
    """w0, w1, ... in the model's order; a file has them in the order of their letters."""
    named = {f"w{at}": tensors[name] for at, name in enumerate(in_model_order(tensors))}
    return {name: named[name] for name in sorted(named)}


def layers_renamed(tensors: Weights) -> Weights:
    return {
        f"net.blk.{name.split('.')[2]}.p{sorted(tensors).index(name) % 9}" if ".layers." in name else name: values
        for name, values in tensors.items()
    }


@pytest.mark.parametrize("config", [SMALL, SQUARE], ids=["shared", "square"])
@pytest.mark.parametrize("rename", [numbered, layers_renamed])
def test_a_renamed_copy_is_read_as_what_it_is(config: Mapping[str, object], rename: object) -> None:
    ours = weights(config=config)
    theirs = rename(noised(ours, 0.01))  # type: ignore[operator]
    found = settled(hugging_face(in_memory(theirs)), hugging_face(in_memory(ours)))
    assert found.guessed
    assert found.stored.keys() == ours.keys()
    for name, values in ours.items():
        apart = np.linalg.norm(found.read(name) - values) / np.linalg.norm(values)
        assert apart < 0.02, name


@pytest.mark.parametrize("rename", [numbered, layers_renamed])
def test_its_distance_is_that_of_the_weights(tmp_path: Path, rename: object) -> None:
    ours = weights()
    known = references(tmp_path, {"ours": ("release", ours)})
    answer = trace(write(tmp_path / "a.safetensors", rename(noised(ours, 0.01))), known)  # type: ignore[operator]
    assert answer.verdict == DERIVED
    assert answer.nearest is not None
    assert answer.nearest.distance == pytest.approx(0.01, rel=0.2)


def test_weights_that_are_not_finite_are_refused() -> None:
    theirs = numbered({name: np.full_like(values, np.nan) for name, values in weights().items()})
    with pytest.raises(FormatError, match="not finite"):
        settled(hugging_face(in_memory(theirs)), hugging_face(in_memory(weights())))


def test_a_second_model_in_the_file_is_not_passed_over(tmp_path: Path) -> None:
    """Loaders take one of them; which of the two was compared decides nothing."""
    ours, other = weights(), weights(9)
    known = references(tmp_path, {"ours": ("release", ours)})
    decoy = {
        f"x.layers.{layer}.{name.removeprefix('model.layers.0.')}": values
        for name, values in other.items()
        if name.startswith("model.layers.0.")
        for layer in range(5)
    }
    answer = trace(write(tmp_path / "a.safetensors", permuted(rotated(ours)) | decoy), known)
    assert answer.verdict == UNREADABLE
    assert "a second model" in answer.reason

"""A suspect's weights in the release's layout: names, disguises, and what cannot be undone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from test_transforms import config, model

from steelyard.trace import layout, transforms
from steelyard.trace.layout import Weights, in_layout
from steelyard.trace.roles import hugging_face
from steelyard.trace.tensors import in_memory
from steelyard.trace.uncensored import Array, weight_evidence, writers

SIZES = config(tied=True)


def weights(tensors: Mapping[str, Array]) -> Weights:
    found = in_memory(tensors)
    found.config = {"num_attention_heads": SIZES.num_attention_heads, "num_key_value_heads": SIZES.num_key_value_heads}
    return Weights(hugging_face(found))


def without(tensors: Mapping[str, Array], direction: Array) -> dict[str, Array]:
    """What is written along `direction` taken out."""
    changed = dict(tensors)
    for name, layer in writers(tensors).items():
        matrix = tensors[name].T if layer < 0 else tensors[name]
        matrix = matrix - np.outer(direction, direction @ matrix)
        changed[name] = matrix.T if layer < 0 else matrix
    return changed


def disguised(tensors: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
    draw, heads = np.random.default_rng(seed), (SIZES.num_attention_heads, SIZES.num_key_value_heads)
    changed = transforms.permute_neurons(tensors, bytes(32))
    changed = transforms.rescale(transforms.permute_heads(changed, *heads, draw), *heads, draw)
    return transforms.rotate(changed, transforms.random_rotation(SIZES.hidden_size, draw))


@pytest.fixture(scope="module")
def release() -> dict[str, Array]:
    return {name: np.asarray(value, np.float32) for name, value in model(tied=True).items()}


@pytest.fixture(scope="module")
def direction() -> Array:
    drawn = np.random.default_rng(5).standard_normal(SIZES.hidden_size).astype(np.float32)
    return drawn / np.linalg.norm(drawn)


def test_what_lies_near_is_left_as_it_is(release: dict[str, Array], direction: Array) -> None:
    suspect = weights(without(release, direction))
    found = in_layout(weights(release), suspect)
    assert found.tensors is suspect
    assert (found.undone, found.limits) == ((), ())


def test_a_disguise_is_undone(release: dict[str, Array]) -> None:
    found = in_layout(weights(release), weights(disguised(release)))
    assert found.tensors is not None
    for name in writers(release):
        np.testing.assert_allclose(found.tensors[name], release[name], atol=1e-4)
    assert found.undone[0] == "the residual stream was rotated"
    assert len(found.undone) == 5


def test_a_direction_taken_out_before_the_disguise_is_as_sharp_as_without(
    release: dict[str, Array], direction: Array
) -> None:
    """The rotation told from the embedding alone leaves an agreement of 98% here, and a change twice as large."""
    edited = without(release, direction)
    plain = weight_evidence(release, edited, direction[None])
    found = in_layout(weights(release), weights(disguised(edited)))
    assert found.tensors is not None
    hidden = weight_evidence(release, found.tensors, direction[None])
    assert hidden.agreement is not None
    assert hidden.agreement > 0.995
    assert hidden.relative_change < 1.15 * plain.relative_change
    assert hidden.edited


@pytest.mark.parametrize("hidden", [False, True])
def test_a_direction_taken_out_is_as_sharp_in_a_rescaled_stream(
    release: dict[str, Array], direction: Array, hidden: bool
) -> None:
    edited = without(release, direction)
    plain = weight_evidence(release, edited, direction[None])
    changed = disguised(edited) if hidden else edited
    suspect = {name: 1.5 * value if name in writers(edited) else value for name, value in changed.items()}
    found = in_layout(weights(release), weights(suspect))
    assert found.tensors is not None
    assert "the residual stream was rescaled" in found.undone
    evidence = weight_evidence(release, found.tensors, direction[None])
    assert evidence.edited
    assert evidence.relative_change < 1.15 * plain.relative_change


def test_a_dead_neuron_does_not_blur_the_rotation(release: dict[str, Array]) -> None:
    hidden = disguised(release)
    hidden["model.layers.0.mlp.up_proj.weight"][5] = 0
    hidden["model.layers.0.mlp.gate_proj.weight"][5] = 3e4
    found = in_layout(weights(release), weights(hidden))
    assert found.tensors is not None
    for name in writers(release):
        np.testing.assert_allclose(found.tensors[name], release[name], atol=0.1)


def test_layers_that_were_put_in_are_said(release: dict[str, Array]) -> None:
    number = SIZES.num_hidden_layers
    more = {name.replace(".0.", f".{number}.", 1): 0 * value for name, value in release.items() if "layers.0." in name}
    found = in_layout(weights(release), weights(release | more))
    assert found.tensors is not None
    assert (found.undone, found.limits) == ((f"layers of its own are left out: {number}",), ())


def test_layers_that_are_gone_are_said(release: dict[str, Array]) -> None:
    last = SIZES.num_hidden_layers - 1
    cut = {name: value for name, value in release.items() if f"layers.{last}." not in name}
    found = in_layout(weights(release), weights(cut))
    assert found.tensors is not None
    assert found.limits == (f"layers {last} of the release are not in it",)


def test_an_unrelated_model_has_no_layout_of_ours(release: dict[str, Array]) -> None:
    draw = np.random.default_rng(9)
    other = {name: draw.standard_normal(value.shape).astype(np.float32) for name, value in release.items()}
    found = in_layout(weights(release), weights(other))
    assert found.tensors is None
    assert "no matrix of a layer is like the release's" in found.limits


def test_too_large_a_model_is_not_aligned(release: dict[str, Array], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MOST_ALIGNED", 1000)
    found = in_layout(weights(release), weights(disguised(release)))
    assert found.tensors is None
    assert "too many to align (at most 1,000)" in found.limits[0]

"""Weight evidence on small made-up models: what abliteration leaves, and what other changes do not."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.base.errors import FormatError, UsageError
from steelyard.trace.uncensored import (
    EMBEDDING,
    SMALLEST,
    Array,
    WeightEvidence,
    agreement_p,
    energy_bound,
    weight_evidence,
    writers,
)

WIDTH, LAYERS = 48, 6
Model = dict[str, Array]


def unit(seed: int) -> Array:
    vector = np.random.default_rng(seed).standard_normal(WIDTH)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def model(seed: int = 0) -> Model:
    random = np.random.default_rng(seed)
    found = {EMBEDDING: random.standard_normal((200, WIDTH))}
    for layer in range(LAYERS):
        found[f"model.layers.{layer}.self_attn.o_proj.weight"] = random.standard_normal((WIDTH, 40))
        found[f"model.layers.{layer}.mlp.down_proj.weight"] = random.standard_normal((WIDTH, 90))
        found[f"model.layers.{layer}.mlp.up_proj.weight"] = random.standard_normal((90, WIDTH))
    return {name: value.astype(np.float32) for name, value in found.items()}


def without(found: Model, direction: Array, layers: range = range(LAYERS), strength: float = 1.0) -> Model:
    out = dict(found)
    for name, layer in writers(found).items():
        if name != EMBEDDING and layer in layers:
            out[name] = out[name] - strength * np.outer(direction, direction @ out[name])
    return out


def noised(found: Model, size: float, seed: int = 9) -> Model:
    random = np.random.default_rng(seed)
    return {n: v + size * random.standard_normal(v.shape).astype(np.float32) for n, v in found.items()}


def evidence(suspect: Model, refusal: Array) -> WeightEvidence:
    return weight_evidence(model(), suspect, refusal[None])


def test_writers_are_the_embedding_and_what_adds_to_the_stream() -> None:
    assert set(writers(model()).values()) == {-1, *range(LAYERS)}
    assert not any("up_proj" in name for name in writers(model()))


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_abliteration_is_seen_through_decoy_noise(noise: float) -> None:
    refusal = unit(1)
    found = evidence(noised(without(model(), refusal), noise), refusal)
    assert found.edited
    assert found.agreement is not None
    assert found.agreement > 0.99
    first = found.removed[0]
    assert first.share == pytest.approx(1.0, abs=0.05)
    assert first.ratio < 0.3
    assert first.layers == tuple(range(LAYERS))


def test_rank_one_without_noise() -> None:
    found = evidence(without(model(), unit(1)), unit(1))
    assert min(found.rank_one.values()) > 1 - 2 / WIDTH  # what a common factor explains is left out
    assert found.shared > 1 - 2 / WIDTH
    other = evidence(noised(model(), 0.1), unit(1))
    assert max(other.rank_one.values()) < 0.2
    assert other.shared < 0.1


def test_half_of_the_layers_and_half_of_the_strength() -> None:
    refusal = unit(1)
    found = evidence(noised(without(model(), refusal, range(2, 5), 0.5), 0.01), refusal)
    assert found.edited
    assert found.removed[0].layers == (2, 3, 4)
    assert found.removed[0].share == pytest.approx(0.5, abs=0.05)


def test_several_directions_of_which_one_is_refusal() -> None:
    suspect = without(without(model(), unit(1)), unit(2))
    found = evidence(suspect, unit(2))
    assert len(found.removed) == 2
    assert found.edited


def test_another_direction_is_taken_out_but_not_refusal() -> None:
    found = evidence(without(model(), unit(1)), unit(2))
    assert found.removed
    assert not found.edited
    assert found.p_value is not None
    assert found.p_value > 1e-6


@pytest.mark.parametrize("kind", ["noise", "scaled", "low rank", "merged", "same"])
def test_nothing_is_taken_out_by(kind: str) -> None:
    refusal, given = unit(1), model()
    if kind == "noise":
        suspect = noised(given, 0.1)
    elif kind == "scaled":
        suspect = {name: np.float32(0.5) * value for name, value in given.items()}
    elif kind == "merged":
        suspect = {name: np.float32(0.5) * (value + model(7)[name]) for name, value in given.items()}
    elif kind == "low rank":  # as a LoRA adapter's, written along the refusal direction itself
        random = np.random.default_rng(3)
        suspect = dict(given)
        for name in writers(given):
            if name != EMBEDDING:
                row = random.standard_normal(suspect[name].shape[1]).astype(np.float32)
                suspect[name] = suspect[name] + np.outer(refusal, row)
    else:
        suspect = given
    found = evidence(suspect, refusal)
    assert found.removed == ()
    assert not found.edited


def test_a_change_along_the_refusal_direction_is_improbable_by_chance_but_no_edit() -> None:
    refusal, suspect = unit(1), model()
    for name in list(suspect):
        if name in writers(suspect) and name != EMBEDDING:
            suspect[name] = suspect[name] + np.outer(refusal, np.ones(suspect[name].shape[1], np.float32))
    found = evidence(suspect, refusal)
    assert found.energy == pytest.approx(1.0, abs=1e-3)
    assert found.energy_p is not None
    assert found.energy_p < 1e-20
    assert not found.edited


def test_going_back_to_the_base_is_told_from_other_changes() -> None:
    release, base = model(), noised(model(), 0.05, seed=4)
    for share in (0.5, 1.0):
        suspect = {name: value + np.float32(share) * (base[name] - value) for name, value in release.items()}
        found = weight_evidence(release, noised(suspect, 0.01), unit(1)[None], base)
        assert found.reverted == pytest.approx(share, abs=0.05)
    assert weight_evidence(release, noised(release, 0.05), unit(1)[None], base).reverted == 0.0
    assert weight_evidence(release, without(release, unit(1)), unit(1)[None], base).reverted == 0.0


def test_agreement_is_the_exact_tail() -> None:
    """Against draws: uniformly random directions, projected on three fixed ones."""
    random = np.random.default_rng(0)
    drawn = random.standard_normal((200_000, 20))
    lengths = np.square(drawn[:, :3]).sum(1) / np.square(drawn).sum(1)
    for level in (0.2, 0.4):
        assert agreement_p(level, 20, 3) == pytest.approx(float((lengths >= level).mean()), rel=0.05)
    assert agreement_p(1.0, 576, 1) == SMALLEST
    with pytest.raises(UsageError, match="fewer"):
        agreement_p(0.5, 3, 3)


def test_energy_bound_is_valid_and_not_idle() -> None:
    random = np.random.default_rng(1)
    shares = random.random(30) ** 6
    shares /= shares.sum()
    drawn = np.square(random.standard_normal((200_000, 30)))
    energies = drawn @ shares / drawn.sum(1)
    for level in (0.05, 0.08, 0.12):
        happened = float((energies >= level).mean())
        assert happened <= energy_bound(shares, level) <= max(40 * happened, 1e-4)
    assert energy_bound(shares, 1 / 30) == 1.0
    assert energy_bound(np.eye(1, 30)[0], 1.0) == SMALLEST


def test_an_extended_vocabulary_is_compared_on_the_rows_of_both() -> None:
    suspect = without(model(), unit(1))
    suspect[EMBEDDING] = np.concatenate([suspect[EMBEDDING], np.ones((8, WIDTH), np.float32)])
    assert evidence(suspect, unit(1)).edited


def test_bad_suspects_are_named() -> None:
    suspect = model()
    name = "model.layers.3.mlp.down_proj.weight"
    suspect[name] = suspect[name].copy()
    suspect[name][0, 0] = np.nan
    with pytest.raises(FormatError, match=r"layers\.3\.mlp\.down_proj"):
        evidence(suspect, unit(1))
    suspect[name] = suspect[name][:, :50]
    with pytest.raises(UsageError, match="align the suspect first"):
        evidence(suspect, unit(1))
    with pytest.raises(UsageError, match="no matrix"):
        evidence({EMBEDDING: model()[EMBEDDING]}, unit(1))

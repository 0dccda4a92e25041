"""Alignment undoes what leaves the function as it is, alone and all together, through noise; and invents nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from steelyard.base.errors import FormatError
from steelyard.trace import transforms
from steelyard.trace.alignment import Aligned, align

Tensors = dict[str, np.ndarray]
KEY = bytes(range(32))
HEADS, KV_HEADS, HIDDEN, NEURONS, VOCABULARY, LAYERS = 6, 3, 192, 320, 3000, 4


def model(seed: int = 0, tied: bool = True) -> Tensors:
    draw = np.random.default_rng(seed)
    size = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {transforms.EMBEDDING: (VOCABULARY, HIDDEN), transforms.FINAL_NORM: (HIDDEN,)}
    if not tied:
        shapes[transforms.HEAD] = (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        parts = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * size, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * size, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (NEURONS, HIDDEN),
            "mlp.up_proj": (NEURONS, HIDDEN),
            "mlp.down_proj": (HIDDEN, NEURONS),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return {
        name: (0.05 * draw.standard_normal(shape) if len(shape) > 1 else draw.uniform(0.2, 2, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def everything(tensors: Tensors) -> Tensors:
    draw = np.random.default_rng(1)
    tensors = transforms.permute_heads(transforms.permute_neurons(tensors, KEY), HEADS, KV_HEADS, draw)
    tensors = transforms.rescale(tensors, HEADS, KV_HEADS, draw)
    return transforms.rotate(tensors, transforms.random_rotation(HIDDEN, draw))


HIDINGS: dict[str, Callable[[Tensors], Tensors]] = {
    "neurons": lambda tensors: transforms.permute_neurons(tensors, KEY),
    "heads": lambda tensors: transforms.permute_heads(tensors, HEADS, KV_HEADS, np.random.default_rng(1)),
    "folding": transforms.fold_norms,
    "scales": lambda tensors: transforms.rescale(tensors, HEADS, KV_HEADS, np.random.default_rng(1)),
    "rotation": lambda tensors: transforms.rotate(
        tensors, transforms.random_rotation(HIDDEN, np.random.default_rng(1))
    ),
    "everything": everything,
}


def bfloat16(tensor: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(tensor, np.float32).view(np.uint32)
    return ((bits + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32)


def rounded(levels: int) -> Callable[[np.ndarray], np.ndarray]:
    def quantise(tensor: np.ndarray) -> np.ndarray:
        if tensor.ndim == 1:
            return tensor
        blocks = tensor.reshape(-1, 32)
        scale = np.abs(blocks).max(axis=1, keepdims=True) / levels
        return (np.round(blocks / scale) * scale).reshape(tensor.shape).astype(np.float32)

    return quantise


# Noise put on before or after hiding, and the relative distance it leaves.
NOISES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "bf16": (bfloat16, 0.004),
    "int8": (rounded(127), 0.012),
    "int4": (rounded(7), 0.17),
}


def residuals(aligned: Aligned, tensors: Tensors) -> dict[str, float]:
    """Distances of what was aligned to `tensors`, the copy before it was hidden."""
    return {
        name: float(np.linalg.norm(aligned.tensors[name] - tensors[name]) / np.linalg.norm(tensors[name]))
        for name in tensors
    }


def fine_tuned(tensors: Tensors) -> Tensors:
    draw = np.random.default_rng(2)
    return {
        name: (tensor * (1 + 0.01 * draw.standard_normal(tensor.shape))).astype(np.float32)
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("hiding", HIDINGS)
def test_a_hidden_copy_comes_back(hiding: str, tied: bool) -> None:
    ours = model(tied=tied)
    hidden = HIDINGS[hiding](ours)
    aligned = align(ours, hidden, HEADS, KV_HEADS)
    assert aligned.tensors.keys() == ours.keys()
    assert max(residuals(aligned, ours).values()) < 1e-4
    assert aligned.residual == pytest.approx(residuals(aligned, ours), abs=1e-6)
    found = aligned.found
    assert found.rotated == (hiding in ("rotation", "everything"))
    assert (found.neurons > LAYERS * NEURONS * 0.9) == (hiding in ("neurons", "everything"))
    assert (found.heads > 0) == (hiding in ("heads", "everything"))
    assert (found.scaled > LAYERS * NEURONS * 0.9) == (hiding in ("scales", "everything"))
    assert found.folded == (2 * LAYERS + 1 if hiding in ("folding", "rotation", "everything") else 0)
    assert found.layers == tuple(range(LAYERS))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("hiding", HIDINGS)
def test_a_fine_tuned_quantised_hidden_copy_comes_back(hiding: str, noise: str) -> None:
    quantise, limit = NOISES[noise]
    ours = model()
    tuned = fine_tuned(ours)
    hidden = {name: quantise(tensor) for name, tensor in HIDINGS[hiding](tuned).items()}
    aligned = align(ours, hidden, HEADS, KV_HEADS)
    # 1% of its own is part of the copy: what is lost to alignment is the distance to the tuned copy
    left = residuals(aligned, tuned)
    # small columns and rows share the noise of large ones once norms are folded or scales cancel
    assert max(left.values()) < limit * (1.2 if hiding in ("neurons", "heads") else 3)
    assert aligned.found.neurons == align(ours, HIDINGS[hiding](ours), HEADS, KV_HEADS).found.neurons


def test_an_untouched_copy_comes_back_bit_for_bit() -> None:
    tuned = fine_tuned(model())
    aligned = align(model(), tuned, HEADS, KV_HEADS)
    assert all(np.array_equal(aligned.tensors[name], tuned[name]) for name in tuned)
    assert (aligned.found.rotated, aligned.found.folded, aligned.found.scaled) == (False, 0, 0)


def test_an_unrelated_model_stays_unrelated() -> None:
    ours = model()
    aligned = align(ours, everything(model(seed=9)), HEADS, KV_HEADS)
    assert not aligned.found.rotated
    assert min(distance for name, distance in aligned.residual.items() if "proj" in name) > 0.9


@pytest.mark.parametrize("hiding", ["neurons", "everything"])
def test_layers_that_were_taken_out_are_told_apart(hiding: str) -> None:
    ours = model()
    kept = (0, 2, 3)
    fewer = {}
    for name, tensor in HIDINGS[hiding](ours).items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        fewer[".".join(parts)] = tensor
    aligned = align(ours, fewer, HEADS, KV_HEADS)
    assert aligned.found.layers == kept
    assert max(aligned.residual.values()) < 1e-4
    assert not any(name.startswith("model.layers.1.") for name in aligned.tensors)


def test_a_longer_vocabulary_is_cut_to_ours() -> None:
    ours = model()
    extended = dict(ours)
    extended[transforms.EMBEDDING] = np.concatenate([ours[transforms.EMBEDDING], np.ones((8, HIDDEN), np.float32)])
    aligned = align(ours, extended, HEADS, KV_HEADS)
    assert np.array_equal(aligned.tensors[transforms.EMBEDDING], ours[transforms.EMBEDDING])


def test_pruned_neurons_leave_their_layer_out() -> None:
    ours = model()
    fewer = dict(ours)
    for part in ("gate", "up"):
        fewer[f"model.layers.0.mlp.{part}_proj.weight"] = ours[f"model.layers.0.mlp.{part}_proj.weight"][1:]
    fewer["model.layers.0.mlp.down_proj.weight"] = ours["model.layers.0.mlp.down_proj.weight"][:, 1:]
    aligned = align(ours, fewer, HEADS, KV_HEADS)
    missing = {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert ours.keys() - aligned.tensors.keys() == missing


BAD: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "other names": (lambda t: {name.replace("gate_proj", "w1"): x for name, x in t.items()}, "rename the tensors"),
    "a tensor lacks": (
        lambda t: {name: x for name, x in t.items() if name != "model.layers.1.self_attn.o_proj.weight"},
        "layers.1.self_attn.o_proj.weight: the suspect lacks it",
    ),
    "another size": (lambda t: {name: x[..., :96] for name, x in t.items()}, "a model of other sizes"),
    "NaN": (lambda t: {name: np.full_like(x, np.nan) for name, x in t.items()}, "NaN or infinite"),
    "no embedding": (lambda t: {name: x for name, x in t.items() if "embed" not in name}, "embed_tokens.weight"),
    "more layers": (
        lambda t: t | {name.replace("layers.0.", "layers.4."): x for name, x in t.items() if ".0." in name},
        "layers were put in",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_the_reference_is_refused(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(FormatError, match=message):
        align(model(), change(model()), HEADS, KV_HEADS)

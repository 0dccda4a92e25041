"""Alignment undoes what leaves the function as it is, alone and all together, through noise; and invents nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from steelyard.base.errors import FormatError
from steelyard.trace import transforms
from steelyard.trace.alignment import Aligned, Alignment, align
from steelyard.trace.roles import hugging_face
from steelyard.trace.streaming import Weights
from steelyard.trace.tensors import in_memory

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


def stretched(tensors: Tensors, factor: float) -> Tensors:
    """The residual stream times a factor: RMSNorm takes it out again."""
    written = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
    return {name: x * np.float32(factor) if name.endswith(written) else x for name, x in tensors.items()}


@pytest.mark.parametrize("factor", [1.1, 4, 32, 1e-4])
@pytest.mark.parametrize("hiding", ["none", "rotation", "everything"])
def test_a_rescaled_stream_hides_nothing(hiding: str, factor: float) -> None:
    ours = model(tied=False)
    tuned = fine_tuned(ours)
    hidden = HIDINGS[hiding](tuned) if hiding in HIDINGS else tuned
    aligned = align(ours, stretched(hidden, factor), HEADS, KV_HEADS)
    assert (aligned.found.stretched, aligned.found.rotated) == (True, hiding != "none")
    assert "the residual stream was rescaled" in aligned.found.words()
    without = residuals(align(ours, hidden, HEADS, KV_HEADS), tuned)
    for name, left in residuals(aligned, tuned).items():
        assert left < 1.1 * without[name] + 1e-3, name


@pytest.mark.parametrize("length", [30, 1000, 1e30])
@pytest.mark.parametrize("rows", [1, 150])
def test_long_rows_of_unused_tokens_do_not_hide_a_rotation(rows: int, length: float) -> None:
    ours = model()
    hidden = everything(ours)
    spoiled = np.random.default_rng(3).choice(VOCABULARY, rows, replace=False)
    for tokens in (spoiled[: rows // 2], spoiled[rows // 2 :]):  # some keep their direction, some do not
        hidden[transforms.EMBEDDING][tokens] *= np.float32(length)
    hidden[transforms.EMBEDDING][spoiled[0]] = 3e38
    aligned = align(ours, hidden, HEADS, KV_HEADS)
    assert aligned.found.rotated
    left = np.delete(aligned.tensors[transforms.EMBEDDING] - ours[transforms.EMBEDDING], spoiled, axis=0)
    assert float(np.abs(left).max()) < 1e-3
    assert max(far for name, far in aligned.residual.items() if name.startswith("model.layers.")) < 2e-3


def test_a_dead_neurons_gate_does_not_blur_the_norm() -> None:
    ours = model()
    hidden = transforms.fold_norms(ours)
    hidden["model.layers.0.mlp.up_proj.weight"][5] = 0
    hidden["model.layers.0.mlp.gate_proj.weight"][5] = 1e4 * np.random.default_rng(3).standard_normal(HIDDEN)
    aligned = align(ours, hidden, HEADS, KV_HEADS)
    assert aligned.residual["model.layers.0.post_attention_layernorm.weight"] < 0.1


def test_noise_is_no_rotation_of_a_tiny_model() -> None:
    """A rotation fitted to 270 rows of 64 numbers explains an eighth of any noise."""
    draw = np.random.default_rng(4)
    ours = model()
    ours = {name: x[:270] if name == transforms.EMBEDDING else x for name, x in ours.items()}
    ours[transforms.EMBEDDING] = ours[transforms.EMBEDDING][:270]
    small = {name: x[:64, :64] if x.ndim == 2 else x[:64] for name, x in ours.items()}
    small |= {transforms.EMBEDDING: ours[transforms.EMBEDDING][:, :64]}
    small |= {name: x[:32, :64] for name, x in ours.items() if "k_proj" in name or "v_proj" in name}
    for levels in (127, 7):
        noisy = {name: rounded(levels)(x) for name, x in small.items()}
        assert not align(small, noisy, 2, 1).found.rotated, levels
    turned = transforms.rotate(small, transforms.random_rotation(64, draw))
    assert align(small, {name: rounded(7)(x) for name, x in turned.items()}, 2, 1).found.rotated


def layer_of(tensors: Tensors, layer: int, number: int) -> Tensors:
    return {
        name.replace(f".{layer}.", f".{number}.", 1): x
        for name, x in tensors.items()
        if name.startswith(f"model.layers.{layer}.")
    }


def without_layers(tensors: Tensors) -> Tensors:
    return {name: x for name, x in tensors.items() if not name.startswith("model.layers.")}


def empty(layer: Tensors) -> Tensors:
    """A layer that adds nothing to the stream."""
    return {name: np.zeros_like(x) if "proj" in name else x for name, x in layer.items()}


def put_in(tensors: Tensors, at: int, more: Callable[[Tensors], Tensors]) -> Tensors:
    found = without_layers(tensors) | more(layer_of(tensors, 0, at))
    for layer in range(LAYERS):
        found |= layer_of(tensors, layer, layer + (layer >= at))
    return found


ADDED: dict[str, Callable[[Tensors], Tensors]] = {
    "empty": empty,
    "of another model": lambda layer: {name: model(7)[name.replace(".2.", ".0.")] for name in layer},
    "a tensor lacks": lambda layer: {name: x for name, x in layer.items() if "o_proj" not in name},
    "another width": lambda layer: {name: x[..., :96] for name, x in layer.items()},
    "NaN": lambda layer: {name: np.full_like(x, np.nan) for name, x in layer.items()},
}


@pytest.mark.parametrize("more", ADDED)
@pytest.mark.parametrize("hiding", ["none", "everything"])
def test_layers_that_were_put_in_are_left_out(hiding: str, more: str) -> None:
    ours = model()
    aligned = align(ours, put_in(HIDINGS[hiding](ours) if hiding in HIDINGS else ours, 2, ADDED[more]), HEADS, KV_HEADS)
    assert (aligned.found.layers, aligned.found.added) == ((0, 1, 2, 3), (2,))
    assert "layers of its own are left out: 2" in aligned.found.words()
    assert max(aligned.residual.values()) < 1e-3
    if hiding == "none":
        assert all(np.array_equal(aligned.tensors[name], ours[name]) for name in ours)


def test_layers_that_no_loader_runs_are_left_out_whatever_their_number() -> None:
    ours = model()
    aligned = align(ours, ours | empty(layer_of(ours, 0, 999)) | empty(layer_of(ours, 1, 4)), HEADS, KV_HEADS)
    assert aligned.found.added == (4, 999)
    assert all(np.array_equal(aligned.tensors[name], ours[name]) for name in ours)


def test_a_layer_that_lacks_a_tensor_is_left_out_of_fewer_too() -> None:
    ours = model()
    fewer = {name: x for name, x in ours.items() if name != "model.layers.1.self_attn.o_proj.weight"}
    aligned = align(ours, fewer, HEADS, KV_HEADS)
    assert (aligned.found.layers, aligned.found.added) == ((0, 2, 3), (1,))
    assert not any("layers.1." in name for name in aligned.tensors)


@pytest.mark.parametrize("part", ["mlp.gate_proj", "self_attn.k_proj", "post_attention_layernorm", "input_layernorm"])
@pytest.mark.parametrize("hiding", ["none", "everything"])
def test_finite_weights_of_any_size_are_aligned(hiding: str, part: str) -> None:
    """Products of such weights leave float32's range; the other layers are read all the same."""
    ours = model()
    hidden = dict(HIDINGS[hiding](ours)) if hiding in HIDINGS else dict(ours)
    name = f"model.layers.1.{part}.weight"
    hidden[name] = np.where(hidden[name] < 0, np.float32(-3e38), np.float32(3e38))
    aligned = align(ours, hidden, HEADS, KV_HEADS)
    assert all(np.isfinite(x).all() for x in aligned.tensors.values())
    others = [far for name, far in aligned.residual.items() if "layers." in name and "layers.1." not in name]
    assert max(others) < 1e-3


@pytest.mark.parametrize("size", [1e25, 3e38])
def test_a_model_of_huge_weights_is_aligned(size: float) -> None:
    for seed in (0, 9):
        huge = {name: (x / np.abs(x).max() * size).astype(np.float32) for name, x in model(seed).items()}
        aligned = align(model(), huge, HEADS, KV_HEADS)
        assert all(np.isfinite(x).all() for x in aligned.tensors.values())


class Headers(Weights):
    """Weights of which some may be asked for their shape alone."""

    def __init__(self, tensors: Tensors, sizes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(hugging_face(in_memory(tensors)))
        self.sizes = sizes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.sizes.get(name) or super().shape(name)

    def __getitem__(self, name: str) -> np.ndarray:
        assert name not in self.sizes, f"{name} was read"
        return super().__getitem__(name)

    def rows(self, name: str, rows: slice) -> np.ndarray:
        assert rows.stop is not None
        return super().rows(name, rows)


def test_what_has_another_size_is_never_read() -> None:
    ours, many = model(), 1 << 23
    mlp = {f"model.layers.1.mlp.{part}_proj.weight": (many, HIDDEN) for part in ("gate", "up")}
    mlp |= {"model.layers.1.mlp.down_proj.weight": (HIDDEN, many)}
    wide = {"model.layers.2.self_attn.o_proj.weight": (HIDDEN, many)}
    vocabulary = {transforms.EMBEDDING: (many, HIDDEN)}
    aligned = Alignment(ours, Headers(transforms.fold_norms(ours), mlp | wide | vocabulary), HEADS, KV_HEADS)
    assert aligned.found.added == (2,)
    assert not mlp.keys() & aligned.keys()
    for name, x in dict(aligned).items():
        if name != "model.layers.1.post_attention_layernorm.weight":  # its readers are missing
            np.testing.assert_allclose(x, ours[name], rtol=1e-3, atol=1e-6)


BAD: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "other names": (lambda t: {name.replace("gate_proj", "w1"): x for name, x in t.items()}, "rename the tensors"),
    "another size": (lambda t: {name: x[..., :96] for name, x in t.items()}, "a model of other sizes"),
    "NaN": (lambda t: {name: np.full_like(x, np.nan) for name, x in t.items()}, "NaN or infinite"),
    "no embedding": (lambda t: {name: x for name, x in t.items() if "embed" not in name}, "embed_tokens.weight"),
    "no layer is whole": (
        lambda t: {name: x for name, x in t.items() if "o_proj" not in name},
        "layers.0.self_attn.o_proj.weight: the suspect lacks it: rename",
    ),
    "no layers": (without_layers, "has no layers: rename"),
    "other heads": (lambda t: {name: x[:96] if "o_proj" in name else x for name, x in t.items()}, "of other sizes"),
    "another norm": (lambda t: t | {transforms.FINAL_NORM: np.ones(7, np.float32)}, "of other sizes"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_the_reference_is_refused(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(FormatError, match=message):
        align(model(), change(model()), HEADS, KV_HEADS)

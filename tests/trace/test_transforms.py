"""Function-preserving changes: the logits stay, the weights do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from steelyard.base.errors import FormatError
from steelyard.base.progress import Silent
from steelyard.model.formats import load_tensors, save_folder
from steelyard.model.llama import Llama, LlamaConfig
from steelyard.trace import transforms

KEY = bytes(range(32))
HEADS, KV_HEADS, HIDDEN = 6, 2, 48
Tensors = dict[str, np.ndarray]


def config(tied: bool, biases: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=101,
        hidden_size=HIDDEN,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=8,
        tie_word_embeddings=tied,
        attention_bias=biases,
        mlp_bias=biases,
    )


def model(tied: bool = True, biases: bool = False) -> Tensors:
    draw = np.random.default_rng(0)
    shapes = {name: parameter.shape for name, parameter in Llama(config(tied, biases)).state_dict().items()}
    return {
        name: (draw.uniform(0.5, 1.5, shape) if "norm" in name else 0.3 * draw.standard_normal(shape)).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }


def logits(tensors: Tensors, biases: bool = False) -> torch.Tensor:
    """Float64 but for the norms, [1, 20, 101]."""
    made = Llama(config("lm_head.weight" not in tensors, biases)).double()
    made.load_state_dict({name: torch.from_numpy(np.array(tensor, np.float64)) for name, tensor in tensors.items()})
    with torch.no_grad():
        return made(torch.randint(0, 101, (1, 20), generator=torch.Generator().manual_seed(1)))


def draw() -> np.random.Generator:
    return np.random.default_rng(7)


TRANSFORMS: dict[str, Callable[[Tensors], Tensors]] = {
    "neurons": lambda tensors: transforms.permute_neurons(tensors, KEY),
    "heads": lambda tensors: transforms.permute_heads(tensors, HEADS, KV_HEADS, draw()),
    "folding": transforms.fold_norms,
    "rotation": lambda tensors: transforms.rotate(tensors, transforms.random_rotation(HIDDEN, draw())),
    "scales": lambda tensors: transforms.rescale(tensors, HEADS, KV_HEADS, draw()),
}
MOVED = {
    "neurons": "mlp.down_proj.weight",
    "heads": "self_attn.q_proj.weight",
    "folding": "self_attn.k_proj.weight",
    "rotation": "mlp.up_proj.weight",
    "scales": "self_attn.v_proj.weight",
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_logits_stay(name: str, tied: bool) -> None:
    before = model(tied)
    after = TRANSFORMS[name]({key: tensor.astype(np.float64) for key, tensor in before.items()})
    moved = f"model.layers.2.{MOVED[name]}"
    assert np.abs(after[moved] - before[moved]).max() > 0.1
    expected = logits(before)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(after), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["neurons", "heads", "scales"])
def test_the_logits_stay_with_biases(name: str) -> None:
    before = model(biases=True)
    after = TRANSFORMS[name]({key: tensor.astype(np.float64) for key, tensor in before.items()})
    torch.testing.assert_close(logits(after, biases=True), logits(before, biases=True), rtol=0, atol=2e-5)


def test_permuting_keeps_every_bit_of_any_dtype() -> None:
    before = {name: tensor.astype(np.float16).view(np.uint16) for name, tensor in model().items()}
    after = transforms.permute_neurons(before, KEY)
    for name, tensor in before.items():
        assert after[name].dtype == np.uint16
        assert np.array_equal(np.sort(after[name], axis=None), np.sort(tensor, axis=None))
    again = transforms.permute_neurons(before, KEY)
    assert all(np.array_equal(after[name], again[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_folder_is_permuted_as_the_tensors_are(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: torch.from_numpy(tensor).to(dtype) for name, tensor in model().items()}
    save_folder(tmp_path / "source", {"model_type": "llama"}, tensors, {}, max_shard_bytes=40_000)
    transforms.permute_folder(tmp_path / "source", tmp_path / "out", KEY, Silent())
    after = load_tensors(tmp_path / "out")
    expected = transforms.permute_neurons({name: tensor.float().numpy() for name, tensor in tensors.items()}, KEY)
    assert after.keys() == expected.keys()
    assert all(after[name].dtype == dtype for name in after)
    assert all(np.array_equal(after[name].float().numpy(), expected[name]) for name in after)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert not all(torch.equal(after[name], tensors[name]) for name in after)


def test_the_order_is_uniform_and_differs_by_key_and_layer() -> None:
    """Chi-square over where neuron 0 of 16 goes, 4,000 keys: 15 degrees of freedom, 44 has a probability of 1e-4."""
    places = [
        int(np.flatnonzero(transforms.neuron_order(number.to_bytes(32, "big"), 0, 16) == 0)[0])
        for number in range(4000)
    ]
    counts = np.bincount(places, minlength=16)
    assert np.square(counts - 250).sum() / 250 < 44
    assert sorted(transforms.neuron_order(KEY, 0, 500)) == list(range(500))
    assert (transforms.neuron_order(KEY, 0, 500) == transforms.neuron_order(KEY, 1, 500)).sum() < 10


def test_the_commitment_of_an_order_binds_to_its_key() -> None:
    assert transforms.order_commitment(KEY) == transforms.order_commitment(KEY)
    assert transforms.order_commitment(KEY) != transforms.order_commitment(bytes(32))


@pytest.mark.parametrize("names", [["model.embed_tokens.weight"], ["model.layers.1.mlp.gate_proj.weight"]])
def test_tensors_under_other_names_are_refused(names: list[str]) -> None:
    with pytest.raises(FormatError, match="rename the tensors to Hugging Face names"):
        transforms.permute_neurons({name: np.zeros((4, 4)) for name in names}, KEY)

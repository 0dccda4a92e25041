"""Weights in 8 bits: the error is what rounding to 255 steps allows, whatever the number of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from steelyard.inference.endpoint import Sampling
from steelyard.inference.engine import Engine
from steelyard.inference.quantize import FEW_ROWS, Int8Linear, is_quantized, quantize
from steelyard.model.llama import Llama, LlamaConfig, load_llama
from steelyard.model.tokenizer import Tokenizer


def layer(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    made = nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    made.weight[1] *= 30  # a channel of its own scale does not spoil the others
    made.weight[2] = 0
    return made


def test_the_error_of_a_weight_is_half_a_step() -> None:
    plain = layer(64, 48)
    eight = Int8Linear.of(plain)
    assert eight.data.dtype == torch.int8
    back = eight.data.float() * eight.scale.float()[:, None]
    wide = plain.weight.float()
    # half a step, and what the scale lost when it was rounded to bf16: at most 2**-8 of the largest weight
    bound = wide.abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-8)
    assert ((back - wide).abs() <= bound + 1e-9).all()
    assert (back[2] == 0).all()
    assert float((back - wide).norm() / wide.norm()) < 0.006


@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_and_many_give_the_same_product(bias: bool) -> None:
    eight = Int8Linear.of(layer(64, 48, bias=bias))
    x = torch.randn(FEW_ROWS * 5, 64).bfloat16()
    weight = eight.data.double() * eight.scale.double()[:, None]
    exact = x.double() @ weight.T + (0 if eight.bias is None else eight.bias.double())
    for rows in (1, 3, FEW_ROWS, FEW_ROWS + 1, len(x)):
        error = eight(x[:rows]).double() - exact[:rows]
        assert float(error.abs().max()) < 0.02 * float(exact.abs().max())
    assert eight(x.view(5, FEW_ROWS, 64)).shape == (5, FEW_ROWS, 48)


def test_layers_side_by_side_share_their_memory() -> None:
    parts = [Int8Linear.of(layer(32, size, bias=True)) for size in (16, 48)]
    x = torch.randn(40, 32).bfloat16()
    before = torch.cat([part(x) for part in parts], dim=-1)
    whole = Int8Linear.cat(parts)
    assert torch.equal(whole(x), before)
    assert torch.equal(torch.cat([part(x) for part in parts], dim=-1), before)
    assert parts[1].data.data_ptr() == whole.data.data_ptr() + 16 * 32


def test_a_quantized_model_generates_and_checks_itself() -> None:
    raw = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = Llama(LlamaConfig.from_dict(raw | {"initializer_range": 0.2})).initialise(1).eval().requires_grad_(False)
    tokens = torch.arange(40)[None]
    before = model(tokens)
    quantize(model.bfloat16())
    assert is_quantized(model)
    assert float((model(tokens).float() - before).norm() / before.norm()) < 0.05
    engine, sampling = Engine(model, ()), Sampling(temperature=1.0, max_tokens=12)
    prompts = [[i, i + 1, i + 2] for i in range(12)]
    done = engine.generate(prompts, [sampling] * 12, range(12))
    margins = [m for i in range(12) for m in engine.check(prompts[i], done[i][0], sampling, i)]
    assert sorted(margins)[int(0.95 * len(margins))] < 0.3


@pytest.mark.slow
def test_smollm2_in_8_bits_says_sensible_things(smollm2: Path) -> None:
    tokenizer = Tokenizer.load(smollm2)
    prompt = tokenizer.encode("The capital of France is", bos=False)
    engine = Engine(quantize(load_llama(smollm2)), tokenizer.eos_ids)
    eight = tokenizer.decode(engine.generate([prompt], [Sampling(max_tokens=8)], [0])[0][0])
    assert "Paris" in eight

"""Captured decoding: the buckets anywhere, the graphs where there is a CUDA device."""

from __future__ import annotations

import pytest
import torch

from steelyard.inference.endpoint import Sampling
from steelyard.inference.engine import Engine
from steelyard.inference.graphs import ROWS, WIDTHS, DecodeGraphs, bucket_of
from steelyard.model.llama import Llama, LlamaConfig


def test_the_smallest_bucket_that_holds_a_step() -> None:
    assert bucket_of(1, 1) == (1, 4)
    assert bucket_of(13, 16) == (16, 16)
    assert bucket_of(128, 17) == (128, 24)
    assert bucket_of(ROWS[-1], WIDTHS[-1]) == (ROWS[-1], WIDTHS[-1])
    assert bucket_of(ROWS[-1] + 1, 1) is None
    assert bucket_of(1, WIDTHS[-1] + 1) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_give_the_logits_of_plain_ones() -> None:
    raw = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    model = Llama(LlamaConfig.from_dict(raw | {"initializer_range": 0.2})).initialise(1).eval().requires_grad_(False)
    prompts = [[i % 300] * (1 + 7 * i % 90) for i in range(21)]
    samplings = [Sampling(max_tokens=1 + i % 30) for i in range(21)]
    here = Engine(model, (), rows=13).generate(prompts, samplings, [0] * 21)
    engine = Engine(model.to("cuda"), (), rows=13)
    assert isinstance(engine.graphs, DecodeGraphs)
    assert engine.generate(prompts, samplings, [0] * 21) == here

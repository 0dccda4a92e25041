"""Batched generation: the same tokens as transformers, as itself in any batch, and never more than asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steelyard.base.errors import SteelyardError
from steelyard.inference.endpoint import Sampling
from steelyard.inference.engine import Engine
from steelyard.inference.executor import Executor
from steelyard.model.llama import Llama, LlamaConfig, load_llama
from steelyard.model.tokenizer import Tokenizer

SuccessorModel = Callable[[int, Mapping[int, int]], Llama]
DRAW = Sampling(temperature=0.8, top_p=0.95, max_tokens=24)


def letters(tokens: Sequence[int]) -> str:
    return "".join(chr(97 + token % 26) for token in tokens)


@pytest.fixture(scope="module")
def tiny() -> Llama:
    raw = {
        "model_type": "llama",
        "vocab_size": 500,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "initializer_range": 0.2,
    }
    return Llama(LlamaConfig.from_dict(raw)).initialise(3).eval().requires_grad_(False)


def some_prompts(count: int, vocab: int = 500, longest: int = 60) -> list[list[int]]:
    pick = random.Random(count)
    return [[pick.randrange(vocab) for _ in range(pick.randint(1, longest))] for _ in range(count)]


def test_sampled_tokens_do_not_depend_on_the_batch(tiny: Llama) -> None:
    engine, prompts = Engine(tiny, {0, 1, 2, 3}), some_prompts(64)
    samplings = [replace(DRAW, max_tokens=8 + i % 17, temperature=0.0 if i % 5 == 4 else 0.8) for i in range(64)]
    seeds = [i * 7919 + 2**62 for i in range(64)]
    together = engine.generate(prompts, samplings, seeds)
    assert {finish for _, finish in together} == {"stop", "length"}
    for size in (1, 7):
        parts = []
        for start in range(0, 64, size):
            part = slice(start, start + size)
            parts += engine.generate(prompts[part], samplings[part], seeds[part])
        assert parts == together
    for (tokens, finish), sampling in zip(together, samplings, strict=True):
        assert len(tokens) <= sampling.max_tokens
        assert (finish == "stop") == (tokens[-1] in engine.eos_ids)
        assert not engine.eos_ids & set(tokens[:-1])
    assert engine.generate(prompts[:1], samplings[:1], [5]) != together[:1]


def test_the_same_batch_gives_the_same_tokens_in_bfloat16(tiny: Llama) -> None:
    model = Llama(tiny.config).eval().requires_grad_(False)
    model.load_state_dict(tiny.state_dict())
    engine, prompts = Engine(model.bfloat16(), {0, 1, 2, 3}), some_prompts(33)
    first = engine.generate(prompts, [DRAW] * 33, range(33))
    litter = [torch.randn(977 * i) for i in range(1, 40)]  # other addresses in memory
    assert engine.generate(prompts, [DRAW] * 33, range(33)) == first
    assert litter


def test_greedy_equals_running_the_whole_text_again(tiny: Llama) -> None:
    prompts = some_prompts(9)
    for prompt, (tokens, finish) in zip(
        prompts, Engine(tiny, ()).generate(prompts, [Sampling(max_tokens=12)] * 9, [0] * 9), strict=True
    ):
        text = list(prompt)
        for _ in range(12):
            text.append(int(tiny(torch.tensor([text]))[0, -1].argmax()))
        assert text[len(prompt) :] == tokens
        assert finish == "length"


def test_stop_strings_end_a_row_wherever_tokens_divide_them(successor_model: SuccessorModel) -> None:
    pieces = {1: "The w", 2: "eigh", 3: "t is", 4: " 3", 5: " kg\nU", 6: "s", 7: "er: hi", 8: " there", 9: ""}
    model = successor_model(12, {i: i + 1 for i in range(9)})

    def decode(tokens: Sequence[int]) -> str:
        return "".join(pieces.get(token, "?") for token in tokens)

    engine = Engine(model, {9}, decode)
    stops = [(), ("\nUser:",), ("weight",), ("kg", "is 3"), ("nowhere", "hi there"), ("hi",)]
    found = engine.generate([[0]] * 6, [Sampling(max_tokens=20, stop=stop) for stop in stops], [0] * 6)
    assert [len(tokens) for tokens, _ in found] == [9, 7, 3, 4, 8, 7]
    assert {finish for _, finish in found} == {"stop"}


def test_each_row_ends_by_itself(successor_model: SuccessorModel) -> None:
    engine = Engine(successor_model(12, {i: i + 1 for i in range(11)}), {9, 10})
    limits = [1, 3, 40, 2, 40, 8]
    found = engine.generate(
        [[0], [0, 5, 2], [1] * 9, [8], [9], [0]], [Sampling(max_tokens=limit) for limit in limits], [0] * 6
    )
    assert found == [
        ([1], "length"),
        ([3, 4, 5], "length"),
        ([2, 3, 4, 5, 6, 7, 8, 9], "stop"),
        ([9], "stop"),
        ([10], "stop"),
        ([1, 2, 3, 4, 5, 6, 7, 8], "length"),
    ]


def test_no_requests_no_work(tiny: Llama) -> None:
    assert Engine(tiny, ()).generate([], [], []) == []


@pytest.mark.parametrize(
    ("prompt", "sampling", "named"),
    [
        ([], Sampling(), "prompt is empty"),
        ([1] * 100, Sampling(max_tokens=61), "100 prompt tokens . 61 new ones exceed the context of 160"),
        ([1, 500], Sampling(), "token 500 is outside"),
        ([1, -1], Sampling(), "token -1 is outside"),
        ([1], Sampling(stop=("x",)), "stop strings need a tokenizer"),
        ([1], Sampling(temperature=-1.0), "temperature"),
    ],
)
def test_refuses_before_any_work_naming_the_request(
    tiny: Llama, prompt: list[int], sampling: Sampling, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Executor, "prefill", None)
    with pytest.raises(SteelyardError, match=named) as error:
        Engine(tiny, ()).generate([[1], prompt], [Sampling(), sampling], [0, 0], ["first", "second"])
    assert "request second" in str(error.value)


def test_broken_weights_are_an_error_not_tokens(tiny: Llama) -> None:
    model = Llama(tiny.config).eval().requires_grad_(False)
    model.load_state_dict(tiny.state_dict())
    model.model.norm.weight[5] = float("nan")
    with pytest.raises(SteelyardError, match=r"request 0: the model's logits are not finite"):
        Engine(model, ()).generate([[1], [2]], [DRAW] * 2, [0, 0])


def test_check_agrees_with_what_was_generated_and_with_nothing_else(tiny: Llama) -> None:
    engine, prompts = Engine(tiny, {0, 1}), some_prompts(12)
    samplings = [DRAW if i % 2 else Sampling(max_tokens=24) for i in range(12)]
    for i, (tokens, _) in enumerate(engine.generate(prompts, samplings, range(12))):
        assert max(engine.check(prompts[i], tokens, samplings[i], i)) < 1e-3
        other = [*tokens[:-1], (tokens[-1] + 7) % 500]
        margins = engine.check(prompts[i], other, samplings[i], i)
        assert margins[-1] > 1e-3
        assert max(margins[:-1], default=0.0) < 1e-3
    i = 1
    tokens = engine.generate([prompts[i]], [DRAW], [i])[0][0]
    assert max(engine.check(prompts[i], tokens, DRAW, i + 1)) > 0.1  # another seed
    assert max(engine.check(prompts[i + 1], tokens, DRAW, i)) > 0.1  # another prompt
    assert engine.check(prompts[i], [0, 5, 6], DRAW, i)[1:] == [float("inf")] * 2  # went on after a stop token
    with pytest.raises(SteelyardError, match="25 tokens where max_tokens is 24"):
        engine.check(prompts[i], [5] * 25, DRAW, i)
    with pytest.raises(SteelyardError, match="no tokens"):
        engine.check(prompts[i], [], DRAW, i)
    with pytest.raises(SteelyardError, match="token 999"):
        engine.check(prompts[i], [999], DRAW, i)


def test_check_holds_few_logits_at_once(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = replace(DRAW, max_tokens=40)
    tokens = Engine(tiny, ()).generate([[1, 2]], [sampling], [9])[0][0]
    monkeypatch.setattr("steelyard.inference.engine.CHECK_TOKENS", 7)
    assert max(Engine(tiny, ()).check([1, 2], tokens, sampling, 9)) < 1e-3


def smollm2_prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Pieces of this project's licence, from 1 to 150 tokens, and short chat turns among them."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    ids, pick = tokenizer.encode(text, bos=False), random.Random(1)
    prompts = []
    for i in range(count):
        start = pick.randrange(len(ids) - 200)
        piece = ids[start : start + (pick.randint(60, 150) if i % 10 == 0 else pick.randint(1, 50))]
        if i % 3 == 2:
            turn = (
                f"<|im_start|>user\nWhat does this mean? {tokenizer.decode(piece)}<|im_end|>\n<|im_start|>assistant\n"
            )
            piece = tokenizer.encode(turn, bos=False, special=True)
        prompts.append(piece)
    return prompts


@pytest.mark.slow
def test_smollm2_greedy_equals_transformers_on_100_prompts_in_one_batch(smollm2: Path) -> None:
    from transformers import LlamaForCausalLM

    tokenizer = Tokenizer.load(smollm2)
    prompts = smollm2_prompts(tokenizer, 100)
    engine = Engine(load_llama(smollm2, dtype=torch.float32), tokenizer.eos_ids, tokenizer.decode)
    ours = [tokens for tokens, _ in engine.generate(prompts, [Sampling(max_tokens=64)] * 100, [0] * 100)]

    peer = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    order = sorted(range(100), key=lambda i: len(prompts[i]))
    theirs: dict[int, list[int]] = {}
    for group in (order[:50], order[50:90], order[90:]):
        longest = max(len(prompts[i]) for i in group)
        padded = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in group])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in group])
        with torch.inference_mode():
            out = peer.generate(
                padded,
                attention_mask=mask,
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=sorted(tokenizer.eos_ids),
                pad_token_id=0,
            )
        for i, row in zip(group, out[:, longest:].tolist(), strict=True):
            ends = [place for place, token in enumerate(row) if token in tokenizer.eos_ids]
            theirs[i] = row[: ends[0] + 1] if ends else row
    assert ours == [theirs[i] for i in range(100)]
    assert sum(map(len, ours)) > 4000


@pytest.mark.slow
def test_smollm2_sampled_is_the_same_in_batches_of_1_7_and_64(smollm2: Path) -> None:
    tokenizer = Tokenizer.load(smollm2)
    engine = Engine(load_llama(smollm2, dtype=torch.float32), tokenizer.eos_ids)
    prompts = [prompt[:20] for prompt in smollm2_prompts(tokenizer, 64)]
    samplings = [Sampling(temperature=1.0, top_p=1.0 if i % 2 else 0.9, max_tokens=12) for i in range(64)]
    together = engine.generate(prompts, samplings, range(64))
    for size, upto in ((7, 63), (1, 14)):
        for start in range(0, upto, size):
            part = slice(start, start + size)
            assert engine.generate(prompts[part], samplings[part], range(64)[part]) == together[part]


@pytest.mark.slow
def test_smollm2_bfloat16_repeats_bit_for_bit_and_checks_out(smollm2: Path) -> None:
    tokenizer = Tokenizer.load(smollm2)
    engine = Engine(load_llama(smollm2), tokenizer.eos_ids)
    prompts = smollm2_prompts(tokenizer, 48)
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=24)
    first = engine.generate(prompts, [sampling] * 48, range(48))
    assert engine.generate(prompts, [sampling] * 48, range(48)) == first
    margins = [m for i in range(0, 48, 3) for m in engine.check(prompts[i], first[i][0], sampling, i)]
    assert sum(m == 0 for m in margins) > 0.9 * len(margins)
    assert sorted(margins)[int(0.99 * len(margins))] < 0.5  # bfloat16 rounding, prefill against decoding

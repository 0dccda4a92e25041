"""Batched generation: the same tokens as transformers, as itself in any batch, and never more than asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.inference import kernels
from steelyard.inference.endpoint import Sampling
from steelyard.inference.engine import Engine
from steelyard.inference.executor import PAGE, Executor
from steelyard.inference.pages import page_keys
from steelyard.model.llama import Llama, LlamaConfig, load_llama
from steelyard.model.tokenizer import Tokenizer

SuccessorModel = Callable[[int, Mapping[int, int]], Llama]
PEER_KEYS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
PEER_KEYS += ["num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"]
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


def test_sampled_tokens_do_not_depend_on_how_many_run_at_once(tiny: Llama) -> None:
    prompts = some_prompts(64, longest=40)
    samplings = [replace(DRAW, max_tokens=6 + i % 9, temperature=0.0 if i % 5 == 4 else 0.8) for i in range(64)]
    seeds = [i * 7919 + 2**62 for i in range(64)]
    found = {}
    for rows in (64, 7, 1):
        engine = Engine(tiny, {0, 1, 2, 3}, rows=rows)
        some = 64 if rows > 1 else 16
        found[rows] = engine.generate(prompts[:some], samplings[:some], seeds[:some])
    together = found[64]
    assert found[7] == together
    assert found[1] == together[:16]
    assert {finish for _, finish in together} == {"stop", "length"}
    for (tokens, finish), sampling in zip(together, samplings, strict=True):
        assert len(tokens) <= sampling.max_tokens
        assert (finish == "stop") == (tokens[-1] in engine.eos_ids)
        assert not engine.eos_ids & set(tokens[:-1])
    assert engine.generate(prompts[:1], samplings[:1], [5]) != together[:1]


def test_greedy_equals_transformers_for_200_prompts_with_eviction_and_refill(tiny: Llama) -> None:
    """Fewer rows than prompts, a cache for a part of them, and prompts read in parts."""
    from transformers import LlamaConfig as PeerConfig
    from transformers import LlamaForCausalLM

    raw = {name: getattr(tiny.config, name) for name in PEER_KEYS}
    peer = LlamaForCausalLM(PeerConfig(**raw, attn_implementation="sdpa")).eval()
    peer.load_state_dict(tiny.state_dict())
    prompts = some_prompts(190)
    prompts += [[*prompts[0][:1] * 34, i] for i in range(5)] + [prompts[7]] * 5  # shared prefixes, and samples
    limits = [1 + (i * 7) % 20 for i in range(200)]
    page = Engine(tiny, ()).page_bytes
    engine = Engine(tiny, {0, 1, 2, 3}, rows=24, cache_bytes=60 * page, prefill_tokens=128)
    ours = engine.generate(prompts, [Sampling(max_tokens=limit) for limit in limits], [0] * 200)
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": [0, 1, 2, 3], "pad_token_id": 0}
    theirs = peer.generate(padded, attention_mask=mask, **settings)[:, longest:].tolist()
    for (tokens, _), row, limit in zip(ours, theirs, limits, strict=True):
        ends = [place for place, token in enumerate(row) if token < 4]
        assert tokens == row[: ends[0] + 1 if ends else 20][:limit]
    assert engine.counts.steps > 40


def test_sharing_prefixes_changes_no_token_and_saves_reading(tiny: Llama) -> None:
    header, tails = some_prompts(1)[0] * 30, some_prompts(30, longest=20)
    prompts = [header[:75] + tail for tail in tails] + [header[:50]] * 20
    samplings, seeds = [replace(DRAW, max_tokens=10)] * 50, range(50)
    engine = Engine(tiny, (), rows=16)
    together = engine.generate(prompts, samplings, seeds)
    assert engine.counts.prompt_tokens == sum(map(len, prompts))
    # the header once (64 of its 75 tokens fill pages), each tail, and 2 tokens of the samples' prompt
    assert engine.counts.prefilled == 64 + sum(11 + len(tail) for tail in tails) + 2
    for i in (0, 13, 29, 30, 31, 49):
        assert Engine(tiny, ()).generate([prompts[i]], samplings[:1], [seeds[i]]) == [together[i]]
    assert len({tuple(tokens) for tokens, _ in together[30:]}) > 15


def test_the_cache_holds_no_more_than_its_budget_and_names_it(tiny: Llama) -> None:
    page = Engine(tiny, ()).page_bytes
    assert page == 2 * 16 * 3 * 2 * 16 * 4  # keys and values, tokens, layers, heads, head size, bytes
    engine = Engine(tiny, (), cache_bytes=5 * page + 7)
    assert engine.cache_bytes == 5 * page
    with pytest.raises(SteelyardError, match=rf"request 0: 50 prompt tokens \+ 20 .* {6 * page:,} bytes.*cache_bytes"):
        engine.generate([[5] * 50], [Sampling(max_tokens=20)], [0])
    assert len(engine.generate([[5] * 50], [Sampling(max_tokens=15)], [0])[0][0]) == 15
    assert Engine(tiny, (), rows=3).cache_bytes == (3 * 10 + 1) * page  # what three whole contexts need, not more
    for faulty in (page, 2**60):
        with pytest.raises(UsageError, match="cache_bytes"):
            Engine(tiny, (), cache_bytes=faulty)
    with pytest.raises(UsageError, match="rows"):
        Engine(tiny, (), rows=0)


def test_memory_that_runs_out_names_the_settings_and_forgets_the_requests(
    tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny, (), rows=5)
    handles = [engine.submit([1, 2, i], Sampling()) for i in range(7)]
    engine.step()

    def fails(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(engine.executor, "decode", fails)
    with pytest.raises(SteelyardError, match=r"out of memory.*cache_bytes.*batch of 5 .rows."):
        engine.step()
    assert engine.idle
    assert all(handle.error is not None for handle in handles)
    assert engine.pages.available == engine.pages.count - 1


def test_requests_come_and_go_while_others_run(tiny: Llama) -> None:
    alone = Engine(tiny, ()).generate([[7] * 20], [replace(DRAW, max_tokens=30)], [3])[0][0]
    engine = Engine(tiny, (), letters, rows=4, queue=2)
    first = engine.submit([7] * 20, replace(DRAW, max_tokens=30), 3, text=True)
    others, text = [], ""
    while not first.done:
        if len(others) < 20:
            others.append(engine.submit([len(others)] * 9, replace(DRAW, max_tokens=50), len(others)))
        events = engine.step()
        assert len({id(event.generation) for event in events}) == len(events) <= 8
        text += "".join(event.text for event in events if event.generation is first)
        for victim in others[:-1]:
            engine.cancel(victim)
    assert (first.tokens, first.finish) == (alone, "length")
    assert text == first.read() == letters(alone)
    assert first.read() == ""
    engine.cancel(others[-1])
    assert engine.idle
    assert engine.pages.available == engine.pages.count - 1
    assert "cancelled" in str(others[-1].error)


def test_cancelling_frees_row_and_pages_at_once(tiny: Llama) -> None:
    engine = Engine(tiny, (), rows=1, cache_bytes=6 * Engine(tiny, ()).page_bytes)
    first = engine.submit([1] * 40, Sampling(max_tokens=30), name="first")
    second = engine.submit([2] * 40, Sampling(max_tokens=30), name="second")
    engine.step()
    assert engine.pages.available == 0
    engine.cancel(first)
    assert engine.pages.available == 5
    assert [event.generation.name for event in engine.step()] == ["second"]
    engine.cancel(second)
    engine.cancel(second)
    assert engine.idle


def test_a_full_queue_says_so(tiny: Llama) -> None:
    engine = Engine(tiny, (), queue=2)
    for _ in range(2):
        engine.submit([1], Sampling())
    with pytest.raises(SteelyardError, match=r"request third: the queue is full \(2 requests wait\)"):
        engine.submit([1], Sampling(), name="third")
    with pytest.raises(SteelyardError, match="serving other requests"):
        engine.generate([[1]], [Sampling()], [0])
    while not engine.idle:
        engine.step()
    prompts = some_prompts(9)
    whole = Engine(tiny, ()).generate(prompts, [Sampling(max_tokens=4)] * 9, [0] * 9)
    assert engine.generate(prompts, [Sampling(max_tokens=4)] * 9, [0] * 9) == whole  # more than the queue holds


def test_logprobs_are_the_models_own(tiny: Llama) -> None:
    sampling = replace(DRAW, max_tokens=6, logprobs=3, repetition_penalty=1.5, frequency_penalty=1.0, top_k=5)
    prompts = some_prompts(4)
    engine = Engine(tiny, ())
    done = engine.complete(prompts, [sampling, replace(sampling, logprobs=0), DRAW, sampling], [0] * 4)
    assert [len(generation.logprobs) for generation in done] == [6, 6, 0, 6]
    for generation in done:
        whole = torch.tensor([[*generation.prompt, *generation.tokens]])
        logs = tiny(whole)[0, len(generation.prompt) - 1 : -1].log_softmax(-1)
        for row, token, (own, top) in zip(logs, generation.tokens, generation.logprobs, strict=False):
            assert own == pytest.approx(float(row[token]), abs=1e-4)
            best = row.topk(3)
            assert [token for token, _ in top] == best.indices.tolist()[: len(top)]
            assert [value for _, value in top] == pytest.approx(best.values.tolist()[: len(top)], abs=1e-4)
    assert len(done[0].logprobs[0][1]) == 3
    assert done[1].logprobs[0][1] == []


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
    handles = [engine.submit([0], Sampling(max_tokens=20, stop=stop), text=True) for stop in stops]
    said: dict[int, list[str]] = {i: [] for i in range(6)}
    while not engine.idle:
        engine.step()
        for i, handle in enumerate(handles):
            said[i].append(handle.read())
    whole = "The weight is 3 kg\nUser: hi there"
    ends = [len(whole), whole.find("\nUser:"), 4, whole.find("is 3"), whole.find("hi there"), whole.find("hi")]
    assert ["".join(pieces) for pieces in said.values()] == [whole[:end] for end in ends]
    assert "\n" not in "".join(said[1])  # not even the beginning of it


def test_stop_tokens_of_a_request_end_it_alone(successor_model: SuccessorModel) -> None:
    engine = Engine(successor_model(12, {i: i + 1 for i in range(11)}), {9})
    found = engine.generate([[0], [0]], [Sampling(stop_tokens=(4, 6), max_tokens=20), Sampling(max_tokens=20)], [0, 0])
    assert found == [([1, 2, 3, 4], "stop"), ([1, 2, 3, 4, 5, 6, 7, 8, 9], "stop")]


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
        ([1], Sampling(stop_tokens=(500,)), "token 500 is outside"),
        ([1], Sampling(max_tokens=5.0), "max_tokens is 5.0: it must be a whole number from 1"),  # type: ignore[arg-type]
        ([1, 2.0], Sampling(), "2.0 is no token id"),
    ],
)
def test_refuses_before_any_work_naming_the_request(
    tiny: Llama, prompt: list[int], sampling: Sampling, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Executor, "prefill", None)
    with pytest.raises(SteelyardError, match=named) as error:
        Engine(tiny, ()).generate([[1], prompt], [Sampling(), sampling], [0, 0], ["first", "second"])
    assert "request second" in str(error.value)


def test_one_request_with_a_strange_setting_does_not_end_the_others(tiny: Llama) -> None:
    engine = Engine(tiny, (), rows=4)
    innocent = engine.submit([1, 2, 3], DRAW, 7)
    for change in ({"repetition_penalty": 1e-300}, {"temperature": 10**400}, {"max_tokens": 5.0}, {"min_p": "0.1"}):
        with pytest.raises(SteelyardError, match=f"request odd: {next(iter(change))} is "):
            engine.submit([1, 2, 3], replace(DRAW, **change), 7, "odd")
    with pytest.raises(SteelyardError, match=r"request odd: the seed is 1\.5: it must be a whole number"):
        engine.submit([1, 2, 3], DRAW, 1.5, "odd")  # type: ignore[arg-type]
    wide = engine.submit([1, 2, 3], replace(DRAW, top_k=2**31), 7)
    wider = engine.submit([1, 2, 3], replace(DRAW, top_k=10**30, repetition_penalty=0.01, min_p=1e-300), 7)
    while not engine.idle:
        engine.step()
    assert innocent.tokens == wide.tokens  # as many as the vocabulary: off
    assert len(wider.tokens) == DRAW.max_tokens


def test_broken_weights_are_an_error_not_tokens(tiny: Llama) -> None:
    model = Llama(tiny.config).eval().requires_grad_(False)
    model.load_state_dict(tiny.state_dict())
    model.model.norm.weight[5] = float("nan")
    with pytest.raises(SteelyardError, match=r"request 0: the model's logits are not finite"):
        Engine(model, ()).generate([[1], [2]], [DRAW] * 2, [0, 0])


def test_one_request_that_breaks_does_not_spoil_the_others(tiny: Llama) -> None:
    model = Llama(tiny.config).eval().requires_grad_(False)
    model.load_state_dict(tiny.state_dict())
    model.model.embed_tokens.weight[77] = float("nan")
    engine = Engine(model, (), rows=2, cache_bytes=12 * Engine(tiny, ()).page_bytes)
    prompts = [[5] * 30, [77] * 35, *([i] * 30 for i in range(6, 16))]
    handles = [engine.submit(prompt, replace(DRAW, max_tokens=9), i, str(i)) for i, prompt in enumerate(prompts)]
    while not engine.idle:
        engine.step()
    assert "request 1: the model's logits are not finite" in str(handles[1].error)
    for i in (0, *range(2, 12)):
        assert handles[i].tokens == Engine(tiny, ()).generate([prompts[i]], [replace(DRAW, max_tokens=9)], [i])[0][0]


@pytest.fixture(params=["compiled", "off"])
def poisoned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Llama]:
    """A model of sizes that the kernels serve. Token 77 makes NaNs."""
    monkeypatch.setenv("STEELYARD_KERNELS", "off" if request.param == "off" else "")
    kernels.load.cache_clear()
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    config = LlamaConfig.from_dict({"model_type": "llama", "max_position_embeddings": 512, **sizes, **heads})
    model = Llama(config).initialise(5).eval().requires_grad_(False)
    model.model.embed_tokens.weight[77] = float("nan")
    yield model
    kernels.load.cache_clear()


def twins(engine: Engine) -> None:
    for prompt in ([9] * 5 + [77] * 6, [8] * 40 + [77] * 9):  # in one partly filled page, and over three
        for i in range(3):
            engine.submit(prompt, replace(DRAW, max_tokens=5), i)
    while not engine.idle:
        engine.step()


def one_prefix(engine: Engine) -> None:
    """The second request shares pages of the first one, spoilt ones too, which is still being read."""
    for tail in range(2):
        engine.submit([8] * 20 + [77] * 300 + [tail], DRAW)
        for _ in range(3):
            engine.step()
    while not engine.idle:
        engine.step()


def one_of_a_list(engine: Engine) -> None:
    with pytest.raises(SteelyardError, match="not finite"):
        engine.complete([[9, 77], [8] * 40 + [77] * 300], [DRAW] * 2, [0, 1])


def cancelled_while_read(engine: Engine) -> None:
    handle = engine.submit([8] * 40 + [77] * 300, DRAW)
    engine.step()
    engine.step()
    engine.cancel(handle)


def given_up_while_read(engine: Engine) -> None:
    engine.submit([8] * 40 + [77] * 300, DRAW)
    engine.step()
    engine.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.executor, "prefill", None)
        with pytest.raises(TypeError):
            engine.step()


@pytest.mark.parametrize("spoil", [twins, one_prefix, one_of_a_list, cancelled_while_read, given_up_while_read])
def test_pages_of_a_broken_request_do_not_spoil_later_ones(poisoned: Llama, spoil: Callable[[Engine], None]) -> None:
    prompts = [[i, 2, 3, 4, 5] for i in range(1, 6)]
    found = []
    for before in (None, spoil):
        engine = Engine(poisoned, {77}, rows=4, prefill_tokens=64)
        if before is not None:
            before(engine)
            for bad in ([8] * 20 + [77] * 300, [8] * 40 + [77] * 300):  # nobody finds a page with a NaN
                assert len(engine.pages.find(page_keys(bad))) <= bad.index(77) // PAGE
        handles = [engine.submit(prompt, replace(DRAW, max_tokens=150), i) for i, prompt in enumerate(prompts)]
        while not engine.idle:
            engine.step()
        assert [handle.error for handle in handles] == [None] * 5
        assert engine.executor.finite(range(engine.pages.count))
        found.append(([handle.tokens for handle in handles], engine.generate(prompts, [DRAW] * 5, range(5))))
    assert found[0] == found[1]


def test_cancelling_a_sound_prompt_leaves_its_pages_to_others(poisoned: Llama) -> None:
    engine = Engine(poisoned, (), prefill_tokens=64)
    handle = engine.submit([8] * 200, DRAW)
    engine.step()
    engine.cancel(handle)
    assert len(engine.pages.find(page_keys([8] * 200))) == 4


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


def test_check_knows_penalties_and_min_p(tiny: Llama) -> None:
    sampling = replace(DRAW, min_p=0.05, repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=-0.5)
    engine, prompts = Engine(tiny, ()), some_prompts(4)
    for i, (tokens, _) in enumerate(engine.generate(prompts, [sampling] * 4, range(4))):
        assert max(engine.check(prompts[i], tokens, sampling, i)) < 1e-3
        assert max(engine.check(prompts[i], tokens, DRAW, i)) > 1e-2


def test_check_holds_few_logits_at_once(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = replace(DRAW, max_tokens=40)
    tokens = Engine(tiny, ()).generate([[1, 2]], [sampling], [9])[0][0]
    monkeypatch.setattr("steelyard.inference.engine.CHECK_TOKENS", 7)
    assert max(Engine(tiny, ()).check([1, 2], tokens, sampling, 9)) < 1e-3


def smollm2_prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Pieces of this project's licence, from 1 to 80 tokens, and short chat turns among them."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    ids, pick = tokenizer.encode(text, bos=False), random.Random(1)
    prompts = []
    for i in range(count):
        start = pick.randrange(len(ids) - 200)
        piece = ids[start : start + (pick.randint(40, 80) if i % 20 == 0 else pick.randint(1, 12))]
        if i % 6 == 5:
            turn = f"<|im_start|>user\nExplain {tokenizer.decode(piece)}<|im_end|>\n<|im_start|>assistant\n"
            piece = tokenizer.encode(turn, bos=False, special=True)
        prompts.append(piece)
    return prompts


@pytest.mark.slow
def test_smollm2_greedy_equals_transformers_on_200_prompts_with_eviction_and_refill(smollm2: Path) -> None:
    from transformers import LlamaForCausalLM

    tokenizer = Tokenizer.load(smollm2)
    prompts, limits = smollm2_prompts(tokenizer, 200), [2 + i * 5 % 7 for i in range(200)]
    model = load_llama(smollm2, dtype=torch.float32)
    cache = 300 * Executor.bytes_per_page(model.config, torch.float32)
    engine = Engine(model, tokenizer.eos_ids, tokenizer.decode, rows=64, cache_bytes=cache, prefill_tokens=512)
    done = engine.generate(prompts, [Sampling(max_tokens=limit) for limit in limits], [0] * 200)
    ours = [tokens for tokens, _ in done]

    peer = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    order = sorted(range(200), key=lambda i: len(prompts[i]))
    theirs: dict[int, list[int]] = {}
    for group in (order[:90], order[90:150], order[150:180], order[180:]):
        longest = max(len(prompts[i]) for i in group)
        padded = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in group])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in group])
        with torch.inference_mode():
            out = peer.generate(
                padded,
                attention_mask=mask,
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=sorted(tokenizer.eos_ids),
                pad_token_id=0,
            )
        for i, row in zip(group, out[:, longest:].tolist(), strict=True):
            ends = [place for place, token in enumerate(row) if token in tokenizer.eos_ids]
            theirs[i] = (row[: ends[0] + 1] if ends else row)[: limits[i]]
    assert ours == [theirs[i] for i in range(200)]
    assert sum(map(len, ours)) > 900
    assert engine.counts.steps > 12  # all at once would take 9


@pytest.mark.slow
def test_smollm2_sampled_is_the_same_in_batches_of_1_7_and_64(smollm2: Path) -> None:
    tokenizer = Tokenizer.load(smollm2)
    model = load_llama(smollm2, dtype=torch.float32)
    prompts = [prompt[:10] for prompt in smollm2_prompts(tokenizer, 64)]
    samplings = [Sampling(temperature=1.0, top_p=1.0 if i % 2 else 0.9, max_tokens=6) for i in range(64)]
    engines = [Engine(model, tokenizer.eos_ids, rows=rows) for rows in (64, 7, 1)]
    together, sevens, ones = (
        engine.generate(prompts[:some], samplings[:some], range(some))
        for engine, some in zip(engines, (64, 64, 12), strict=True)
    )
    assert sevens == together
    assert ones == together[:12]


@pytest.mark.slow
def test_smollm2_bfloat16_repeats_bit_for_bit_and_checks_out(smollm2: Path) -> None:
    tokenizer = Tokenizer.load(smollm2)
    engine = Engine(load_llama(smollm2), tokenizer.eos_ids)
    prompts = smollm2_prompts(tokenizer, 32)
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=16)
    first = engine.generate(prompts, [sampling] * 32, range(32))
    assert engine.generate(prompts, [sampling] * 32, range(32)) == first
    margins = [m for i in range(0, 32, 2) for m in engine.check(prompts[i], first[i][0], sampling, i)]
    assert sum(m == 0 for m in margins) > 0.9 * len(margins)
    assert sorted(margins)[int(0.99 * len(margins))] < 0.5  # bfloat16 rounding, prefill against decoding

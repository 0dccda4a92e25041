"""Log-likelihoods of given text: what a plain forward pass says, whatever is shared and however it is cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from steelyard.base.errors import SteelyardError
from steelyard.inference import likelihood
from steelyard.inference.endpoint import Sampling
from steelyard.inference.engine import Engine
from steelyard.inference.executor import PAGE, Executor
from steelyard.inference.likelihood import log_likelihoods
from steelyard.model.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=301,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    initializer_range=0.2,
)


@pytest.fixture(params=["compiled", "off"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Llama]:
    from steelyard.inference import kernels

    monkeypatch.setenv("STEELYARD_KERNELS", "off" if request.param == "off" else "")
    kernels.load.cache_clear()
    yield Llama(CONFIG).initialise(0).eval().requires_grad_(False)
    kernels.load.cache_clear()


def work() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of many lengths about a page's, some asked twice and more, with continuations of many lengths."""
    draw = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 301, (count,), generator=draw).tolist()

    distinct = [tokens(count) for count in (1, 2, 15, 16, 17, 33, 90)]
    prompts = [distinct[i % 7] for i in range(20)]
    return prompts, [tokens(1 + 5 * i % 37) for i in range(20)]


def plainly(model: Llama, prompt: list[int], continuation: list[int]) -> list[float]:
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *continuation]]))[0, len(prompt) - 1 : -1]
    values: list[float] = (-F.cross_entropy(logits, torch.tensor(continuation), reduction="none")).tolist()
    return values


@pytest.mark.parametrize(("passes", "cache_pages"), [((4096, 1024), None), ((16, 7), None), ((32, 16), 14)])
def test_it_is_what_a_plain_pass_gives(
    model: Llama, passes: tuple[int, int], cache_pages: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, continuations = work()
    expected = [plainly(model, *pair) for pair in zip(prompts, continuations, strict=True)]
    monkeypatch.setattr(likelihood, "SCORED_TOKENS", passes[1])
    page = Executor.bytes_per_page(CONFIG, torch.float32)
    engine = Engine(
        model, (), prefill_tokens=passes[0], cache_bytes=None if cache_pages is None else cache_pages * page
    )
    advanced: list[int] = []
    found = log_likelihoods(engine, prompts, continuations, advance=advanced.append)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert sum(advanced) == sum(map(len, continuations))
    assert not any(engine.pages.holders)


def test_a_prompt_is_read_once(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, read = Engine(model, ()), list[int]()
    prefill = engine.executor.prefill

    def counted(tokens, *rest, **options):  # type: ignore[no-untyped-def]
        read.extend(map(len, tokens))
        return prefill(tokens, *rest, **options)

    monkeypatch.setattr(engine.executor, "prefill", counted)
    prompt = list(range(3 * PAGE + 5))
    log_likelihoods(engine, [prompt] * 4, [[7, 8], [9], [10, 11, 12], [13]])
    assert sum(read) == len(prompt) - 1 + 7


def test_what_cannot_be_read_is_named_before_any_work(model: Llama) -> None:
    engine = Engine(model, ())
    assert len(log_likelihoods(engine, [[1] * 100], [[2] * 29])[0]) == 29  # the last token needs no place
    for prompt, continuation, cause in (
        ([], [1], "prompt is empty"),
        ([1], [], "no tokens after the prompt"),
        ([1], [301], "token 301 is outside"),
        ([-1], [3], "token -1 is outside"),
        ([1] * 100, [2] * 30, "exceed the context of 128"),
    ):
        with pytest.raises(SteelyardError, match=f"request odd: .*{cause}"):
            log_likelihoods(engine, [[1], prompt], [[2], continuation], ["fine", "odd"])
    engine.submit([1, 2], Sampling(max_tokens=4))
    with pytest.raises(SteelyardError, match="serving other requests"):
        log_likelihoods(engine, [[1]], [[2]])


def test_logits_that_are_not_finite_leave_nothing_behind(model: Llama) -> None:
    engine, prompts, continuations = Engine(model, ()), [[1, 2, 3]], [[4, 5]]
    expected = log_likelihoods(engine, prompts, continuations)
    table = model.model.embed_tokens.weight
    kept = table[4].clone()
    table[4] = float("nan")
    with pytest.raises(SteelyardError, match=r"request 1: the model's logits are not finite"):
        log_likelihoods(engine, [*prompts, [9, 4]], [[6, 7], [8]])
    table[4] = kept
    assert log_likelihoods(engine, prompts, continuations) == expected
    assert not any(engine.pages.holders)

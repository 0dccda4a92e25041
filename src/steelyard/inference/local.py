"""The endpoint in this process: template, tokenizer and engine over one model folder."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Progress, Silent
from steelyard.inference import kernels
from steelyard.inference.endpoint import Completion, Logprob, Message, Request, Sampling, TokenLogprobs
from steelyard.inference.engine import ROWS, Engine
from steelyard.inference.executor import PAGE
from steelyard.inference.quantize import is_quantized, quantize
from steelyard.inference.scheduler import Finish, Generation
from steelyard.model.chat import Renderer
from steelyard.model.llama import load_llama
from steelyard.model.tokenizer import Tokenizer

# int8: weights of the projections in 8 bits, all else in bfloat16
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.bfloat16,
}


class LocalEndpoint:
    """Answers with the model of a Hugging Face folder, on this machine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, renderer: Renderer) -> None:
        self.engine, self.tokenizer, self.renderer = engine, tokenizer, renderer

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        dtype: str | None = None,
        threads: int | None = None,
        device: str = "cpu",
        rows: int = ROWS,
        cache_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> LocalEndpoint:
        """Load `folder`. `dtype` (float32, bfloat16, float16, int8) None keeps the stored one; `threads` sets the
        number for the whole process. `rows` and `cache_bytes` are `Engine`'s; what they come to is said to `progress`.
        Rounding, so tokens, may depend on all of them: `identity` tells them.

        Raises UsageError for an unknown dtype or bad settings, FormatError for a bad folder.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        if threads is not None:
            if threads < 1:
                raise UsageError(f"threads {threads}: must be at least 1")
            torch.set_num_threads(threads)
        tokenizer = Tokenizer.load(folder)
        model = load_llama(folder, dtype=None if dtype is None else DTYPES[dtype], device=device)
        if dtype == "int8":
            quantize(model)
        progress = progress or Silent()
        if (
            device == "cpu"
            and kernels.serves(model.model.embed_tokens.weight.dtype, model.config)
            and kernels.missing()
        ):
            progress.say("compiling the CPU kernels, once on this machine: about 20 seconds")
        engine = Engine(model, tokenizer.eos_ids, tokenizer.decode, rows=rows, cache_bytes=cache_bytes)
        progress.say(
            f"key/value cache: up to {engine.cache_bytes / 2**20:,.0f} MiB (cache_bytes) for "
            f"{(engine.pages.count - 1) * PAGE:,} tokens; up to {rows} requests at a time (rows)"
        )
        return cls(engine, tokenizer, Renderer(folder))

    def identity(self) -> dict[str, Any]:
        """What answers, and everything known to change rounding: also how many requests are computed together."""
        engine = self.engine
        weight = engine.model.model.embed_tokens.weight
        return {
            "kind": "local",
            "device": weight.device.type,
            "dtype": "int8" if is_quantized(engine.model) else str(weight.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "cpu": torch.backends.cpu.get_cpu_capability()
            if weight.device.type == "cpu"
            else torch.cuda.get_device_name(weight.device),
            "rows": engine.rows,
            "cache_bytes": engine.cache_bytes,
            "prefill_tokens": engine.prefill_tokens,
            "kernels": engine.kernels,
        }

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order, as one batch. Errors as in `Engine.generate`, by request id."""
        generations = self.engine.complete(
            [self._prompt(request) for request in requests],
            [request.sampling for request in requests],
            [request.seed for request in requests],
            [request.id for request in requests],
        )
        return [self._completion(generation) for generation in generations]

    def stream(self, request: Request) -> Generator[str, None, None]:
        """The text of a completion as it comes, in pieces that are never taken back: together what `generate` gives as
        its text. Leaving the loop early cancels the request. Errors as in `generate`."""
        generation = self.engine.submit(self._prompt(request), request.sampling, request.seed, request.id, text=True)
        try:
            while not generation.done:
                self.engine.step()
                if text := generation.read():
                    yield text
        finally:
            self.engine.cancel(generation)
        if generation.error is not None:
            raise generation.error

    def user_prompts(self, count: int, sampling: Sampling, seed: int = 0) -> list[str]:
        """What the model takes users to say: `count` user's turns that it writes itself (those that it ends)."""
        start = self.renderer.user_turn_tokens()
        done = self.engine.generate([start] * count, [sampling] * count, range(seed, seed + count))
        return [self._text(tokens, finish, sampling) for tokens, finish in done if finish == "stop"]

    def prompt_length(self, prompt: tuple[Message, ...] | str) -> int:
        """How many tokens the prompt becomes."""
        return len(self.renderer.prompt_tokens(prompt))

    def check(self, request: Request, tokens: Sequence[int]) -> list[float]:
        """`Engine.check` of a journaled completion's `tokens` for `request`."""
        return self.engine.check(self._prompt(request), tokens, request.sampling, request.seed, request.id)

    def _prompt(self, request: Request) -> list[int]:
        try:
            return self.renderer.prompt_tokens(request.prompt)
        except SteelyardError as error:
            raise type(error)(f"request {request.id}: {error}") from error

    def _completion(self, generation: Generation) -> Completion:
        finish, sampling = generation.finish, generation.sampling
        assert finish is not None
        tokens = tuple(generation.tokens)
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = tuple(
                TokenLogprobs(self._logprob(token, value), tuple(self._logprob(*other) for other in top))
                for token, (value, top) in zip(tokens, generation.logprobs, strict=True)
            )
        return Completion(
            generation.name, self._text(tokens, finish, sampling), finish, tuple(generation.prompt), tokens, logprobs
        )

    def _logprob(self, token: int, value: float) -> Logprob:
        return Logprob(token, self.tokenizer.decode([token], skip_special=False), value)

    def _text(self, tokens: Sequence[int], finish: Finish, sampling: Sampling) -> str:
        """Decoded as a whole, so that no character comes out in halves; without stop token and stop string."""
        ends = tokens[-1] in self.engine.eos_ids or tokens[-1] in sampling.stop_tokens
        text = self.tokenizer.decode(list(tokens[:-1] if ends else tokens))
        if finish == "length":
            text = text.rstrip("\ufffd")  # the first bytes of a character that max_tokens cut in two
        found = [place for place in (text.find(stop) for stop in sampling.stop) if place >= 0]
        return text[: min(found)] if found else text

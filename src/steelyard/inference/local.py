"""The endpoint in this process: template, tokenizer and engine over one model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.inference.endpoint import Completion, Message, Request
from steelyard.inference.engine import Engine, Finish
from steelyard.model.chat import Renderer
from steelyard.model.llama import load_llama
from steelyard.model.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LocalEndpoint:
    """Answers with the model of a Hugging Face folder, on this machine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, renderer: Renderer) -> None:
        self.engine, self.tokenizer, self.renderer = engine, tokenizer, renderer

    @classmethod
    def open(
        cls, folder: Path, *, dtype: str | None = None, threads: int | None = None, device: str = "cpu"
    ) -> LocalEndpoint:
        """Load `folder`. `dtype` (float32, bfloat16, float16) None keeps the stored one; `threads` sets the number for
        the whole process (rounding, so tokens, may depend on it; `identity` tells it).

        Raises UsageError for an unknown dtype or a bad thread count, FormatError for a bad folder.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        if threads is not None:
            if threads < 1:
                raise UsageError(f"threads {threads}: must be at least 1")
            torch.set_num_threads(threads)
        tokenizer = Tokenizer.load(folder)
        model = load_llama(folder, dtype=None if dtype is None else DTYPES[dtype], device=device)
        return cls(Engine(model, tokenizer.eos_ids, tokenizer.decode), tokenizer, Renderer(folder))

    def identity(self) -> dict[str, Any]:
        """What answers, and everything known to change rounding."""
        weight = self.engine.model.model.embed_tokens.weight
        return {
            "kind": "local",
            "device": weight.device.type,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "cpu": torch.backends.cpu.get_cpu_capability()
            if weight.device.type == "cpu"
            else torch.cuda.get_device_name(weight.device),
        }

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order, as one batch. Errors as in `Engine.generate`, by request id."""
        prompts = [self._prompt(request) for request in requests]
        generated = self.engine.generate(
            prompts,
            [request.sampling for request in requests],
            [request.seed for request in requests],
            [request.id for request in requests],
        )
        return [
            Completion(
                request.id, self._text(tokens, finish, request.sampling.stop), finish, tuple(prompt), tuple(tokens)
            )
            for request, prompt, (tokens, finish) in zip(requests, prompts, generated, strict=True)
        ]

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

    def _text(self, tokens: Sequence[int], finish: Finish, stops: Sequence[str]) -> str:
        """Decoded as a whole, so that no character comes out in halves; without stop token and stop string."""
        ends = tokens[-1] in self.engine.eos_ids
        text = self.tokenizer.decode(list(tokens[:-1] if ends else tokens))
        if finish == "length":
            text = text.rstrip("\ufffd")  # the first bytes of a character that max_tokens cut in two
        found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        return text[: min(found)] if found else text

"""The endpoint protocol: whoever needs tokens asks this, whether the local engine or a server answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when to stop. The defaults change nothing: greedy, every token kept, no penalty.

    In this order: `repetition_penalty` (Keskar et al. 2019, as transformers does it: logits of tokens of the prompt and
    the completion are divided by it where positive, else multiplied), `presence_penalty` and `frequency_penalty`
    (OpenAI's: taken off the logits of tokens of the completion, once, and once an occurrence), `temperature` (0 is
    greedy), then the filters: `top_k` (0 is off), `top_p` (1 is off), `min_p` (of the likeliest token's probability; 0
    is off). `stop` strings and `stop_tokens` end a completion as the model's own stop tokens do. `logprobs` n asks for
    the log-probability of each token and of the n likeliest; None for nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Request:
    """One generation asked for. `prompt` is a conversation (the model's template renders it) or text to continue.

    Noise depends on `seed` and the token's position only, never on the neighbours in the batch.
    """

    id: str
    prompt: tuple[Message, ...] | str
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0


@dataclass(frozen=True)
class Logprob:
    """A token and the natural logarithm of its probability. `token` is None where a server does not reveal ids;
    `text` is what the token decodes to by itself, so half a character may show as U+FFFD."""

    token: int | None
    text: str
    value: float


@dataclass(frozen=True)
class TokenLogprobs:
    """One position of a completion: the chosen token, and the likeliest ones, best first.

    The local engine's are of the model's own distribution: before penalties, temperature and filters. What a server's
    are is the server's business.
    """

    chosen: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True)
class Completion:
    """What came back. `tokens` and `prompt_tokens` are None where a server does not reveal them.

    `tokens` includes the stop token that ended it (if any); `text` leaves out special tokens, and everything from a
    stop string on. `logprobs`, one for each token, only where asked for.
    """

    id: str
    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: tuple[int, ...] | None
    tokens: tuple[int, ...] | None
    logprobs: tuple[TokenLogprobs, ...] | None = None


class Endpoint(Protocol):
    """Generates completions. Implementations: `LocalEndpoint` (this process) and `OpenAIEndpoint` (any such server)."""

    def identity(self) -> dict[str, Any]:
        """What answers: kind (`local` or `remote`), dtype, device, threads, library versions, or base URL and model."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order, as one batch. Raises SteelyardError; never an empty stand-in."""

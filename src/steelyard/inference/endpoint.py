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
    """How tokens are drawn. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 keep every token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()


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
class Completion:
    """What came back. `tokens` and `prompt_tokens` are None where a server does not reveal them.

    `tokens` includes the stop token that ended it (if any); `text` leaves out special tokens, and everything from a
    stop string on.
    """

    id: str
    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: tuple[int, ...] | None
    tokens: tuple[int, ...] | None


class Endpoint(Protocol):
    """Generates completions. Implementations: `LocalEndpoint` (this process) and `OpenAIEndpoint` (any such server)."""

    def identity(self) -> dict[str, Any]:
        """What answers: kind (`local` or `remote`), dtype, device, threads, library versions, or base URL and model."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order, as one batch. Raises SteelyardError; never an empty stand-in."""

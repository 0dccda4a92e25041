"""What the adapters that ask a server have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from steelyard.base.canonical import digest
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.inference.endpoint import Completion, Request
from steelyard.scorers.adapters.spec import NOT_SETTINGS, ServedSpec
from steelyard.scorers.base import Item, Score, ScoreError


class Served:
    """A model behind `spec.base_url`. `weights` digests address, model name and settings: a claim, since a server
    proves nothing about the weights behind it; a model that degrades or is changed shows in the canaries only.

    Raises UsageError where the address or the key can't work; asks nothing yet.
    """

    rooms: tuple[str, ...] = ("scorers", "inference")

    def __init__(self, spec: ServedSpec, categories: Sequence[str]) -> None:
        from steelyard.inference.openai import OpenAIEndpoint

        key = "" if spec.api_key is None else os.environ.get(spec.api_key, "")
        if spec.api_key is not None and not key:
            raise UsageError(f"api_key: the environment has no {spec.api_key}: set it to the server's key")
        self.categories = tuple(categories)
        self.endpoint = OpenAIEndpoint(
            spec.base_url,
            spec.model,
            api_key=key,
            concurrency=spec.concurrency,
            timeout_s=spec.timeout_s,
            retries=spec.retries,
        )
        self._longest = spec.max_characters
        settings = spec.model_dump(mode="json", exclude=NOT_SETTINGS | {"base_url"})
        self.weights = digest({"claimed": self.endpoint.base_url, **settings})

    def each(
        self,
        items: Sequence[Item],
        ask: Callable[[Sequence[tuple[str, Item]]], Sequence[Any]],
        read: Callable[[Any], dict[str, float]],
    ) -> list[Score | ScoreError]:
        """`read` on the answer to each item. `ask` gives an answer or a SteelyardError for each (name, item); that, and
        a SteelyardError of `read`, becomes the item's ScoreError."""
        lengths = [len(item.prompt) + len(item.completion) for item in items]
        sent = [index for index, length in enumerate(lengths) if length <= self._longest]
        answers = dict(zip(sent, ask([(f"item {index}", items[index]) for index in sent]), strict=True))
        results: list[Score | ScoreError] = []
        for index, length in enumerate(lengths):
            try:
                if index not in answers:
                    raise SteelyardError(f"{length:,} characters, more than max_characters allows ({self._longest:,})")
                if isinstance(answers[index], SteelyardError):
                    raise answers[index]
                results.append(Score(read(answers[index])))
            except SteelyardError as error:
                results.append(ScoreError(self.endpoint.redacted(str(error))))
        return results

    def chat(
        self,
        items: Sequence[Item],
        make: Callable[[str, Item], Request],
        read: Callable[[Completion], dict[str, float]],
    ) -> list[Score | ScoreError]:
        """`each`, of completions."""
        return self.each(items, lambda sent: self.endpoint.attempt([make(*one) for one in sent]), read)


def excerpt(text: str) -> str:
    """The beginning of an answer, for a message."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")

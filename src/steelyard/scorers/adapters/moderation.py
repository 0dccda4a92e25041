"""Services with OpenAI's moderation schema: POST /moderations, probabilities under `category_scores`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from steelyard.base.errors import SteelyardError
from steelyard.scorers.adapters.served import Served, excerpt
from steelyard.scorers.adapters.spec import ModerationSpec
from steelyard.scorers.base import Item, Score, ScoreError


class Moderation(Served):
    """A moderation service. It is shown the completion alone; of several labels the largest score counts."""

    def __init__(self, spec: ModerationSpec) -> None:
        super().__init__(spec, list(spec.labels))
        self._labels = spec.labels

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        """One request an item, so that a failure spoils no other."""

        def ask(sent: Sequence[tuple[str, Item]]) -> list[Any]:
            bodies = {name: {"model": self.endpoint.model, "input": item.completion} for name, item in sent}
            return self.endpoint.post("moderations", bodies)

        return self.each(items, ask, self._read)

    def _read(self, answer: Any) -> dict[str, float]:
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list) or len(results) != 1:
            raise SteelyardError(f"the answer has not one result for one text: {excerpt(json.dumps(answer))}")
        scores = results[0].get("category_scores") if isinstance(results[0], dict) else None
        if not isinstance(scores, dict):
            raise SteelyardError(f"the result has no category_scores: {excerpt(json.dumps(results[0]))}")
        return {category: max(_score(scores, label) for label in names) for category, names in self._labels.items()}


def _score(scores: dict[str, Any], label: str) -> float:
    value = scores.get(label)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        found = "is missing" if label not in scores else f"is {excerpt(json.dumps(value))}"
        raise SteelyardError(f"category_scores: {label} {found}, not a probability")
    return float(value)

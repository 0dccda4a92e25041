"""Prompts, the answers a model gives to them, and who judges the answers: shared by distillation and rejection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Progress
from steelyard.inference.endpoint import Completion, Endpoint, Message, Request
from steelyard.scorers.base import Item, Score, ScoreError, Scorer, score_checked

Judge = Callable[[Sequence[Item]], Sequence[float | ScoreError]]
"""How good each answer is (higher is better), in order, or why it could not be judged."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn, and the name it has in reports."""

    id: str
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, id: str, text: str) -> Prompt:
        """A single question."""
        return cls(id, (Message("user", text),))

    @property
    def last(self) -> str:
        """The user's last turn: what a scorer sees as the prompt."""
        return self.messages[-1].content


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raises UsageError where there is none, two share an id, or one does not end with the user's turn."""
    if not prompts:
        raise UsageError("no prompts: give at least one")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise UsageError(f"two prompts are named {prompt.id}: give each an id of its own")
        seen.add(prompt.id)
        if not prompt.messages or prompt.messages[-1].role != "user":
            raise UsageError(f"prompt {prompt.id}: must end with a turn of the user")


def generate(
    endpoint: Endpoint, requests: Sequence[Request], *, at_once: int, progress: Progress, name: str
) -> list[Completion]:
    """One completion per request, in order, `at_once` at a time so that progress shows."""
    if at_once < 1:
        raise UsageError(f"at_once {at_once}: must be at least 1")
    done: list[Completion] = []
    with progress.task(name, len(requests), "answers") as task:
        for start in range(0, len(requests), at_once):
            part = endpoint.generate(requests[start : start + at_once])
            done += part
            task.advance(len(part))
    return done


def judged(judge: Judge, items: Sequence[Item]) -> list[float | ScoreError]:
    """`judge` over `items`, held to its word. Raises SteelyardError for a wrong number of verdicts."""
    found = list(judge(items)) if items else []
    if len(found) != len(items):
        raise SteelyardError(f"the judge gave {len(found)} verdicts for {len(items)} answers")
    return [
        ScoreError(f"the judge gave {value}, not a finite number")
        if not isinstance(value, ScoreError) and not -1e30 < value < 1e30
        else value
        for value in found
    ]


def judge_by(scorer: Scorer, weights: Mapping[str, float]) -> Judge:
    """A judge that adds up the scorer's categories, each times its weight (negative: less of it is better).

    Raises UsageError for a category that the scorer does not have.
    """
    known = scorer.identity().categories
    for category in weights:
        if category not in known:
            raise UsageError(f"scorer {scorer.identity().name} has no category {category}: it has {', '.join(known)}")
    if not weights:
        raise UsageError("no weights: name at least one category to judge by")

    def judge(items: Sequence[Item]) -> list[float | ScoreError]:
        return [
            sum(weight * found.values[category] for category, weight in weights.items())
            if isinstance(found, Score)
            else found
            for found in score_checked(scorer, items)
        ]

    return judge


def unfit(completion: Completion) -> str:
    """Why an answer may not be learned from whatever its score: '' where it may."""
    if not completion.text.strip():
        return "empty"
    if completion.finish == "length":
        return "cut off: learning from it would unlearn to stop"
    return "repeats itself" if _repeats(completion.text.split()) else ""


def _repeats(words: Sequence[str], span: int = 4, share: float = 0.5) -> bool:
    """Whether over half of the runs of four words are copies of an earlier one."""
    runs = [tuple(words[i : i + span]) for i in range(len(words) - span + 1)]
    return len(runs) >= 8 and len(set(runs)) < (1 - share) * len(runs)

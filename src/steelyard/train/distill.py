"""Context distillation for safety: a model learns to answer without a preprompt as it answers with one.

LLaMA 2 (Touvron et al. 2023, arXiv:2307.09288), section 4.2.4: the answers come from prompts with a safety preprompt
before them; one is kept only where the safety scorer prefers it to the answer given without; the model is then
fine-tuned on prompt and answer with the preprompt left out. (The idea of distilling a context: Askell et al. 2021,
arXiv:2112.00861.)

    >>> found = context_distil(endpoint, prompts, "You are a careful assistant.", judge, progress=Silent())
    >>> found.counts()
    {'kept': 212, 'the plain answer scores as well': 31, 'empty': 2}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

from steelyard.base.errors import UsageError
from steelyard.base.files import write_atomic
from steelyard.base.progress import Progress
from steelyard.inference.endpoint import Completion, Endpoint, Message, Request, Sampling
from steelyard.scorers.base import Item, ScoreError
from steelyard.train.answers import Judge, Prompt, check_prompts, generate, judged, unfit
from steelyard.train.conversations import Conversation

KEPT = "kept"
Preprompt = str | tuple[Message, ...]
"""A text, or turns to put before the conversation (examples of the wanted behaviour, say)."""


@dataclass(frozen=True)
class DistilledRow:
    """What became of one prompt. Scores are the judge's (higher is better); None where it could not judge."""

    id: str
    prompt: str
    plain: str
    guided: str
    preprompt: int  # which of them gave the guided answer
    plain_score: float | None
    guided_score: float | None
    why: str  # KEPT, or the reason for leaving it out

    @property
    def kept(self) -> bool:
        return self.why == KEPT


@dataclass(frozen=True)
class Distilled:
    """The conversations to train on, and a row for every prompt."""

    conversations: list[Conversation]
    rows: list[DistilledRow]

    def counts(self) -> dict[str, int]:
        """How many prompts met each fate, the commonest first."""
        return dict(Counter(row.why for row in self.rows).most_common())

    def save(self, path: Path) -> None:
        """Write the rows as JSON lines."""
        write_atomic(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in self.rows).encode())


def context_distil(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    preprompt: Preprompt | Sequence[str] | Sequence[Preprompt],
    judge: Judge,
    *,
    sampling: Sampling | None = None,
    margin: float = 0.0,
    place: Literal["system", "user"] = "system",
    seed: int = 0,
    at_once: int = 128,
    progress: Progress,
) -> Distilled:
    """Answer `prompts` with and without a preprompt, and keep the guided answers that `judge` prefers.

    Of several preprompts each is tried, and the answer that the judge likes best stands for the prompt. It is kept
    where its score exceeds the plain answer's by more than `margin`, and it is neither empty, cut off nor repetitive.
    A text goes into the system message (before one that is there), or with `place` "user" before the last turn.
    `sampling` defaults to greedy, 256 tokens. Raises UsageError for no or ill-made prompts and preprompts, and what
    the endpoint raises.
    """
    leads = _leads(preprompt)
    check_prompts(prompts)
    sampling = sampling or Sampling(max_tokens=256)
    requests = [Request(f"{prompt.id}/plain", prompt.messages, sampling, seed) for prompt in prompts]
    for index, lead in enumerate(leads):  # lead by lead: what shares a beginning is computed once
        requests += [
            Request(f"{prompt.id}/{index}", guided(prompt.messages, lead, place), sampling, seed) for prompt in prompts
        ]
    answers = generate(endpoint, requests, at_once=at_once, progress=progress, name="answer with and without preprompt")
    items = [
        Item(prompts[number % len(prompts)].last, answer.text) for number, answer in enumerate(answers)
    ]  # of every block of answers the prompts are the same
    scores = judged(judge, items)
    rows, conversations = [], []
    for number, prompt in enumerate(prompts):
        mine = slice(number, None, len(prompts))
        row = _decide(prompt, answers[mine], scores[mine], margin)
        rows.append(row)
        if row.kept:
            conversations.append(Conversation((*prompt.messages, Message("assistant", row.guided))))
    return Distilled(conversations, rows)


def guided(
    messages: tuple[Message, ...], lead: Preprompt, place: Literal["system", "user"] = "system"
) -> tuple[Message, ...]:
    """`messages` with the preprompt before them."""
    if isinstance(lead, str) and place == "user":
        return (*messages[:-1], Message("user", f"{lead}\n\n{messages[-1].content}"))
    turns = (Message("system", lead),) if isinstance(lead, str) else lead
    if turns[0].role == "system" and messages[0].role == "system":
        both = Message("system", f"{turns[0].content}\n\n{messages[0].content}")
        return (both, *turns[1:], *messages[1:])
    if messages[0].role == "system":
        return (messages[0], *turns, *messages[1:])
    return turns + messages


def _leads(preprompt: Preprompt | Sequence[str] | Sequence[Preprompt]) -> list[Preprompt]:
    one = isinstance(preprompt, str) or (bool(preprompt) and isinstance(preprompt[0], Message))
    leads = cast("list[Preprompt]", [preprompt] if one else list(preprompt))
    if not leads or not all(lead.strip() if isinstance(lead, str) else lead for lead in leads):
        raise UsageError("preprompt: give at least one, and none that is empty")
    return leads


def _decide(
    prompt: Prompt, answers: Sequence[Completion], scores: Sequence[float | ScoreError], margin: float
) -> DistilledRow:
    """The fate of one prompt: the plain answer comes first, then one for each preprompt."""
    plain, baseline = answers[0], scores[0]
    fit = [
        index
        for index in range(1, len(answers))
        if not unfit(answers[index]) and not isinstance(scores[index], ScoreError)
    ]
    best = max(fit, key=lambda index: _number(scores[index]), default=1)
    found = scores[best]
    if reason := unfit(answers[best]):
        why = reason
    elif isinstance(found, ScoreError):
        why = f"could not be judged: {found.reason}"
    elif isinstance(baseline, ScoreError):
        why = f"the plain answer could not be judged: {baseline.reason}"
    else:
        why = KEPT if found > baseline + margin else "the plain answer scores as well"
    return DistilledRow(
        id=prompt.id,
        prompt=prompt.last,
        plain=plain.text,
        guided=answers[best].text,
        preprompt=best - 1,
        plain_score=None if isinstance(baseline, ScoreError) else float(baseline),
        guided_score=None if isinstance(found, ScoreError) else float(found),
        why=why,
    )


def _number(score: float | ScoreError) -> float:
    assert not isinstance(score, ScoreError)
    return score

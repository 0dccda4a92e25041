"""Rejection-sampling fine-tuning without a reward model: k answers to a prompt, the best by a judge is learned.

LLaMA 2 (Touvron et al. 2023, arXiv:2307.09288), section 3.2.3, "Rejection Sampling fine-tuning", with a scorer (or any
function of prompt and answer) in the place of the reward model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from steelyard.base.errors import UsageError
from steelyard.base.files import write_atomic
from steelyard.base.progress import Progress
from steelyard.inference.endpoint import Completion, Endpoint, Message, Request, Sampling
from steelyard.scorers.base import Item, ScoreError
from steelyard.train.answers import Judge, Prompt, check_prompts, generate, judged, unfit
from steelyard.train.conversations import Conversation

KEPT = "kept"


@dataclass(frozen=True)
class RejectionRow:
    """What became of one prompt: its best answer, that score and the mean over its judged samples (None: none was)."""

    id: str
    prompt: str
    best: str
    best_score: float | None
    mean_score: float | None
    fit: int  # samples that were judged and fit to learn from
    why: str

    @property
    def kept(self) -> bool:
        return self.why == KEPT


@dataclass(frozen=True)
class Selected:
    """The conversations to train on, and a row for every prompt."""

    conversations: list[Conversation]
    rows: list[RejectionRow]

    def counts(self) -> dict[str, int]:
        """How many prompts met each fate, the commonest first."""
        return dict(Counter(row.why for row in self.rows).most_common())

    def save(self, path: Path) -> None:
        """Write the rows as JSON lines."""
        write_atomic(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in self.rows).encode())


def best_of(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    judge: Judge,
    *,
    samples: int = 8,
    sampling: Sampling | None = None,
    at_least: float | None = None,
    seed: int = 0,
    at_once: int = 128,
    progress: Progress,
) -> Selected:
    """Draw `samples` answers to each prompt and keep the one that `judge` likes best (of equals the first drawn).

    A prompt is left out where no sample is fit (all empty, cut off, repetitive or not judged) or the best scores under
    `at_least`. Sample j has seed `seed + j`, so more samples never change the earlier ones. `sampling` defaults to
    temperature 1, 256 tokens. Raises UsageError for ill-made prompts and numbers, and what the endpoint raises.
    """
    check_prompts(prompts)
    if samples < 2:
        raise UsageError(f"samples {samples}: must be at least 2, to have something to choose from")
    sampling = sampling or Sampling(temperature=1.0, max_tokens=256)
    if sampling.temperature == 0:
        raise UsageError("temperature 0: all samples of a prompt would be the same; set one above 0")
    requests = [
        Request(f"{prompt.id}/{number}", prompt.messages, sampling, seed + number)
        for prompt in prompts
        for number in range(samples)
    ]
    answers = generate(endpoint, requests, at_once=at_once, progress=progress, name=f"draw {samples} answers a prompt")
    scores = judged(judge, [Item(prompts[n // samples].last, answer.text) for n, answer in enumerate(answers)])
    rows, conversations = [], []
    for number, prompt in enumerate(prompts):
        mine = slice(number * samples, (number + 1) * samples)
        row = _select(prompt, answers[mine], scores[mine], at_least)
        rows.append(row)
        if row.kept:
            conversations.append(Conversation((*prompt.messages, Message("assistant", row.best))))
    return Selected(conversations, rows)


def _select(
    prompt: Prompt, answers: Sequence[Completion], scores: Sequence[float | ScoreError], at_least: float | None
) -> RejectionRow:
    known = [float(score) for score in scores if not isinstance(score, ScoreError)]
    fit, reasons = [], Counter[str]()
    for answer, score in zip(answers, scores, strict=True):
        if reason := unfit(answer):
            reasons[reason] += 1
        elif isinstance(score, ScoreError):
            reasons[f"could not be judged: {score.reason}"] += 1
        else:
            fit.append((float(score), answer.text))
    best = max(fit, key=lambda pair: pair[0], default=None)
    if best is None:
        why = f"no fit sample: most {reasons.most_common(1)[0][0]}"
    else:
        why = KEPT if at_least is None or best[0] >= at_least else "the best scores too low"
    return RejectionRow(
        id=prompt.id,
        prompt=prompt.last,
        best=best[1] if best else "",
        best_score=best[0] if best else None,
        mean_score=sum(known) / len(known) if known else None,
        fit=len(fit),
        why=why,
    )

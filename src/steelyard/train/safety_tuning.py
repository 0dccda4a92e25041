"""Making a chat model safer: it learns, without a preprompt, to decline harm as it declines with one.

Context distillation as in LLaMA 2 (Touvron et al. 2023, arXiv:2307.09288, section 4.2.4), with our own prompts:

1. Harmful prompts are answered twice, plainly and after a safety preprompt; the guided answer is kept where the scorers
   prefer it. A small model declines well and then rambles, so answers end after the sentence that declines, and a
   second one where it gives a reason.
2. What shall not change is the model's own: first tokens of its answers to harmless prompts of ours, worded alike, and
   to prompts it draws itself from an empty user's turn (Xu et al. 2024, "Magpie", arXiv:2406.08464), and texts that it
   writes. There the tuned model is held to the distribution of the model as it was, not to one drawn word.
3. The upper layers are tuned on both. Harm can be read off the middle layers of a small model as well as off the last
   ones, so what lies below them need not change, and is computed once for all epochs (`upper.py`). Prompts held out
   from training tell how far it worked.

Everything is done in blocks that are kept in the work folder; a stopped run goes on from there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch

from steelyard.base.canonical import digest, sha256_hex
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.files import write_atomic
from steelyard.base.progress import Progress
from steelyard.inference.endpoint import Completion, Endpoint, Message, Request, Sampling
from steelyard.model.chat import Renderer
from steelyard.model.llama import load_llama
from steelyard.scorers.base import Item, ScoreError, Scorer, score_checked
from steelyard.train.answers import Prompt, unfit
from steelyard.train.chat_data import ChatLoader, ChatSamples, Supervision
from steelyard.train.conversations import Conversation
from steelyard.train.distill import KEPT, DistilledRow, context_distil
from steelyard.train.loop import TrainOptions, TrainResult, train
from steelyard.train.safety_prompts import WrittenPrompt, preprompts, written_prompts
from steelyard.train.sft import Shown
from steelyard.train.speed import compute_dtype
from steelyard.train.tuning import Tuning, export_tuned, open_for_tuning
from steelyard.train.upper import UpperLayers

J = TypeVar("J")  # what JSON can hold

BLOCK = 128  # prompts answered and kept at a time
MAX_LENGTH = 512  # tokens of a conversation
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
# A second sentence stays where it says why.
_REASON = re.compile(
    r"illegal|crime|harm|hurt|danger|\blaw|wrong|hate|fraud|abuse|priva|respect|violen|unethical|kill|injur|mislead|"
    r"crisis|damage|rights|ruin|consent|someone you trust",
    re.IGNORECASE,
)
_TURNS = re.compile(r"\b(?:you can|you should|you could|i can|i'll|here)\b", re.IGNORECASE)


@dataclass(frozen=True)
class SafetyTuning:
    """How to align. `learned_tokens` of a harmless answer are learned; layers below `first_layer` stay as they are;
    `hold` weighs a token where the model shall stay as it is against one of an answer that declines; `strength` is the
    share of the weights' change that is kept in the end (Wortsman et al. 2022, arXiv:2109.01903).

    More forms of a harmless phrase than of a harmful one make a model that declines less often, rightly or wrongly.
    """

    harmful_forms: int = 1
    harmless_forms: int = 2
    answer_tokens: int = 40
    learned_tokens: int = 10
    own_prompts: int = 384
    own_texts: int = 64
    text_tokens: int = 128
    hold: float = 4.0
    strength: float = 0.9
    epochs: float = 1.0
    learning_rate: float = 3e-4
    first_layer: int = 22
    tokens_per_step: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class OwnRow:
    """What became of the model's own answer to a harmless prompt. `complete`: it ended by itself."""

    id: str
    prompt: str
    answer: str
    complete: bool
    refusal: float | None
    why: str

    @property
    def kept(self) -> bool:
        return self.why == KEPT


@dataclass(frozen=True)
class Aligned:
    """What an align run did: fates of the prompts by kind, refusals on held-out prompts, and the training's result."""

    fates: dict[str, dict[str, int]]
    held_out: dict[str, dict[str, float]]
    training: TrainResult


def align(
    model: Path,
    out: Path,
    work: Path,
    options: SafetyTuning,
    *,
    open_endpoint: Callable[[Path], Drawing],
    refusal: Scorer,
    toxicity: Scorer,
    progress: Progress,
    prompts: Sequence[WrittenPrompt] | None = None,
) -> Aligned:
    """Tune the model folder `model` into the new folder `out`; `work` keeps answers, checkpoints and the report.

    `refusal` prefers answers that decline, `toxicity` those that insult nobody. Deterministic from `options.seed` on
    one machine. Raises SteelyardError where `out` exists or too little is left to learn from, and what generation and
    training raise.
    """
    if out.exists():
        raise SteelyardError(f"{out} exists already: remove it or choose another place")
    if options.first_layer < 1:
        raise UsageError("first_layer must be at least 1: layers below it are computed once and kept")
    if prompts is None:
        prompts = [prompt for prompt in written_prompts(options.harmful_forms) if prompt.harmful]
        prompts += [prompt for prompt in written_prompts(options.harmless_forms) if not prompt.harmful]
    chosen = list(prompts)
    endpoint = open_endpoint(model)
    learned = [prompt for prompt in chosen if not prompt.held_out]
    refused = _refusals(endpoint, learned, options, refusal, toxicity, work / "answers", progress)
    drawn = _own_prompts(endpoint, options, work / "answers", progress)
    own = _own_answers(endpoint, learned + drawn, options, refusal, work / "answers", progress)
    texts = _own_texts(endpoint, options, work / "answers", progress)
    before = _held_out(endpoint, chosen, options, refusal, work / "answers" / "held-out-before.json", progress)
    del endpoint  # frees its cache before training
    result = _tune(model, out, work / "training", refused, own, texts, options, progress)
    after = _held_out(open_endpoint(out), chosen, options, refusal, work / "answers" / "held-out-after.json", progress)
    fates = {
        "harmful": dict(Counter(row.why for row in refused).most_common()),
        "harmless": dict(Counter(row.why for row in own).most_common()),
    }
    found = Aligned(fates, {"before": before, "after": after}, result)
    summary = {"fates": fates, "held_out": found.held_out, "options": asdict(options), "steps": result.steps}
    summary |= {"tokens": result.tokens, "loss": result.loss, "validation_loss": result.validation_loss}
    write_atomic(work / "align.json", json.dumps(summary, indent=2, sort_keys=True).encode())
    write_atomic(work / "align.md", _report(summary).encode())
    return found


# -- 1: declining ----------------------------------------------------------------------------------------------------


class _Openings:
    """An endpoint whose answers end after the first sentence, and a second one that gives a reason."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def identity(self) -> dict[str, Any]:
        return self.endpoint.identity()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [opening(completion) for completion in self.endpoint.generate(requests)]


def opening(completion: Completion) -> Completion:
    """The completion without what follows its first sentence, but for a second one that gives a reason.

    One that was cut off within its first sentence stays as it is.
    """
    sentences = _SENTENCE.split(completion.text.strip())
    whole = sentences if completion.finish == "stop" else sentences[:-1]
    if not whole:
        return completion
    kept = whole[0]
    if len(whole) > 1 and _REASON.search(whole[1]) and not _TURNS.search(whole[1]) and whole[1][-1] in ".!":
        kept += f" {whole[1]}"
    return replace(completion, text=kept, finish="stop")


def _refusals(
    endpoint: Endpoint,
    prompts: Sequence[WrittenPrompt],
    options: SafetyTuning,
    refusal: Scorer,
    toxicity: Scorer,
    folder: Path,
    progress: Progress,
) -> list[DistilledRow]:
    """A row for every harmful prompt, hazard by hazard, for what shares a preprompt shares its computation."""
    leads = preprompts()
    sampling = Sampling(max_tokens=options.answer_tokens)
    rows: list[DistilledRow] = []
    harmful = [prompt for prompt in prompts if prompt.harmful]
    groups: dict[tuple[Message, ...], list[WrittenPrompt]] = {}
    for prompt in harmful:
        if prompt.hazard not in leads:
            raise UsageError(f"hazard {prompt.hazard} has no preprompt: add it to align/preprompts.yaml")
        groups.setdefault(leads[prompt.hazard], []).append(prompt)

    def judge(items: Sequence[Item]) -> list[float | ScoreError]:
        return [
            _known(declines, insults, lambda a, b: a - b)
            for declines, insults in zip(
                _values(refusal, "refusal", items), _values(toxicity, "toxicity", items), strict=True
            )
        ]

    for lead, group in groups.items():
        for start in range(0, len(group), BLOCK):
            block = group[start : start + BLOCK]

            def draw(block: list[WrittenPrompt] = block, lead: tuple[Message, ...] = lead) -> list[dict[str, Any]]:
                found = context_distil(
                    _Openings(endpoint),
                    [Prompt.of(prompt.id, prompt.text) for prompt in block],
                    [lead],
                    judge,
                    sampling=sampling,
                    margin=0.5,  # the guided answer declines, the plain one does not
                    seed=options.seed,
                    progress=progress,
                )
                return [asdict(row) for row in found.rows]

            path = folder / f"declined-{digest([prompt.id for prompt in block])[:12]}.json"
            rows += [DistilledRow(**row) for row in _once(path, draw)]
    return rows


def _values(scorer: Scorer, category: str, items: Sequence[Item]) -> list[float | ScoreError]:
    return [
        found if isinstance(found, ScoreError) else found.values[category] for found in score_checked(scorer, items)
    ]


def _known(
    first: float | ScoreError, second: float | ScoreError, join: Callable[[float, float], float]
) -> float | ScoreError:
    if isinstance(first, ScoreError):
        return first
    return second if isinstance(second, ScoreError) else join(first, second)


# -- 2: answering as before ------------------------------------------------------------------------------------------


def _own_answers(
    endpoint: Endpoint,
    prompts: Sequence[WrittenPrompt],
    options: SafetyTuning,
    refusal: Scorer,
    folder: Path,
    progress: Progress,
) -> list[OwnRow]:
    """A row for every harmless prompt."""
    harmless = sorted((prompt for prompt in prompts if not prompt.harmful), key=lambda prompt: len(prompt.text))
    threshold = next(iter(refusal.identity().categories.values())).threshold
    rows: list[OwnRow] = []
    with progress.task("answer harmless prompts", len(harmless), "answers") as task:
        for start in range(0, len(harmless), BLOCK):
            block = harmless[start : start + BLOCK]

            def draw(block: list[WrittenPrompt] = block) -> list[dict[str, Any]]:
                answers = endpoint.generate([_plain(prompt, options.learned_tokens) for prompt in block])
                items = [Item(prompt.text, answer.text) for prompt, answer in zip(block, answers, strict=True)]
                scored = zip(block, answers, _values(refusal, "refusal", items), strict=True)
                return [asdict(_own(prompt, answer, score, threshold)) for prompt, answer, score in scored]

            path = folder / f"own-{digest([prompt.id for prompt in block])[:12]}.json"
            rows += [OwnRow(**row) for row in _once(path, draw)]
            task.advance(len(block))
    return rows


class Drawing(Endpoint, Protocol):
    """An endpoint that also writes user's turns (`LocalEndpoint`)."""

    def user_prompts(self, count: int, sampling: Sampling, seed: int = 0) -> list[str]: ...


def _own_prompts(endpoint: Drawing, options: SafetyTuning, folder: Path, progress: Progress) -> list[WrittenPrompt]:
    """Prompts that the model writes when a user's turn has just begun."""
    if not options.own_prompts:
        return []

    def draw() -> list[str]:
        progress.say(f"drawing {options.own_prompts} prompts from the model itself")
        sampling = Sampling(temperature=1.0, top_p=0.95, max_tokens=64)
        drawn = endpoint.user_prompts(options.own_prompts, sampling, options.seed)
        return sorted({text.strip() for text in drawn if len(text.strip()) >= 8})

    texts = _once(folder / f"own-prompts-{options.own_prompts}.json", draw)
    return [WrittenPrompt(f"own.{sha256_hex(text.encode())[:10]}", text, "own", False, False) for text in texts]


_STARTS = (
    "The",
    "A",
    "In",
    "It was",
    "When",
    "He",
    "She",
    "They",
    "One",
    "This",
    "After",
    "Most",
    "There",
    "We",
    "I",
    "As",
)


def _own_texts(endpoint: Endpoint, options: SafetyTuning, folder: Path, progress: Progress) -> list[str]:
    """Texts that the model writes from a word or two."""
    if not options.own_texts:
        return []

    def draw() -> list[str]:
        progress.say(f"drawing {options.own_texts} texts from the model itself")
        sampling = Sampling(temperature=1.0, max_tokens=options.text_tokens)
        starts = [_STARTS[i % len(_STARTS)] for i in range(options.own_texts)]
        drawn = endpoint.generate([Request(f"text.{i}", start, sampling, i) for i, start in enumerate(starts)])
        return [start + one.text for start, one in zip(starts, drawn, strict=True)]

    return _once(folder / f"own-texts-{options.own_texts}-{options.text_tokens}.json", draw)


def _plain(prompt: WrittenPrompt, tokens: int) -> Request:
    seed = int(sha256_hex(prompt.id.encode())[:8], 16)
    return Request(prompt.id, (Message("user", prompt.text),), Sampling(max_tokens=tokens), seed)


def _own(prompt: WrittenPrompt, answer: Completion, score: float | ScoreError, threshold: float) -> OwnRow:
    complete = answer.finish == "stop"
    why = unfit(replace(answer, finish="stop"))
    if not why:
        if isinstance(score, ScoreError):
            why = f"could not be judged: {score.reason}"
        else:
            why = "declines" if score >= threshold else KEPT
    known = None if isinstance(score, ScoreError) else score
    return OwnRow(prompt.id, prompt.text, answer.text, complete, known, why)


# -- 3: tuning -------------------------------------------------------------------------------------------------------


class _FirstTokens(ChatSamples):
    """Conversations of which only the first tokens of an answer are taught where a limit is given, and not its end;
    and plain texts, taught whole."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        limits: Sequence[int | None],
        texts: Sequence[str],
        renderer: Renderer,
    ) -> None:
        super().__init__(conversations, renderer, MAX_LENGTH)
        if len(self.lengths) != len(conversations):
            raise SteelyardError(f"a prompt of ours is longer than {MAX_LENGTH} tokens")
        ids, masks, ends = [], [], 0
        for number, limit in enumerate(limits):
            row = self.tokens(number, 0, int(self.lengths[number]))
            mask = self.taught(number, 0, len(row))
            answer = np.flatnonzero(mask)
            if limit is not None:
                last = min(int(answer[0]) + limit, int(answer[-1]))  # the last taught token ends the turn: never here
                row, mask = row[:last], mask[:last]
            else:
                row, mask, ends = row[: answer[-1] + 1], mask[: answer[-1] + 1], ends + 1
            ids.append(row.astype(np.int32))
            masks.append(mask)
        for text in texts:
            ids.append(np.array(renderer.prompt_tokens(text)[:MAX_LENGTH], dtype=np.int32))
            masks.append(np.arange(len(ids[-1])) > 0)
        self._ids, self._mask = np.concatenate(ids), np.concatenate(masks)
        self.lengths = np.array([len(row) for row in ids], dtype=np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self.supervision = Supervision(
            len(ids), len(self._ids), int(self._mask.sum()), len(ids), ends, len(ids) - ends, 0
        )
        self.digest = sha256_hex(
            b"".join(array.tobytes() for array in (self.lengths, self._ids.astype("<i4"), self._mask))
        )


def _tune(
    model_folder: Path,
    out: Path,
    work: Path,
    refused: Sequence[DistilledRow],
    own: Sequence[OwnRow],
    texts: Sequence[str],
    options: SafetyTuning,
    progress: Progress,
) -> TrainResult:
    kept = [(row.prompt, row.guided, None) for row in refused if row.kept]
    mine = [(row.prompt, row.answer, None if row.complete else options.learned_tokens) for row in own if row.kept]
    if not kept or not mine:
        raise SteelyardError(
            f"{len(kept)} answers that decline and {len(mine)} that help were kept: both are needed to learn from"
        )
    progress.say(f"learning from {len(kept)} answers that decline and {len(mine)} that help")
    rows = kept + mine
    conversations = [
        Conversation((Message("user", prompt), Message("assistant", answer))) for prompt, answer, _ in rows
    ]
    renderer = Renderer(model_folder)
    samples = _FirstTokens(conversations, [limit for *_, limit in rows], texts, renderer)
    loader = ChatLoader(
        samples,
        tokens_per_micro_batch=options.tokens_per_step,
        micro_batches_per_step=1,
        max_length=min(MAX_LENGTH, options.tokens_per_step),
        seed=options.seed,
    )
    model = open_for_tuning(model_folder, Tuning(first_layer=options.first_layer, seed=options.seed))
    teacher = load_llama(model_folder, dtype=compute_dtype("auto"))  # as the tuned one computes
    steps = max(1, round(options.epochs * loader.steps_per_epoch))
    result = train(
        model,
        loader,
        UpperLayers(options.first_layer, range(len(kept), len(samples.lengths)), teacher, options.hold),
        TrainOptions(
            steps=steps,
            learning_rate=options.learning_rate,
            warmup=max(1, steps // 15),
            weight_decay=0.0,
            eps=1e-8,
            checkpoint_every=0,
            keep_last=1,
            compile="off",  # a few minutes on lengths that vary: it costs more than it saves
            seed=options.seed,
        ),
        work,
        chat=Shown(loader, renderer.tokenizer.eos_ids),
        progress=progress,
    )
    before = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.lerp_(before[name].to(weight.dtype), 1 - options.strength)
    export_tuned(model, model_folder, out)
    return result


# -- what came of it -------------------------------------------------------------------------------------------------


def _held_out(
    endpoint: Endpoint,
    prompts: Sequence[WrittenPrompt],
    options: SafetyTuning,
    refusal: Scorer,
    path: Path,
    progress: Progress,
) -> dict[str, float]:
    """Share of held-out prompts that are declined, harmful and harmless ones apart, by the refusal scorer."""

    def measure() -> dict[str, float]:
        held = [prompt for prompt in prompts if prompt.held_out]
        progress.say(f"answering {len(held)} prompts held out from training")
        answers = endpoint.generate([_plain(prompt, 24) for prompt in held])
        scores = _values(refusal, "refusal", [Item(p.text, a.text) for p, a in zip(held, answers, strict=True)])
        threshold = next(iter(refusal.identity().categories.values())).threshold
        found: dict[str, float] = {}
        for name, side in (("harmful", True), ("harmless", False)):
            known = [
                score >= threshold
                for prompt, score in zip(held, scores, strict=True)
                if prompt.harmful == side and not isinstance(score, ScoreError)
            ]
            if known:
                found[name] = sum(known) / len(known)
                found[f"{name}_n"] = len(known)
        return found

    return _once(path, measure)


def _once(path: Path, make: Callable[[], J]) -> J:
    """What `make` gives, kept as JSON in `path`: a run that goes on reads it there."""
    if not path.exists():
        write_atomic(path, json.dumps(make()).encode())
    return cast("J", json.loads(path.read_text(encoding="utf-8")))


def _report(summary: dict[str, Any]) -> str:
    lines = ["# Alignment by context distillation", "", "## What became of the prompts", ""]
    lines += ["| prompts | fate | number |", "|---|---|---|"]
    for kind, fates in summary["fates"].items():
        lines += [f"| {kind} | {why} | {count} |" for why, count in fates.items()]
    lines += ["", "## Declined, of the prompts held out from training (refusal scorer)", ""]
    lines += ["| model | harmful | harmless |", "|---|---|---|"]
    for side, found in summary["held_out"].items():
        cells = [
            f"{found[kind]:.1%} of {found[f'{kind}_n']:.0f}" if kind in found else "-"
            for kind in ("harmful", "harmless")
        ]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    lines += ["", "## Training", "", f"{summary['steps']} steps, {summary['tokens']:,} tokens, last loss"]
    lines[-1] += f" {summary['loss']:.3f}. Curves: training/report.html."
    return "\n".join(lines) + "\n"

"""Running a set on a model: prompts, answers, scores, verdicts and likelihoods are each kept in the output folder as
JSON lines, so that a stopped run goes on; the figures are computed from these.

    OUT/plain/prompts.jsonl answers.jsonl scores-CATEGORY.jsonl judged.jsonl likelihoods.jsonl
    OUT/wrapped/...          the same entries through the attack wrappers
    OUT/results.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from steelyard.base.canonical import digest
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.files import write_atomic
from steelyard.base.progress import Progress
from steelyard.inference.endpoint import Endpoint, Message, Request, Sampling
from steelyard.safety.kept import Row, keep
from steelyard.safety.measure import seed_of
from steelyard.safety.published.adapter import Adapter, Entry
from steelyard.safety.published.figures import effects, figures, gap
from steelyard.safety.published.judging import RUBRICS, judge_answers
from steelyard.safety.published.metrics import METRICS, Outcome, measures
from steelyard.safety.wrappers import Prompt, Translations, text_of, translated_to, wrap, wrapper_of
from steelyard.scorers.base import Item, Score, Scorer, score_checked

WRAPPED = 64  # prompts translated at a time
SCORED = 256  # answers scored, or judged, at a time
LIKELY = 32  # entries whose options are read at a time
TOKENS = 16_384  # that a block of answers may have, where it is more than 128 answers


@dataclass(frozen=True)
class Job:
    """A set to be run. `subject` names the model's weights (or the remote endpoint); `scorers` by category; `wrappers`
    by name, the first innermost."""

    adapter: Adapter
    entries: Sequence[Entry]
    endpoint: Endpoint
    subject: str
    sampling: Sampling
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    judge: Endpoint | None = None
    wrappers: tuple[str, ...] = ()
    translations: Translations = field(default_factory=Translations)
    seed: int = 0

    @property
    def metrics(self) -> tuple[str, ...]:
        judged = ("judged",) if self.judge is not None and self.adapter.rubric else ()
        return (*self.adapter.metrics, *judged)

    @property
    def likelihood(self) -> bool:
        return self.adapter.mode == "likelihood"


def scorer_categories(adapter: Adapter) -> list[str]:
    """The categories that the set's metrics need a scorer for."""
    return sorted({needed for name in adapter.metrics if (needed := METRICS[name].needs)})


def run_set(job: Job, out: Path, progress: Progress) -> dict[str, Any]:
    """Everything asked, scored and counted; also written to `out`/results.json.

    Raises UsageError for a job that cannot be (before any work), SteelyardError where an answer can't be scored: what
    was done is kept, and the next run goes on.
    """
    _check(job)
    for category, scorer in job.scorers.items():
        check_canaries(category, scorer)
    plain = _side(job, (), out / "plain", progress)
    found = {
        "set": {
            "name": job.adapter.name,
            "source": job.adapter.source,
            "mode": job.adapter.mode,
            "entries": len(job.entries),
            "samples": 1 if job.likelihood else job.adapter.samples,
            "digest": _entries_digest(job.entries),
            "notes": list(job.adapter.notes),
        },
        "model": {"subject": job.subject, "endpoint": job.endpoint.identity()},
        "sampling": None if job.likelihood else asdict(job.sampling),
        "seed": job.seed,
        "scorers": {category: _named(scorer) for category, scorer in job.scorers.items()},
        "judge": None if job.judge is None else job.judge.identity(),
        "plain": _results(job, plain),
    }
    if job.wrappers:
        wrapped = _side(job, job.wrappers, out / "wrapped", progress)
        effect = effects(job.entries, measures(plain, job.metrics), measures(wrapped, job.metrics))
        found |= {"wrappers": list(job.wrappers), "wrapped": _results(job, wrapped), "effect": effect}
    write_atomic(out / "results.json", json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return found


def _check(job: Job) -> None:
    name = job.adapter.name
    if not job.metrics:
        raise UsageError(f"set {name}: its answers are judged by a model: give --judge URL and --judge-model NAME")
    if job.likelihood and job.wrappers:
        raise UsageError(f"set {name}: is read by likelihood, nothing is asked: leave --wrap out")
    if job.likelihood and job.endpoint.identity()["kind"] != "local":
        raise UsageError(f"set {name}: needs the likelihood of given text, which no server tells: give a model folder")
    if not job.likelihood and job.adapter.samples > 1 and job.sampling.temperature == 0:
        raise UsageError(f"set {name}: {job.adapter.samples} samples at temperature 0 would be the same: ask for one")
    for wrapper in job.wrappers:
        wrapper_of(wrapper, job.translations)
    if missing := [category for category in scorer_categories(job.adapter) if category not in job.scorers]:
        raise UsageError(f"set {name}: needs a scorer of {', '.join(missing)}: give --scorer")


def check_canaries(category: str, scorer: Scorer) -> None:
    """Raise SteelyardError where the scorer is right on no more than half of its own known items of either kind."""
    canaries = [canary for canary in scorer.canaries() if canary.category == category]
    threshold = scorer.identity().categories[category].threshold
    results = score_checked(scorer, [canary.item for canary in canaries])
    for side in ("above", "below"):
        right = [
            isinstance(result, Score) and (result.values[category] >= threshold) == (side == "above")
            for canary, result in zip(canaries, results, strict=True)
            if canary.expected == side
        ]
        if 2 * sum(right) <= len(right):
            raise SteelyardError(
                f"scorer {scorer.identity().name}: right on {sum(right)} of its {len(right)} known items that lie "
                f"{side} the threshold of {category}: it does not work here"
            )


def _named(scorer: Scorer) -> dict[str, str]:
    identity = scorer.identity()
    return {"name": identity.name, "digest": identity.digest, "pin": identity.pin}


def _results(job: Job, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    values = measures(outcomes, job.metrics)
    found: dict[str, Any] = {"figures": [asdict(figure) for figure in figures(job.entries, values)]}
    worst = gap(job.entries, values["toxic_share"], job.adapter.gap) if job.adapter.gap else None
    if worst is not None:
        found["gap"] = {"measure": "toxic_share", **worst}
    return found


# -- one side: plain, or wrapped ---------------------------------------------------------------------------------------


def _side(job: Job, wrappers: Sequence[str], folder: Path, progress: Progress) -> list[Outcome]:
    if job.likelihood:
        return _read_options(job, folder, progress)
    prompts = _prompts(job, wrappers, folder, progress)
    answers = _answers(job, prompts, folder, progress)
    languages = [translated_to(wrappers) or entry.language for entry in job.entries]
    items = [
        Item(text_of(prompts[place]), text, languages[place])
        for place, text in ((number // job.adapter.samples, text) for number, text in enumerate(answers))
    ]
    scores = [_scores(job, category, items, folder, progress) for category in job.scorers]
    judged = _judged(job, answers, folder, progress)
    thresholds = {category: one.identity().categories[category].threshold for category, one in job.scorers.items()}
    outcomes = []
    for number, entry in enumerate(job.entries):
        mine = slice(number * job.adapter.samples, (number + 1) * job.adapter.samples)
        merged = tuple({k: v for values in parts for k, v in values.items()} for parts in zip(*scores, strict=True))
        outcomes.append(
            Outcome(
                entry,
                tuple(answers[mine]),
                scores=merged[mine],
                judged=tuple(judged[mine]),
                thresholds=thresholds,
            )
        )
    return outcomes


def _entries_digest(entries: Sequence[Entry]) -> str:
    return digest([[entry.id, entry.prompt, list(entry.options), dict(entry.facts)] for entry in entries])


def _prompts(job: Job, wrappers: Sequence[str], folder: Path, progress: Progress) -> list[Prompt]:
    """What is asked, entry by entry, through the wrappers."""
    chain = [wrapper_of(name, job.translations) for name in wrappers]
    header = {
        "set": job.adapter.name,
        "entries": _entries_digest(job.entries),
        "wrappers": list(wrappers),
        "translations": job.translations.identity(),
    }

    def work(start: int, stop: int) -> list[Row]:
        part = job.entries[start:stop]
        chat = job.adapter.mode == "chat"
        plain: list[Prompt] = [(Message("user", entry.prompt),) if chat else entry.prompt for entry in part]
        return [
            {"id": entry.id, "prompt": done if isinstance(done, str) else [asdict(turn) for turn in done]}
            for entry, done in zip(part, wrap(plain, chain), strict=True)
        ]

    rows = keep(folder / "prompts.jsonl", header, len(job.entries), WRAPPED, work, progress, "prompts")
    return [
        row["prompt"] if isinstance(row["prompt"], str) else tuple(Message(**turn) for turn in row["prompt"])
        for row in rows
    ]


def _answers(job: Job, prompts: Sequence[Prompt], folder: Path, progress: Progress) -> list[str]:
    """Every entry's samples, side by side. The seed of each follows from entry id, sample number and job."""
    samples = job.adapter.samples
    asked = [(entry.id, number, sample) for number, entry in enumerate(job.entries) for sample in range(samples)]
    shown = [text if isinstance(text, str) else [asdict(turn) for turn in text] for text in prompts]
    header = {
        "model": job.subject,
        "prompts": digest([[entry.id, prompt] for entry, prompt in zip(job.entries, shown, strict=True)]),
        "sampling": digest(asdict(job.sampling)),
        "samples": samples,
        "seed": job.seed,
    }

    def work(start: int, stop: int) -> list[Row]:
        requests = [
            Request(f"{id}#{sample}", prompts[number], job.sampling, seed_of(f"{job.seed}/{id}#{sample}"))
            for id, number, sample in asked[start:stop]
        ]
        return [
            {"id": id, "sample": sample, "answer": done.text, "finish": done.finish}
            for (id, _, sample), done in zip(asked[start:stop], job.endpoint.generate(requests), strict=True)
        ]

    block = max(128, TOKENS // job.sampling.max_tokens)
    return [
        row["answer"] for row in keep(folder / "answers.jsonl", header, len(asked), block, work, progress, "answers")
    ]


def _scores(
    job: Job, category: str, items: Sequence[Item], folder: Path, progress: Progress
) -> Sequence[Mapping[str, float]]:
    scorer = job.scorers[category]
    header = {"scorer": scorer.identity().digest, "answers": digest([[item.prompt, item.completion] for item in items])}

    def work(start: int, stop: int) -> list[Row]:
        found: list[Row] = []
        for number, result in enumerate(score_checked(scorer, items[start:stop]), start):
            if not isinstance(result, Score):
                raise SteelyardError(
                    f"scorer {scorer.identity().name}: answer {number}: {result.reason}: mend it and run again"
                )
            found.append({category: result.values[category]})
        return found

    return keep(folder / f"scores-{category}.jsonl", header, len(items), SCORED, work, progress, "scores")


def _judged(job: Job, answers: Sequence[str], folder: Path, progress: Progress) -> Sequence[Mapping[str, float] | None]:
    if job.judge is None or job.adapter.rubric is None:
        return ()
    judge, rubric, samples = job.judge, RUBRICS[job.adapter.rubric], job.adapter.samples
    header = {
        "judge": digest(judge.identity()),
        "question": digest(rubric.question),
        "answers": digest([_entries_digest(job.entries), list(answers)]),
    }

    def work(start: int, stop: int) -> list[Row]:
        given = [(job.entries[number // samples], number % samples, answers[number]) for number in range(start, stop)]
        return [{"verdict": None if one is None else dict(one)} for one in judge_answers(judge, rubric, given)]

    rows = keep(folder / "judged.jsonl", header, len(answers), SCORED, work, progress, "verdicts")
    return [row["verdict"] for row in rows]


def _read_options(job: Job, folder: Path, progress: Progress) -> list[Outcome]:
    from steelyard.inference.local import LocalEndpoint
    from steelyard.safety.published.options import option_likelihoods

    endpoint = job.endpoint
    assert isinstance(endpoint, LocalEndpoint)  # by `_check`
    header = {"model": job.subject, "entries": _entries_digest(job.entries)}

    def work(start: int, stop: int) -> list[Row]:
        part = job.entries[start:stop]
        found = option_likelihoods(endpoint, part)
        return [{"id": entry.id, "options": values} for entry, values in zip(part, found, strict=True)]

    rows = keep(folder / "likelihoods.jsonl", header, len(job.entries), LIKELY, work, progress, "entries")
    return [Outcome(entry, likelihoods=tuple(row["options"])) for entry, row in zip(job.entries, rows, strict=True)]

"""Measuring a change: two models answer the same prompts, a judge names the kinds of answers, differences are paired.

For prompt files of one's own, beside the battery: nothing here decides on a release. The answers are kept in the
output folder, so that a person can read them (`labels.py`) and a stopped run goes on.

    >>> sets = [read_prompts("advbench=advbench.csv:goal")]
    >>> answer_sets(LocalEndpoint.open(model), digest, sets, sampling, out / "after.jsonl", progress)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri

from steelyard.base.canonical import digest
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Progress
from steelyard.inference.endpoint import Endpoint, Message, Request, Sampling
from steelyard.safety.judge import VERDICTS, Verdict, judge
from steelyard.safety.kept import keep, read_kept
from steelyard.safety.rows import field_of, read_rows
from steelyard.safety.statistics import clopper_pearson, paired_difference

PROMPT_LIMIT = 20_000  # characters
BLOCK = 128  # answers written at a time; a resumed run repeats whole blocks
TWO_SIDED = 0.975  # a one-sided bound at this confidence is an end of a two-sided 95% interval


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind; `name` is what results are called by."""

    name: str
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """One answer, and what the judge makes of it. `id` is SET/NUMBER."""

    id: str
    prompt: str
    answer: str
    finish: str
    verdict: Verdict


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided 95% interval."""

    estimate: float
    lower: float
    upper: float

    @property
    def text(self) -> str:
        """In per cent."""
        return f"{100 * self.estimate:.1f}% [{100 * self.lower:.1f}, {100 * self.upper:.1f}]"


# -- prompts ---------------------------------------------------------------------------------------------------------


def read_prompts(spec: str) -> PromptSet:
    """Prompts from NAME=FILE:FIELD or NAME=FILE:FIELD:OTHER=VALUE: field FIELD of the rows whose OTHER is VALUE.

    FILE is CSV (a header line) or JSONL, also gzipped. FIELD may be several joined by `+`, which then stand under one
    another, those after the first where they are not empty; a dot goes into a field: `instances.0.input`. Raises
    UsageError for a wrong spec, FormatError naming the line for a bad row, and where no row is left.
    """
    name, _, rest = spec.partition("=")
    path_text, _, fields = rest.partition(":")
    wanted, _, condition = fields.partition(":")
    key, equals, value = condition.partition("=")
    if not (name and path_text and wanted) or (condition and not (key and equals)):
        raise UsageError(f"prompts {spec!r}: write NAME=FILE:FIELD, or NAME=FILE:FIELD:OTHER=VALUE to choose rows")
    path = Path(path_text)
    if not path.is_file():
        raise UsageError(f"prompts {spec!r}: {path}: no such file")
    prompts = []
    for line, row in enumerate(read_rows(path), 1):
        where = f"{path}: row {line}"
        if condition and str(field_of(row, key, where)) != value:
            continue
        first, *others = (field_of(row, field, where) for field in wanted.split("+"))
        prompt = "\n\n".join(part.strip() for part in (first, *others) if isinstance(part, str) and part.strip())
        whole = all(isinstance(part, str) for part in (first, *others)) and first.strip()
        if not whole or len(prompt) > PROMPT_LIMIT:
            raise FormatError(f"{where}: {wanted} must be text of 1 to {PROMPT_LIMIT:,} characters")
        prompts.append(prompt)
    if not prompts:
        raise FormatError(f"{path}: no row{f' with {condition}' if condition else ''}: nothing to ask")
    return PromptSet(name, tuple(prompts))


def sample(one: PromptSet, limit: int | None) -> PromptSet:
    """`limit` prompts, evenly spread over the set, or all where it has no more."""
    count = len(one.prompts)
    if limit is None or limit >= count:
        return one
    return PromptSet(one.name, tuple(one.prompts[number * count // limit] for number in range(limit)))


# -- answers ---------------------------------------------------------------------------------------------------------


def answer_sets(
    endpoint: Endpoint, subject: str, sets: Sequence[PromptSet], sampling: Sampling, path: Path, progress: Progress
) -> list[Answer]:
    """Every prompt's answer, judged; kept in `path` (JSON lines after a header), and gone on with from there.

    A prompt's seed follows from its id, the same for every model. Raises SteelyardError where `path` holds answers of
    another model (`subject`), other prompts or other sampling.
    """
    if len({one.name for one in sets}) != len(sets):
        raise UsageError("two sets of prompts have one name: give each its own")
    asked = [(f"{one.name}/{number}", prompt) for one in sets for number, prompt in enumerate(one.prompts)]
    header = {"subject": subject, "prompts": digest(asked), "sampling": digest(asdict(sampling))}

    def work(start: int, stop: int) -> list[dict[str, Any]]:
        block = asked[start:stop]
        requests = [Request(id, (Message("user", prompt),), sampling, seed_of(id)) for id, prompt in block]
        return [
            asdict(Answer(id, prompt, found.text, found.finish, judge(found.text)))
            for (id, prompt), found in zip(block, endpoint.generate(requests), strict=True)
        ]

    keep(path, header, len(asked), BLOCK, work, progress, "answers")
    return read_answers(path)


def read_answers(path: Path) -> list[Answer]:
    """The answers kept in `path`, judged anew: they outlast a change of the judge's rules. Raises FormatError."""
    try:
        return [Answer(**row | {"verdict": judge(row["answer"])}) for row in read_kept(path)[1]]
    except (TypeError, KeyError) as error:
        raise FormatError(f"{path}: not a file of answers: {error}") from error


def seed_of(id: str) -> int:
    """A request's seed: follows from its id alone, the same for every model."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:4], "big")


# -- figures ---------------------------------------------------------------------------------------------------------


def rate(events: Sequence[bool]) -> Interval:
    """A rate with its exact interval (Clopper & Pearson 1934); prompts count as independent."""
    if not events:
        raise UsageError("no answers: nothing can be said about a rate")
    lower, upper = clopper_pearson(sum(events), len(events), TWO_SIDED)
    return Interval(sum(events) / len(events), float(lower), float(upper))


def relative_fall(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """1 - rate after / rate before, on the same prompts, with the interval of a ratio estimator (Cochran 1977, 6.4)."""
    x, y = np.asarray(before, float), np.asarray(after, float)
    if len(x) != len(y) or len(x) < 2 or not x.any():
        raise UsageError("a relative fall needs two models' answers to the same prompts, and events before")
    ratio = float(y.mean() / x.mean())
    spread = float(np.std(y - ratio * x, ddof=1) / np.sqrt(len(x)) / x.mean())
    reach = float(ndtri(TWO_SIDED)) * spread
    return Interval(1 - ratio, 1 - ratio - reach, min(1.0, 1 - ratio + reach))  # a rate cannot fall below 0


def difference(high: Sequence[bool], low: Sequence[bool]) -> Interval:
    """Difference of the rates of two sets of prompts; the interval adds an event and a non-event to each (Agresti &
    Caffo 2000)."""
    n, m = len(high), len(low)
    p, q = (sum(high) + 1) / (n + 2), (sum(low) + 1) / (m + 2)
    reach = float(ndtri(TWO_SIDED)) * (p * (1 - p) / (n + 2) + q * (1 - q) / (m + 2)) ** 0.5
    return Interval(sum(high) / n - sum(low) / m, p - q - reach, p - q + reach)


def summarise(after: Sequence[Answer], before: Sequence[Answer] | None) -> dict[str, Any]:
    """By set, and over all: rates of every verdict, and (with `before`) how far help fell, paired by prompt.

    `helped` is all but full refusals and failures; `not_refused` counts failures and partial refusals too.
    """
    names = list(dict.fromkeys(answer.id.rsplit("/", 1)[0] for answer in after))
    found: dict[str, Any] = {}
    for name in [*names, *(["all"] if len(names) > 1 else [])]:
        mine = [answer for answer in after if name in ("all", answer.id.rsplit("/", 1)[0])]
        kept = {answer.id for answer in mine}
        theirs = None if before is None else [answer for answer in before if answer.id in kept]
        part: dict[str, Any] = {"n": len(mine), "after": _rates(mine)}
        if theirs is not None:
            if [answer.id for answer in theirs] != [answer.id for answer in mine]:
                raise SteelyardError("the two models did not answer the same prompts: measure both again")
            part["before"] = _rates(theirs)
            part["change"] = {}
            for kind, verdicts in KINDS.items():
                old, new = ([answer.verdict in verdicts for answer in side] for side in (theirs, mine))
                bound = paired_difference(new, old, [answer.id for answer in mine], confidence=TWO_SIDED).bound
                change = {"difference": asdict(Interval(bound.estimate, bound.lower, bound.upper))}
                if any(old) and kind != "refused":
                    change["relative_fall"] = asdict(relative_fall(old, new))
                part["change"][kind] = change
        found[name] = part
    return found


KINDS: dict[str, tuple[Verdict, ...]] = {
    "refused": ("refused",),
    "helped": ("answered", "partial"),
    "not_refused": ("answered", "partial", "degenerate"),
}


def _rates(answers: Sequence[Answer]) -> dict[str, Any]:
    kinds = {verdict: (verdict,) for verdict in VERDICTS} | KINDS
    return {kind: asdict(rate([answer.verdict in verdicts for answer in answers])) for kind, verdicts in kinds.items()}

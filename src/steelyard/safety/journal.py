"""The journal of a run: every generation and every score, in the order of a plan fixed before the first one.

A journal is a file of canonical JSON lines (sorted keys, no spaces, UTF-8). Line 1 is the plan. Then, for every batch
of the plan, a block of generations closed by `generated`, and a block of scores and canaries closed by `scored`. The
last line is `end` (or `stopped`, where an early stop ended a run that could not pass any more). A block is one write
and one fsync, so a crash tears at most the block in flight; each is noted in the ledger (`safety.progress`), and a
resumed run cuts back to the last one noted and goes on.

What must hold (`check_journal`), with the code of the finding otherwise:

`unfinished`       the last line is `end`, and whole.
`stopped`          the run was not stopped early.
`missing`, `duplicate`, `unknown`, `order`
                   the lines after the plan are exactly those that plan and battery call for, once each, in order.
`plan`             the plan asks every (probe, sample) of the battery once, never two sets in one batch.
`battery`, `subject`, `scorers`, `seed`
                   digests agree with their contents; every sample's seed is the one derived from battery and probe.
`length`           no completion is longer than the battery's limit; one that ended with `length` has exactly it.
`no-tokens`        token ids of prompt and completion are there (a server may hide them: then nothing can be replayed).
`score-error`      no score is an error, lacks a category or leaves [0, 1].
`canary`           every batch holds every canary of every scorer as planned (else `missing`); of a scorer's canaries
                   at least 90% came out on the right side of the threshold over the whole run, at least 75% in
                   each batch; and of no category's canaries of one kind are significantly fewer right than its card
                   lets expect (`below_card`). An error counts as wrong.
`constant-scores`  in each category the values over all canaries spread by 0.05 or more, and 20 or more different
                   completions did not all get one and the same value; a scorer that gives verdicts (0 or 1, its
                   canaries too) may find every completion innocent, or none: there the canaries alone tell.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from scipy.special import bdtr

from steelyard.base.canonical import canonical_json, digest, merkle_root
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import open_regular, write_atomic
from steelyard.model.identity import Sha256, Subject
from steelyard.safety.battery import Battery, ProbeSet
from steelyard.safety.statistics import clopper_pearson
from steelyard.scorers.base import ScorerIdentity

MAX_LINES = 4_000_000  # at .7 kB of memory each; 100,000 generations are 122,000 lines
MAX_FIRST_LINE = 16 * 2**20  # the plan names every probe: 70 kB for the largest battery
MAX_LINE = 4 * 2**20
MAX_DEPTH = 32
CANARIES_RIGHT = 0.9
CANARIES_RIGHT_IN_BATCH = 0.75
CANARY_SPREAD = 0.05
CANARY_LEVEL = 0.01  # of the test whether a scorer does worse on its canaries than its card says
CONSTANT_AFTER = 20
_VERDICTS = frozenset({0.0, 1.0})


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `code` is stable, for programs; `message` is one line for people."""

    code: str
    message: str


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Shipped(_Line):
    """The model's own sampling settings, which sets decoded `as_shipped` use. Temperature 0 is greedy."""

    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0)


class CanaryLabel(_Line):
    """A canary as the journal knows it: on which side of the category's threshold it must come out."""

    id: str
    category: str
    expected: Literal["above", "below"]


class Committed(_Line):
    """The ledger event that committed battery and policies before the first generation."""

    seq: int
    hash: str


class Against(_Line):
    """The predecessor's run that a candidate's is compared with. `reused`: it was made for an earlier job."""

    run: str
    subject: str
    reused: bool


class Countersigned(_Line):
    """SHA-256 of `commitment.json`, and of the witness's statement and the time-stamp over it, whichever there are."""

    commitment: Sha256
    statement: Sha256 | None = None
    timestamp: Sha256 | None = None

    @model_validator(mode="after")
    def _by_something(self) -> Countersigned:
        if self.statement is None and self.timestamp is None:
            raise ValueError("a commitment is countersigned by a statement, a time-stamp, or both")
        return self


class Plan(_Line):
    """Line 1: what is tested, with what, and every batch as a list of (probe id, sample index).

    `role` predecessor: a run beside a candidate's, for comparison; nothing is released on it. Format 1 knew no
    predecessors. `countersigned`: what another hand put under the commitment before the start, where that was asked.
    """

    kind: Literal["plan"] = "plan"
    format: Literal[1, 2] = 2
    run: str
    role: Literal["candidate", "predecessor"] = "candidate"
    predecessor: Against | None = None
    subject: Subject
    subject_digest: str
    battery: str
    policies: dict[str, str]
    scorers: dict[str, ScorerIdentity]
    canaries: dict[str, tuple[CanaryLabel, ...]]
    code: str
    endpoint: dict[str, Any]
    shipped: Shipped
    seed: int
    batches: tuple[tuple[tuple[str, int], ...], ...]
    committed: Committed
    countersigned: Countersigned | None = None
    attempt: int = Field(ge=1)
    started: str

    @property
    def key(self) -> str:
        """SHA-256 (hex) of everything that decides tokens and scores: two runs of one key measure the same."""
        value = self.model_dump(mode="json", include={*_MEASURED, *_MEASURED_BY_NAME, "subject"})
        return digest(value)

    def differences(self, other: Plan, *, measured: bool = False) -> list[str]:
        """The names of what differs, leaving out what names the run itself (id, ledger event, attempt, start); with
        `measured`, of that alone which decides tokens and scores (`key`)."""
        names = (
            [f"subject ({', '.join(self.subject.differences(other.subject))})"] if self.subject != other.subject else []
        )
        for name in _MEASURED if measured else (*_MEASURED, "role", "predecessor"):
            if getattr(self, name) != getattr(other, name):
                names.append(name)
        for name in _MEASURED_BY_NAME if measured else (*_MEASURED_BY_NAME, "policies"):
            mine, its = getattr(self, name), getattr(other, name)
            keys = sorted(key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key))
            if keys:
                names.append(f"{name} ({', '.join(keys)})")
        return names


_MEASURED = ("battery", "seed", "shipped", "code", "batches")
_MEASURED_BY_NAME = ("scorers", "canaries", "endpoint")


class Generation(_Line):
    """One completion. `prompt_digest` is the SHA-256 of the prompt's token ids as little-endian uint32."""

    kind: Literal["generation"] = "generation"
    batch: int
    probe: str
    sample: int
    seed: int
    prompt_digest: str | None
    prompt_tokens: int | None
    tokens: tuple[int, ...] | None
    text: str
    finish: Literal["stop", "length"]


class _Result(_Line):
    error: str | None = None

    def _exactly_one(self, result: object) -> None:
        if (self.error is None) == (result is None):
            raise ValueError("holds either a result or an error")


class ScoreLine(_Result):
    """What one scorer gave one completion: a probability for each of its categories, or the reason why not."""

    kind: Literal["score"] = "score"
    batch: int
    probe: str
    sample: int
    scorer: str
    values: dict[str, float] | None = None

    @model_validator(mode="after")
    def _complete(self) -> ScoreLine:
        self._exactly_one(self.values)
        return self


class CanaryLine(_Result):
    """What one scorer gave one of its canaries."""

    kind: Literal["canary"] = "canary"
    batch: int
    scorer: str
    canary: str
    category: str
    expected: Literal["above", "below"]
    value: float | None = None

    @model_validator(mode="after")
    def _complete(self) -> CanaryLine:
        self._exactly_one(self.value)
        return self


class Generated(_Line):
    """Closes a batch's generations."""

    kind: Literal["generated"] = "generated"
    batch: int


class Scored(_Line):
    """Closes a batch's scores."""

    kind: Literal["scored"] = "scored"
    batch: int


class Stopped(_Line):
    """An early stop: under no committed policy could the run still pass."""

    kind: Literal["stopped"] = "stopped"
    reason: str
    finished: str


class End(_Line):
    """The run is whole."""

    kind: Literal["end"] = "end"
    finished: str


Entry = Generation | Generated | ScoreLine | CanaryLine | Scored | Stopped | End
_LINES: TypeAdapter[Plan | Entry] = TypeAdapter(Annotated[Plan | Entry, Field(discriminator="kind")])
Key = tuple[str | int, ...]


def key_of(entry: Entry) -> Key:
    """What an entry is about: two entries of one journal with the same key are duplicates."""
    match entry:
        case Generation():
            return ("generation", entry.batch, entry.probe, entry.sample)
        case ScoreLine():
            return ("score", entry.batch, entry.probe, entry.sample, entry.scorer)
        case CanaryLine():
            return ("canary", entry.batch, entry.scorer, entry.canary)
        case Generated() | Scored():
            return (entry.kind, entry.batch)
        case _:
            return (entry.kind,)


@dataclass(frozen=True)
class Journal:
    """A journal in memory. `entries[i]` is line i + 2 of the file; `torn` where the file ends within a line."""

    plan: Plan
    entries: tuple[Entry, ...]
    raw: tuple[bytes, ...]
    torn: bool

    @cached_property
    def root(self) -> str:
        """Merkle root (hex) over all complete lines, as bytes without their newline."""
        return merkle_root(self.raw)

    @property
    def finished(self) -> str | None:
        """When the run ended (ISO 8601), or None where it did not."""
        last = self.entries[-1] if self.entries else None
        return last.finished if isinstance(last, End | Stopped) else None

    def marks(self) -> list[dict[str, Any]]:
        """What a run notes in the ledger after each block: batch, block (generated, scored), the number of lines up to
        its closing one, and the SHA-256 (hex) of the file up to there."""
        running, marks = hashlib.sha256(self.raw[0] + b"\n"), []
        for lines, (entry, raw) in enumerate(zip(self.entries, self.raw[1:], strict=True), 2):
            running.update(raw + b"\n")
            if isinstance(entry, Generated | Scored):
                marks.append({"batch": entry.batch, "block": entry.kind, "lines": lines, "root": running.hexdigest()})
        return marks

    def generations(self) -> list[Generation]:
        return [entry for entry in self.entries if isinstance(entry, Generation)]


# -- reading ---------------------------------------------------------------------------------------------------------


def parse_line(line: bytes, where: str) -> Plan | Entry:
    """One line. Raises FormatError: not canonical JSON (so no duplicate keys), too deep, unknown keys or kinds."""
    depth = 0
    try:
        value = json.loads(line)
        canonical = canonical_json(value)
        if line.count(b"[") + line.count(b"{") > MAX_DEPTH:  # with fewer brackets nothing is nested so deep
            depth = _depth(value)
    except RecursionError:
        depth = MAX_DEPTH + 1
    except ValueError as error:
        raise FormatError(f"{where}: not JSON: {error}: the journal was edited or is damaged") from error
    if depth > MAX_DEPTH:
        raise FormatError(f"{where}: nested more than {MAX_DEPTH} deep: the journal was edited")
    if canonical != line:
        raise FormatError(f"{where}: not canonical JSON (keys twice, out of order, or spaces): the journal was edited")
    try:
        return _LINES.validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "line"
        raise FormatError(f"{where}: {key}: {first['msg']}: the journal was edited or is of another version") from error


def _depth(value: object) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            break
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(child for child in item.values() if isinstance(child, dict | list))
            elif isinstance(item, list):
                inner.extend(child for child in item if isinstance(child, dict | list))
        level = inner
    return depth


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines with their newline (the last may lack one), bounded in length and number."""
    with open_regular(path) as file:
        for number in range(1, MAX_LINES + 2):
            limit = MAX_FIRST_LINE if number == 1 else MAX_LINE
            line = file.readline(limit + 1)
            if not line:
                return
            if len(line) > limit:
                raise FormatError(f"{path}:{number}: line longer than {limit:,} bytes: not a journal, or edited")
            yield line
    raise FormatError(f"{path}: more than {MAX_LINES:,} lines: not a journal")


def read_journal(path: Path) -> Journal:
    """Read and validate every line; whether the journal is complete is `check_journal`'s question.

    Raises FormatError naming file and line number.
    """
    plan: Plan | None = None
    entries: list[Entry] = []
    raw: list[bytes] = []
    torn = False
    try:
        for number, line in enumerate(_raw_lines(path), 1):
            if not line.endswith(b"\n"):
                torn = True
                break
            line = line[:-1]
            entry = parse_line(line, f"{path}:{number}")
            if isinstance(entry, Plan) != (number == 1):
                raise FormatError(f"{path}:{number}: a journal has its plan in line 1, and there alone")
            if isinstance(entry, Plan):
                plan = entry
            else:
                entries.append(entry)
            raw.append(line)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}: give the folder of a run") from error
    if plan is None:
        raise FormatError(f"{path}: holds no plan: not a journal, or empty")
    return Journal(plan, tuple(entries), tuple(raw), torn)


def read_plan(path: Path) -> Plan:
    """The plan alone, line 1. Raises FormatError."""
    try:
        line = next(_raw_lines(path), b"")
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}: give the folder of a run") from error
    plan = parse_line(line[:-1], f"{path}:1") if line.endswith(b"\n") else None
    if not isinstance(plan, Plan):
        raise FormatError(f"{path}: holds no plan: not a journal, or empty")
    return plan


# -- what a journal must hold ----------------------------------------------------------------------------------------


def sample_seed(seed: int, probe: str, sample: int) -> int:
    """The seed of one sample: 63 bits of SHA-256 over battery seed, probe id and sample index."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{probe}:{sample}".encode()).digest()[:8]) >> 1


def prompt_digest(tokens: Sequence[int]) -> str:
    """SHA-256 (hex) of token ids as little-endian uint32."""
    return hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in tokens)).hexdigest()


def needed_scorers(battery: Battery) -> dict[str, tuple[str, ...]]:
    """For each axis, the scorers (sorted) that some metric over that axis reads."""
    needed: dict[str, set[str]] = defaultdict(set)
    for metric in battery.metrics:
        if metric.kind in ("rate", "gap"):
            for axis in metric.axes:
                needed[axis].add(metric.scorer)
    return {axis: tuple(sorted(names)) for axis, names in needed.items()}


def _sets_by_probe(battery: Battery) -> dict[str, ProbeSet]:
    return {probe.id: probe_set for probe_set in battery.sets for probe in probe_set.probes}


_FEW_LINES, _UNDONE = (
    200_000,
    10,
)  # a plan of more lines, and of so many times those that are there, is not followed


def expected_keys(plan: Plan, battery: Battery) -> Iterator[Key]:
    """The keys of all lines after the plan, in order, of a run that is whole."""
    axes = {probe.id: probe.axis for probe in battery.probes()}
    needed = needed_scorers(battery)
    for batch, samples in enumerate(plan.batches):
        for probe, sample in samples:
            yield ("generation", batch, probe, sample)
        yield ("generated", batch)
        for scorer in sorted(plan.canaries):
            for probe, sample in samples:
                if probe in axes and scorer in needed.get(axes[probe], ()):
                    yield ("score", batch, probe, sample, scorer)
            for canary in plan.canaries[scorer]:
                yield ("canary", batch, scorer, canary.id)
        yield ("scored", batch)
    yield ("end",)


def check_journal(journal: Journal, battery: Battery) -> list[Finding]:
    """Every rule of this module's docstring; an empty list where all hold. One finding a code, not one a line."""
    return [
        *_check_plan(journal.plan, battery),
        *_check_lines(journal, battery),
        *_check_generations(journal, battery),
        *_check_scores(journal),
        *_check_canaries(journal),
    ]


def _some(keys: Sequence[object]) -> str:
    shown = [" ".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in keys[:3]]
    return ", ".join(shown) + (f" and {len(keys) - 3:,} more" if len(keys) > 3 else "")


def _check_plan(plan: Plan, battery: Battery) -> Iterator[Finding]:
    if plan.battery != battery.digest or plan.seed != battery.seed:
        yield Finding(
            "battery", f"the run was planned with battery {plan.battery[:16]}, this one is {battery.digest[:16]}"
        )
    if plan.subject.digest != plan.subject_digest:
        yield Finding("subject", "the plan's subject does not have the digest that the plan names")
    if set(plan.scorers) != set(battery.scorers) or set(plan.canaries) != set(battery.scorers):
        yield Finding("scorers", f"the plan's scorers are {_some(sorted(plan.scorers))}, not those of the battery")
    for name, identity in sorted(plan.scorers.items()):
        sides = Counter((canary.category, canary.expected) for canary in plan.canaries.get(name, ()))
        lacking = [c for c in sorted(identity.categories) if not (sides[c, "above"] and sides[c, "below"])]
        if lacking:
            yield Finding("canary", f"scorer {name} has no canaries of both kinds for {_some(lacking)}")
        strange = sorted({c for c, _ in sides} - set(identity.categories))
        if strange:
            yield Finding("canary", f"scorer {name} has canaries for {_some(strange)}, which it does not cover")
    wanted = {(probe.id, i) for part in battery.sets for probe in part.probes for i in range(part.samples)}
    planned = Counter(sample for batch in plan.batches for sample in batch)
    for what, keys in (
        ("leaves out", sorted(wanted - planned.keys())),
        ("asks twice for", sorted(key for key, count in planned.items() if count > 1)),
        ("asks for unknown", sorted(planned.keys() - wanted)),
    ):
        if keys:
            yield Finding("plan", f"the plan {what} {_some(keys)}")
    sets = {probe.id: probe_set.name for probe_set in battery.sets for probe in probe_set.probes}
    mixed = [i for i, batch in enumerate(plan.batches) if len({sets.get(probe) for probe, _ in batch}) != 1]
    if mixed:
        yield Finding("plan", f"batch {_some(mixed)} of the plan is empty or mixes sets")
    large = [i for i, batch in enumerate(plan.batches) if len(batch) > battery.batch_size]
    if large:
        yield Finding("plan", f"batch {_some(large)} of the plan is larger than {battery.batch_size}")


def _planned_lines(plan: Plan) -> int:
    """At least as many as `expected_keys` gives, without making them: a hostile plan may ask for billions."""
    each = sum(len(canaries) for canaries in plan.canaries.values())
    return 1 + sum(2 + each + len(samples) * (1 + len(plan.canaries)) for samples in plan.batches)


def _check_lines(journal: Journal, battery: Battery) -> Iterator[Finding]:
    planned = _planned_lines(journal.plan)
    if planned > max(_FEW_LINES, _UNDONE * len(journal.entries)):
        yield Finding("unfinished", f"the plan asks for some {planned:,} lines, here are {len(journal.entries):,}")
        return
    actual = [key_of(entry) for entry in journal.entries]
    expected = list(expected_keys(journal.plan, battery))
    last = journal.entries[-1] if journal.entries else None
    if isinstance(last, Stopped):
        yield Finding("stopped", f"the run was stopped early: {last.reason}")
    elif journal.torn or not isinstance(last, End):
        done = sum(isinstance(entry, Scored) for entry in journal.entries)
        yield Finding("unfinished", f"the run is not finished: {done:,} of {len(journal.plan.batches):,} batches are")
    if actual == expected and not journal.torn:
        return
    counts = Counter(actual)
    wanted = set(expected)
    missing = [key for key in expected if key not in counts]
    twice = [key for key, count in counts.items() if count > 1]
    unknown = [key for key in counts if key not in wanted and key != ("stopped",)]
    if missing and missing != [("end",)]:
        yield Finding("missing", f"{len(missing):,} lines are missing: {_some(missing)}")
    if twice:
        yield Finding("duplicate", f"{len(twice):,} lines occur more than once: {_some(twice)}")
    if unknown:
        yield Finding("unknown", f"{len(unknown):,} lines belong to no plan: {_some(unknown)}")
    seen = [key for key in dict.fromkeys(actual) if key in wanted]
    present = set(seen)
    if seen != [key for key in expected if key in present]:
        yield Finding("order", "lines are not in the order of the plan")


def _check_generations(journal: Journal, battery: Battery) -> Iterator[Finding]:
    sets = _sets_by_probe(battery)
    seeds, lengths, silent = [], [], []
    for entry in journal.entries:
        if not isinstance(entry, Generation) or entry.probe not in sets:
            continue
        key = (entry.probe, entry.sample)
        if entry.seed != sample_seed(battery.seed, *key):
            seeds.append(key)
        if entry.tokens is None or entry.prompt_digest is None or entry.prompt_tokens is None:
            silent.append(key)
        else:
            limit = sets[entry.probe].decoding.max_tokens
            if len(entry.tokens) > limit or (entry.finish == "length" and len(entry.tokens) != limit):
                lengths.append(key)
    if seeds:
        yield Finding("seed", f"{len(seeds):,} samples have another seed than the derived one: {_some(seeds)}")
    if lengths:
        yield Finding("length", f"{len(lengths):,} completions have an impossible length: {_some(lengths)}")
    if silent:
        yield Finding("no-tokens", f"{len(silent):,} generations come without token ids: {_some(silent)}")


def _check_scores(journal: Journal) -> Iterator[Finding]:
    errors: dict[str, list[str]] = defaultdict(list)
    texts: dict[str, set[tuple[str, int]]] = defaultdict(set)
    values: dict[tuple[str, str], set[float]] = defaultdict(set)
    different: dict[str, set[str]] = defaultdict(set)
    completion = {(entry.probe, entry.sample): entry.text for entry in journal.generations()}
    for entry in journal.entries:
        if not isinstance(entry, ScoreLine) or entry.scorer not in journal.plan.scorers:
            continue
        where = f"{entry.probe} {entry.sample}"
        if entry.values is None:
            errors[entry.scorer].append(f"{where}: {entry.error}")
        elif entry.values.keys() != journal.plan.scorers[entry.scorer].categories.keys():
            errors[entry.scorer].append(f"{where}: not exactly the scorer's categories")
        elif not all(0 <= value <= 1 for value in entry.values.values()):
            errors[entry.scorer].append(f"{where}: not a probability")
        else:
            for category, value in entry.values.items():
                values[entry.scorer, category].add(value)
            different[entry.scorer].add(completion.get((entry.probe, entry.sample), ""))
            texts[entry.scorer].add((entry.probe, entry.sample))
    for scorer, reasons in sorted(errors.items()):
        yield Finding("score-error", f"scorer {scorer} failed on {len(reasons):,} completions; {reasons[0]}")
    told: dict[tuple[str, str], set[float]] = defaultdict(set)
    for entry in journal.entries:
        if isinstance(entry, CanaryLine) and entry.value is not None:
            told[entry.scorer, entry.category].add(entry.value)
    for (scorer, category), found in sorted(values.items()):
        verdicts = (found | told[scorer, category]) <= _VERDICTS
        if len(found) == 1 and len(different[scorer]) >= CONSTANT_AFTER and not verdicts:
            yield Finding(
                "constant-scores",
                f"scorer {scorer} gave all {len(texts[scorer]):,} completions the same {category}",
            )


@dataclass(frozen=True)
class CanaryTally:
    """How one scorer did on its canaries over a run. `worst` is the lowest share of right ones in a batch."""

    scorer: str
    right: int
    total: int
    worst: float
    worst_batch: int


def _judged_canaries(journal: Journal) -> Iterator[tuple[CanaryLine, bool]]:
    """Every canary's line of the plan's scorers, and whether it came out right."""
    plan = journal.plan
    labels = {(name, one.id, one.category, one.expected) for name, all_ in plan.canaries.items() for one in all_}
    thresholds = {
        (name, category): calibration.threshold
        for name, identity in plan.scorers.items()
        for category, calibration in identity.categories.items()
    }
    for entry in journal.entries:
        if isinstance(entry, CanaryLine) and entry.scorer in plan.scorers:
            threshold = thresholds.get((entry.scorer, entry.category))
            yield (
                entry,
                (entry.scorer, entry.canary, entry.category, entry.expected) in labels
                and entry.value is not None
                and threshold is not None
                and (entry.value >= threshold) == (entry.expected == "above"),
            )


def tally_canaries(journal: Journal) -> list[CanaryTally]:
    """Right canaries by scorer, sorted by name; scorers whose canaries never ran have total 0."""
    by_batch: dict[str, dict[int, list[bool]]] = {name: {} for name in sorted(journal.plan.scorers)}
    for entry, is_right in _judged_canaries(journal):
        by_batch[entry.scorer].setdefault(entry.batch, []).append(is_right)
    tallies = []
    for name, batches in by_batch.items():
        worst_batch, worst = min(
            ((b, sum(r) / len(r)) for b, r in batches.items()), key=lambda x: x[1], default=(0, 0.0)
        )
        right, total = sum(map(sum, batches.values())), sum(map(len, batches.values()))
        tallies.append(CanaryTally(name, right, total, worst, worst_batch))
    return tallies


def below_card(journal: Journal) -> Iterator[Finding]:
    """Where a scorer got significantly fewer canaries right than its card says, by category and kind.

    An exact one-sided binomial test at `CANARY_LEVEL`: P(X <= right) for X ~ B(canaries, p), where p is what the card
    surely claims, the 95% Clopper-Pearson lower bound of its sensitivity (canaries that must come out above) or
    specificity (below): a card from few labels claims less. A canary is one observation however many batches it rode
    in, for a scorer says the same of the same text; it counts as right where it was right in every one of them.
    """
    seen: dict[tuple[str, str, str], dict[str, bool]] = defaultdict(dict)
    for entry, is_right in _judged_canaries(journal):
        ever = seen[entry.scorer, entry.category, entry.expected]
        ever[entry.canary] = ever.get(entry.canary, True) and is_right
    for (scorer, category, expected), canaries in sorted(seen.items()):
        card = journal.plan.scorers[scorer].categories.get(category)
        if card is None:
            continue  # `canary`, by the plan's check
        above = expected == "above"
        known = (card.true_positives, card.positives) if above else (card.true_negatives, card.negatives)
        claimed = float(clopper_pearson(*known)[0])
        right, total = sum(canaries.values()), len(canaries)
        chance = float(bdtr(right, total, claimed))
        if chance < CANARY_LEVEL:
            text = f"got {right} of {total} canaries right that must come out {expected} its {category} threshold"
            name = "sensitivity" if above else "specificity"
            text += f"; its card says a {name} of at least {claimed:.1%}: so few by chance {chance:.2g}"
            yield Finding("canary", f"scorer {scorer} {text}")


def _check_canaries(journal: Journal) -> Iterator[Finding]:
    for tally in tally_canaries(journal):
        if tally.total and tally.right < CANARIES_RIGHT * tally.total:
            share = f"{tally.right:,} of {tally.total:,}"
            yield Finding("canary", f"scorer {tally.scorer} got {share} canaries right, under {CANARIES_RIGHT:.0%}")
        if tally.total and tally.worst < CANARIES_RIGHT_IN_BATCH:
            share = f"{tally.worst:.0%} of the canaries of batch {tally.worst_batch}"
            yield Finding("canary", f"scorer {tally.scorer} got {share} right, under {CANARIES_RIGHT_IN_BATCH:.0%}")
    yield from below_card(journal)
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    failed: Counter[str] = Counter()
    for entry in journal.entries:
        if isinstance(entry, CanaryLine):
            if entry.value is not None and 0 <= entry.value <= 1:
                values[entry.scorer, entry.category].append(entry.value)
            else:
                failed[entry.scorer] += 1
    for scorer, count in sorted(failed.items()):
        yield Finding("score-error", f"scorer {scorer} failed on {count:,} canaries")
    for (scorer, category), found in sorted(values.items()):
        if max(found) - min(found) < CANARY_SPREAD:
            spread = f"spread by {max(found) - min(found):.3g} over all canaries, under {CANARY_SPREAD}"
            yield Finding("constant-scores", f"scorer {scorer}: the values of {category} {spread}")


def identical_samples(journal: Journal) -> float | None:
    """Of a probe's k samples, the share that repeats another, (k - different) / (k - 1): the mean over the probes with
    several; None where none has. 0: all differ, 1: all are one text."""
    texts: dict[str, list[str]] = defaultdict(list)
    for entry in journal.generations():
        texts[entry.probe].append(entry.text)
    repeated = [found for found in texts.values() if len(found) > 1]
    shares = [(len(found) - len(set(found))) / (len(found) - 1) for found in repeated]
    return sum(shares) / len(shares) if shares else None


# -- writing ---------------------------------------------------------------------------------------------------------


def dump_line(entry: Plan | Entry) -> bytes:
    """Canonical bytes of a line, newline included. Of a result and an error only the one that is there is written."""
    value = entry.model_dump(mode="json")
    if isinstance(entry, ScoreLine | CanaryLine):
        value = {key: item for key, item in value.items() if item is not None}
    return canonical_json(value) + b"\n"


class JournalWriter:
    """Appends blocks to a journal. Holds a lock on the file: two processes cannot write one journal.

    `batch` is the next batch to work on; `generations` are its generations where they are there and only its scores are
    missing (else None); `done` where nothing is left to write.
    """

    def __init__(self, path: Path, journal: Journal, handle: int) -> None:
        self.path, self.plan, self._handle = path, journal.plan, handle
        self._take(journal)

    def _take(self, journal: Journal) -> None:
        self._found = journal
        self._running = hashlib.sha256(b"".join(line + b"\n" for line in journal.raw))
        self.entries: list[Entry] = list(journal.entries)
        self.done = journal.finished is not None
        self.batch = sum(isinstance(entry, Scored) for entry in self.entries)
        self.generations: list[Generation] | None = None
        if self.entries and isinstance(self.entries[-1], Generated):
            size = len(self.plan.batches[self.batch])
            self.generations = [entry for entry in self.entries[-1 - size : -1] if isinstance(entry, Generation)]

    @classmethod
    def create(cls, path: Path, plan: Plan) -> JournalWriter:
        """Start a journal with its plan. Raises SteelyardError where there is one already."""
        if path.exists():
            raise SteelyardError(f"{path} exists already: resume it, or give a new run folder")
        line = dump_line(plan)
        write_atomic(path, line)
        return cls(path, Journal(plan, (), (line[:-1],), False), _locked(path))

    @classmethod
    def resume(cls, path: Path, plan: Plan, battery: Battery, *, measured: bool = False) -> JournalWriter:
        """Go on with a journal: cut it back to its last closing line.

        `plan` is what would be planned now; run id, ledger event, attempt and start are the journal's own, and with
        `measured` all but what decides tokens and scores. Raises SteelyardError naming what differs, FormatError where
        a line before the torn block is damaged or out of place.
        """
        handle = _locked(path)
        try:
            journal = read_journal(path)
            differing = journal.plan.differences(plan, measured=measured)
            if differing:
                raise SteelyardError(
                    f"{path}: this run was started with another {', '.join(differing)}: go on with what it was started "
                    "with, or give a new run folder"
                )
            entries = list(journal.entries)
            while entries and not isinstance(entries[-1], Generated | Scored | Stopped | End):
                entries.pop()
            keys = [key_of(entry) for entry in entries if not isinstance(entry, Stopped)]
            for number, (found, wanted) in enumerate(zip(keys, expected_keys(journal.plan, battery), strict=False), 2):
                if found != wanted:
                    raise FormatError(f"{path}:{number}: not the line that the plan calls for: give a new run folder")
            raw = journal.raw[: len(entries) + 1]
            os.ftruncate(handle, sum(len(line) + 1 for line in raw))
            os.fsync(handle)
            return cls(path, Journal(journal.plan, tuple(entries), raw, False), handle)
        except BaseException:
            os.close(handle)
            raise

    @property
    def mark(self) -> tuple[int, str]:
        """How many lines there are, and the SHA-256 (hex) of the file up to here."""
        return len(self.entries) + 1, self._running.hexdigest()

    @property
    def plan_line(self) -> bytes:
        """Line 1 of the journal that was found, newline included."""
        return self._found.raw[0] + b"\n"

    @property
    def found_root(self) -> str:
        """The Merkle root of the journal that was found."""
        return self._found.root

    def back_to(self, lines: int, digest: str) -> None:
        """Cut the journal that was found back to its first `lines` lines, those noted elsewhere when they were written.

        At most one block may lie behind them, written but not noted before a crash. Raises SteelyardError where there
        is more, or `digest` is not that of these lines: somebody edited it.
        """
        raw, entries = self._found.raw[:lines], self._found.entries[: lines - 1]
        data = b"".join(line + b"\n" for line in raw)
        behind = self._found.entries[lines - 1 :]
        blocks = sum(isinstance(entry, Generated | Scored | Stopped | End) for entry in behind)
        if len(raw) != lines or hashlib.sha256(data).hexdigest() != digest or blocks > 1:
            raise SteelyardError(
                f"{self.path}: edited since the run was stopped: not the {lines:,} lines that the ledger noted: give a "
                "new run folder"
            )
        os.ftruncate(self._handle, len(data))
        os.fsync(self._handle)
        self._take(Journal(self.plan, entries, raw, False))

    def generated(self, generations: Sequence[Generation]) -> None:
        """Write the generations of the present batch as one durable block."""
        self._write([*generations, Generated(batch=self.batch)])
        self.generations = list(generations)

    def scored(self, lines: Sequence[ScoreLine | CanaryLine]) -> None:
        """Write the scores of the present batch as one durable block; the next batch becomes the present one."""
        self._write([*lines, Scored(batch=self.batch)])
        self.generations = None
        self.batch += 1

    def end(self, finished: str) -> None:
        """Close a whole run. `finished` is ISO 8601."""
        self._write([End(finished=finished)])
        self.done = True

    def stop(self, reason: str, finished: str) -> None:
        """Close a run that no committed policy could pass any more."""
        self._write([Stopped(reason=reason, finished=finished)])
        self.done = True

    def _write(self, lines: Iterable[Entry]) -> None:
        lines = list(lines)
        data = b"".join(map(dump_line, lines))
        block = memoryview(data)
        while block:
            block = block[os.write(self._handle, block) :]
        os.fsync(self._handle)
        self._running.update(data)
        self.entries.extend(lines)

    def close(self) -> None:
        os.close(self._handle)

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _locked(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise SteelyardError(f"{path}: another process is writing this run: wait for it to end") from error
    return handle

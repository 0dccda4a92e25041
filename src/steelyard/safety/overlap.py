"""Overlap: were the questions in the lessons? A battery's probes, searched for in the candidate's training data.

A probe counts as found where 13 consecutive words of it stand in a text of the training data, as for GPT-3 (Brown et
al. 2020, appendix C: N-grams of 13 words); one of fewer words, where all of it stands there, as consecutive words.
Words are `corpus.words.words`: no tokenizer, no case, no punctuation. N-grams never reach over a text's end.

The search is evidence: `overlap.json` in the run's folder, bound to the run, its subject and battery, and to the data
by digest; and an event `safety.overlap` in the ledger. What the maker does not declare cannot be searched: what is
named as undeclared is kept too.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from steelyard.base.canonical import canonical_json, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import read_bounded, write_atomic
from steelyard.base.progress import Progress, Silent
from steelyard.base.strict import strict_json
from steelyard.corpus.training_data import TrainingData
from steelyard.corpus.words import words
from steelyard.safety.attempts import alike, questions
from steelyard.safety.battery import AXES, Battery

if TYPE_CHECKING:  # `verify` reads this module too, and needs no database
    from steelyard.ledger.ledger import Event, Ledger

OVERLAP = "overlap.json"  # in a run's folder
NGRAM = 13
MAX_BYTES = 16_000_000  # of overlap.json
EXAMPLES = 5
_PIECE = 1 << 20  # characters of a long text at a time
_SPACE = re.compile(r"\s")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable characters")
    return text


# A stranger's bundle holds these, and they are shown.
_Name = Annotated[str, StringConstraints(min_length=1, max_length=300), AfterValidator(_one_line)]
_Id = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")]


class Searched(_Strict):
    """Training data that was searched. `unread`: files there that no reader knows."""

    name: _Name
    digest: str
    files: int = Field(ge=1)
    bytes: int = Field(ge=0)
    texts: int = Field(ge=0)
    words: int = Field(ge=0)
    unread: tuple[_Name, ...]


class AxisOverlap(_Strict):
    """Of an axis: how many probes, how many of them were found, and their share."""

    probes: int
    found: int
    share: float


class Overlap(_Strict):
    """What was found. `found` are the ids of the probes, sorted; `undeclared` names what the candidate learned from and
    nobody here could search (an imported base model's data)."""

    format: Literal[1] = 1
    run: str
    subject: str
    battery: str
    ngram: int = Field(ge=1)
    searched: tuple[Searched, ...]
    undeclared: tuple[_Name, ...]
    axes: dict[str, AxisOverlap]
    found: tuple[_Id, ...]

    @property
    def worst(self) -> float:
        """The greatest share of an axis."""
        return max((axis.share for axis in self.axes.values()), default=0.0)

    @property
    def not_searched(self) -> tuple[str, ...]:
        """What the candidate learned from, or may have, and nobody here searched: `undeclared`, and what lies unread
        beside what was read: it may be all of the data, in another format."""
        unread = [f"{name} of {one.name}, which no reader knows" for one in self.searched for name in one.unread]
        return (*self.undeclared, *unread)


# -- the search ------------------------------------------------------------------------------------------------------


class ProbeIndex:
    """The n-grams of a battery's probes; `search` gives the ids of those that a text holds."""

    def __init__(self, battery: Battery, ngram: int = NGRAM) -> None:
        self._probes: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for probe in battery.probes():
            spelled = words(probe.prompt)
            for start in range(max(1, len(spelled) - ngram + 1)):
                if gram := tuple(spelled[start : start + ngram]):
                    self._probes[gram].add(probe.id)
        # By its first two words (one, where it has no more), how long the n-grams are that begin so.
        lengths: dict[tuple[str, ...], set[int]] = defaultdict(set)
        for gram in self._probes:
            lengths[gram[:2]].add(len(gram))
        self._lengths = {begin: sorted(found) for begin, found in lengths.items()}
        self._single = {gram[0]: gram for gram in self._probes if len(gram) == 1}
        self._ngram = ngram

    def search(self, text: str) -> tuple[set[str], int]:
        """Ids of the probes found in `text`, and how many words it has. Memory is bounded by a piece of the text."""
        found: set[str] = set()
        count, carried = 0, list[str]()
        for piece in _pieces(text):
            fresh = words(piece)
            count += len(fresh)
            for word in self._single.keys() & set(fresh) if self._single else ():
                found |= self._probes[self._single[word]]
            spelled = carried + fresh
            lengths = self._lengths
            for start, pair in enumerate(pairwise(spelled)):
                if pair in lengths:
                    for length in lengths[pair]:
                        found |= self._probes.get(tuple(spelled[start : start + length]), set())
            carried = spelled[-(self._ngram - 1) :] if self._ngram > 1 else []
        return found, count


def _shown(text: str) -> str:
    """Any text, as a line of bounded length."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:300] or "?"


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of about a million characters, parted at white space."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + _PIECE)
        end = space.start() if space else len(text)
        yield text[start:end]
        start = end


def shares(battery: Battery, found: Iterable[str]) -> dict[str, AxisOverlap]:
    """By axis, how many of its probes are among `found`."""
    wanted = set(found)
    total = Counter(probe.axis for probe in battery.probes())
    hits = Counter(probe.axis for probe in battery.probes() if probe.id in wanted)
    return {
        axis: AxisOverlap(probes=total[axis], found=hits[axis], share=round(hits[axis] / total[axis], 9))
        for axis in AXES
        if total[axis]
    }


@dataclass(frozen=True)
class Named:
    """What a run's overlap is about."""

    run: str
    subject: str
    battery: Battery


def find_overlap(
    named: Named, data: Sequence[TrainingData], undeclared: Sequence[str] = (), progress: Progress | None = None
) -> Overlap:
    """Search `data` for the battery's probes. Deterministic. Raises what reading the data raises."""
    index, found, searched = ProbeIndex(named.battery), set[str](), list[Searched]()
    progress = progress or Silent()
    for one in data:
        texts = count = 0
        with progress.task(f"search {one.path.name} for probes", one.bytes / 1e6, "MB of text") as task:
            for text in one.texts():
                hits, many = index.search(text)
                found |= hits
                texts, count = texts + 1, count + many
                task.advance(len(text) / 1e6)
        if one.unread:
            progress.say(f"{one.path}: {len(one.unread)} files were not read: {', '.join(one.unread[:EXAMPLES])}")
        searched.append(
            Searched(
                name=_shown(one.path.name),
                digest=one.digest,
                files=len(one.files),
                bytes=one.bytes,
                texts=texts,
                words=count,
                unread=tuple(map(_shown, one.unread)),
            )
        )
    return Overlap(
        run=named.run,
        subject=named.subject,
        battery=named.battery.digest,
        ngram=NGRAM,
        searched=tuple(sorted(searched, key=lambda one: (one.name, one.digest))),
        undeclared=tuple(sorted({_shown(text) for text in undeclared})),
        axes=shares(named.battery, found),
        found=tuple(sorted(found)),
    )


# -- the evidence ----------------------------------------------------------------------------------------------------


def overlap_json(overlap: Overlap) -> bytes:
    """The bytes of overlap.json: canonical JSON, so that it has one digest."""
    return canonical_json(overlap.model_dump(mode="json")) + b"\n"


def read_overlap(path: Path) -> Overlap | None:
    """The overlap at `path`; None where nothing lies there. Raises FormatError where what lies there is none."""
    if not os.path.lexists(path):
        return None
    try:
        value = strict_json(read_bounded(path, MAX_BYTES), str(path), limit=MAX_BYTES)
        return Overlap.model_validate_json(canonical_json(value))
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "overlap"
        raise FormatError(f"{path}: {key}: {first['msg']}: search again (steelyard safety overlap)") from error


def record_overlap(
    run: Path,
    ledger: Ledger,
    data: Sequence[TrainingData],
    undeclared: Sequence[str] = (),
    progress: Progress | None = None,
) -> Overlap:
    """Search the data for the probes of the run in folder `run`; write overlap.json there, and say so in the ledger.

    Every search stays in the ledger: a later one over other data does not make an earlier one forgotten. Raises
    SteelyardError where the ledger does not know the run, FormatError where the folder holds none.
    """
    from steelyard.safety.report import read_run

    journal, battery, _, _ = read_run(run)
    plan = journal.plan
    if not ledger.events("safety.committed", run=plan.run, subject=plan.subject_digest, battery=battery.digest):
        raise SteelyardError(f"{run}: this ledger has no record of the run: give the ledger it was started with")
    found = find_overlap(Named(plan.run, plan.subject_digest, battery), data, undeclared, progress)
    content = overlap_json(found)
    write_atomic(run / OVERLAP, content)
    said = {"run": plan.run, "subject": plan.subject_digest, "battery": battery.digest, "overlap": sha256_hex(content)}
    if not ledger.events("safety.overlap", **said):
        more = {"searched": [one.digest for one in found.searched], "undeclared": list(found.undeclared)}
        ledger.append("safety.overlap", said | more | {"worst": found.worst, "found": len(found.found)})
    return found


def searches(ledger: Ledger, subject: str, battery: Battery) -> list[Event]:
    """Every search noted in the ledger of this subject for this battery's probes, or those of one so like it that both
    are one test (`attempts.alike`), oldest first."""
    mine = questions(battery)

    def like(event: Event) -> bool:
        runs = ledger.events("safety.committed", run=str(event.payload.get("run")))
        return any(alike(run.payload.get("questions", ()), mine) for run in runs)

    found = ledger.events("safety.overlap", subject=subject)
    return [event for event in found if event.payload.get("battery") == battery.digest or like(event)]


def in_words(overlap: Overlap | None) -> str:
    """One line on what was found, for people."""
    if overlap is None:
        return "unknown: not declared"
    total = sum(axis.probes for axis in overlap.axes.values())
    text = f"{len(overlap.found):,} of {total:,} probes stand in what was searched ({_data(overlap.searched)})"
    if overlap.found:
        by_axis = [f"{axis} {one.share:.1%}" for axis, one in overlap.axes.items() if one.found]
        text += f": {', '.join(by_axis)}; such as {', '.join(overlap.found[:EXAMPLES])}"
    if lacking := overlap.not_searched:
        more = f" and {len(lacking) - EXAMPLES:,} more" if len(lacking) > EXAMPLES else ""
        text += f"; not declared: {', '.join(lacking[:EXAMPLES])}{more}"
    return text


def _data(searched: Sequence[Searched]) -> str:
    if not searched:
        return "nothing"
    return f"{sum(one.words for one in searched):,} words of {', '.join(one.name for one in searched)}"

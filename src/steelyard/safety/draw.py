"""Drawing completions of a run for people to label: how wrong is a scorer on this model's own words?

A run holds few completions over a scorer's threshold and very many far under it. A simple draw would find hardly one of
the first, so completions are drawn by stratum (`BANDS` of the score, and axes), each with a known probability of being
drawn, which `in_domain.py` undoes. What the reader gets (`labels.jsonl`, `label.html`) tells nothing of score,
stratum or model; `sample.json` tells it all, and stays with whoever drew.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steelyard.base.canonical import canonical_json, digest
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import read_bounded, write_atomic
from steelyard.base.strict import strict_json
from steelyard.safety.battery import Battery, Probe
from steelyard.safety.journal import Generation, Journal, ScoreLine
from steelyard.safety.labels import apportion, read_sheet, write_sheet
from steelyard.scorers.base import ScorerIdentity
from steelyard.scorers.card import log_odds

Band = Literal["far above", "near above", "near below", "far below"]  # of the threshold
BANDS: tuple[Band, ...] = get_args(Band)
NEAR = 2.0  # log-odds from the threshold
SAMPLE_LIMIT = 64 << 20  # bytes
LABELS, SAMPLE, PAGE = "labels.jsonl", "sample.json", "label.html"
YES, NO, SKIP = "yes", "no", "skip"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Drawn(_Strict):
    """A completion that was drawn. `probability`: of its being drawn, given its band and axis."""

    key: str
    probe: str
    sample: int
    axis: str
    language: str
    band: Band
    score: float = Field(ge=0, le=1)
    probability: float = Field(gt=0, le=1)


class Sample(_Strict):
    """What was drawn from a run's journal, and for which scorer. `scorer` is its reference in the battery, `population`
    the number of completions in each band."""

    format: Literal[1] = 1
    run: str
    journal: str = Field(description="Merkle root of the journal")
    scorer: str
    identity: ScorerIdentity
    category: str
    seed: int
    population: dict[Band, int]
    drawn: tuple[Drawn, ...] = Field(min_length=1)


@dataclass(frozen=True)
class _Completion:
    probe: Probe
    generation: Generation
    score: float
    band: Band

    def key(self, root: str) -> str:
        return key_of(root, self.probe.id, self.generation.sample, self.probe.prompt, self.generation.text)


def key_of(root: str, probe: str, sample: int, prompt: str, completion: str) -> str:
    """What a completion is called on a sheet: says nothing to the reader, and holds for this text alone."""
    return digest([root, probe, sample, prompt, completion])[:16]


def band_of(score: float, threshold: float) -> Band:
    """Which side of the threshold, and whether within NEAR of it."""
    over = float(log_odds(np.array(score)) - log_odds(np.array(threshold)))
    if score >= threshold:
        return "near above" if over < NEAR else "far above"
    return "near below" if over > -NEAR else "far below"


# -- drawing ---------------------------------------------------------------------------------------------------------


def scorer_for(journal: Journal, category: str, name: str | None) -> str:
    """The name, in the battery, of the scorer to sample for: `name`, or the only one that covers `category`. Raises
    UsageError where it does not cover it, and where none or several do."""
    covering = sorted(key for key, identity in journal.plan.scorers.items() if category in identity.categories)
    if name is not None and name not in covering:
        raise UsageError(f"--scorer {name}: no scorer of this run for {category} (of it: {', '.join(covering) or '-'})")
    if name is None and len(covering) != 1:
        known = sorted({key for identity in journal.plan.scorers.values() for key in identity.categories})
        raise UsageError(
            f"--category {category}: several scorers cover it: choose one of {', '.join(covering)} with --scorer"
            if covering
            else f"--category {category}: no scorer of this run covers it (covered: {', '.join(known)})"
        )
    return name or covering[0]


def draw(
    journal: Journal, battery: Battery, *, scorer: str, category: str, count: int, seed: int
) -> tuple[Sample, list[dict[str, str]]]:
    """A stratified draw of `count` completions that `scorer` (its name in the battery) scored, without replacement; and
    the rows of its sheet, shuffled.

    Half of them from each side of the threshold (or all of a side that has fewer), divided over a side's bands by the
    square root of their sizes (power allocation: Bankier 1988, The American Statistician 42), over a band's axes by
    size; from every one that is not empty at least one, where `count` allows.
    Raises UsageError where there are fewer than `count`, SteelyardError for a run that did not end.
    """
    if journal.finished is None:
        raise SteelyardError("the run did not end, so a draw from it would be lopsided: go on with it first")
    identity = journal.plan.scorers[scorer]
    found = _completions(journal, battery, scorer, category, identity.categories[category].threshold)
    cells: dict[tuple[Band, str], list[_Completion]] = {}
    for one in found:
        cells.setdefault((one.band, one.probe.axis), []).append(one)
    quota = _quota({cell: len(members) for cell, members in sorted(cells.items())}, count)
    chance = random.Random(seed)
    drawn = [
        (one, quota[cell] / len(members))
        for cell, members in sorted(cells.items())
        for one in chance.sample(members, quota[cell])
    ]
    chance.shuffle(drawn)
    root = journal.root
    sample = Sample(
        run=journal.plan.run,
        journal=root,
        scorer=battery.scorers[scorer],
        identity=identity,
        category=category,
        seed=seed,
        population={band: sum(one.band == band for one in found) for band in BANDS},
        drawn=tuple(
            Drawn(
                key=one.key(root),
                probe=one.probe.id,
                sample=one.generation.sample,
                axis=one.probe.axis,
                language=one.probe.language,
                band=one.band,
                score=one.score,
                probability=probability,
            )
            for one, probability in drawn
        ),
    )
    rows = [
        {"key": one.key(root), "prompt": one.probe.prompt, "completion": one.generation.text, "label": ""}
        for one, _ in drawn
    ]
    return sample, rows


def _completions(journal: Journal, battery: Battery, scorer: str, category: str, threshold: float) -> list[_Completion]:
    probes = {probe.id: probe for probe in battery.probes()}
    generations = {(one.probe, one.sample): one for one in journal.generations()}
    found = []
    for entry in journal.entries:
        if isinstance(entry, ScoreLine) and entry.scorer == scorer and entry.values and category in entry.values:
            probe, generation = probes.get(entry.probe), generations.get((entry.probe, entry.sample))
            if probe is None or generation is None:
                raise FormatError(f"{entry.probe} {entry.sample}: a score of a completion that the run does not hold")
            score = entry.values[category]
            found.append(_Completion(probe, generation, score, band_of(score, threshold)))
    return found


def _quota(sizes: Mapping[tuple[Band, str], int], count: int) -> dict[tuple[Band, str], int]:
    bands = {band: sum(size for (of, _), size in sizes.items() if of == band) for band in BANDS}
    sides = {
        side: {band: size for band, size in bands.items() if size and band.endswith(side)}
        for side in ("above", "below")
    }
    quota: dict[tuple[Band, str], int] = {}
    by_side = apportion({side: sum(inner.values()) for side, inner in sides.items() if inner}, count)
    for side in (side for side, share in by_side.items() if share):
        weights = {band: size**0.5 for band, size in sides[side].items()}
        for band, share in apportion(sides[side], by_side[side], weights).items():
            if share:
                cells = {cell: size for cell, size in sizes.items() if cell[0] == band}
                quota |= apportion(cells, share, cells)
    return {cell: quota.get(cell, 0) for cell in sizes}


def save(sample: Sample, rows: Sequence[Mapping[str, str]], page: str, out: Path) -> None:
    """Write labels.jsonl, sample.json (for its owner only) and label.html to `out`. Raises UsageError where one of them
    is there already."""
    there = [name for name in (LABELS, SAMPLE, PAGE) if (out / name).exists()]
    if there:
        raise UsageError(f"{out / there[0]} exists: labels may be in this folder; move it, or draw elsewhere")
    write_sheet(out / LABELS, rows)
    write_atomic(out / SAMPLE, canonical_json(sample.model_dump(mode="json")) + b"\n", mode=0o600)
    write_atomic(out / PAGE, page.encode())


# -- reading back ----------------------------------------------------------------------------------------------------


def read_sample(path: Path) -> Sample:
    """Raises FormatError where `path` holds no sample."""
    try:
        return Sample.model_validate(strict_json(read_bounded(path, SAMPLE_LIMIT), str(path), limit=SAMPLE_LIMIT))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: give the sample.json of the draw with --sample") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{path}: {key}: {first['msg']}: not a sample as a draw writes it: draw again") from error


def read_labels(path: Path, sample: Sample) -> dict[str, str]:
    """The labels (YES, NO, SKIP) of a filled sheet by key, without the empty ones.

    Raises FormatError naming the line for a row that was not drawn, comes twice, has an unknown label, or whose texts
    are not those that were drawn.
    """
    drawn = {one.key: one for one in sample.drawn}
    seen: set[str] = set()
    found: dict[str, str] = {}
    for where, row in read_sheet(path):
        key, label = row["key"], row["label"]
        one = drawn.get(key)
        if one is None or key in seen:
            cause = "comes twice" if key in seen else "is of another draw: give the sample.json that it came with"
            raise FormatError(f"{where}: key {key[:40]!r} {cause}")
        seen.add(key)
        prompt, completion = row.get("prompt"), row.get("completion")
        if not (
            isinstance(prompt, str)
            and isinstance(completion, str)
            and key == key_of(sample.journal, one.probe, one.sample, prompt, completion)
        ):
            raise FormatError(
                f"{where}: its texts were changed since they were drawn: take the sheet as it was written"
            )
        if label not in ("", YES, NO, SKIP):
            raise FormatError(f"{where}: label {label[:40]!r}: must be {YES}, {NO}, {SKIP} or empty")
        if label:
            found[key] = label
    return found

"""The report's own cost: a journal of 100,000 lines, written by a real run on an endpoint that answers at once.

    python benchmarks/safety_journal.py --lines 100000

The run is killed at its last batch and resumed, then reported on again from its folder. `measure` gives the figures to
other benchmarks; `build` the run's folder.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steelyard.inference.endpoint import Completion, Request, Sampling
from steelyard.ledger.ledger import Ledger
from steelyard.model.identity import Subject
from steelyard.safety.battery import Battery, ProbeSet, load_battery
from steelyard.safety.html import render_html
from steelyard.safety.journal import needed_scorers, read_journal
from steelyard.safety.markdown import render_markdown
from steelyard.safety.policy import load_policy
from steelyard.safety.report import compute_report, read_run, report_json
from steelyard.safety.run import Job, Tested, run_battery
from steelyard.scorers.base import Calibration, Canary, Item, Score, ScoreError, ScorerIdentity
from steelyard.scorers.registry import open_scorer

SAMPLES = 25  # continuations of an opening, as RealToxicityPrompts has them
TOKENS = 20
WORDS = ("the", "model", "says", "that", "water", "runs", "down", "hill", "while", "people", "walk", "home", "music")


@dataclass(frozen=True)
class Figures:
    """Seconds on a journal of `lines` lines; `report` is what the report costs in all, `resume` what comes before the
    first batch that is generated again."""

    lines: int
    megabytes: float
    read: float
    compute: float
    render: float
    resume: float

    @property
    def report(self) -> float:
        return self.read + self.compute + self.render


class _Instant:
    """Answers at once, a text that depends on the request alone. Raises at batch `kill`, as a dying process would."""

    def __init__(self, kill: int) -> None:
        self.kill, self.batches, self.first = kill, 0, 0.0

    def identity(self) -> dict[str, Any]:
        return {"kind": "local", "dtype": "bfloat16", "threads": 1}

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.first = self.first or time.perf_counter()
        if self.batches == self.kill:
            raise KeyboardInterrupt
        self.batches += 1
        return [_answer(request) for request in requests]


def _answer(request: Request) -> Completion:
    drawn = hashlib.sha512(request.id.encode()).digest()[: min(TOKENS, request.sampling.max_tokens)]
    text = " ".join(WORDS[byte % len(WORDS)] for byte in drawn)
    tokens = tuple(1000 + 150 * byte for byte in drawn)
    return Completion(request.id, f"{text} {drawn[0]}", "stop", tuple(str(request.prompt).encode()[:40]), tokens)


class _Hashed:
    """A scorer of several categories whose values depend on the completion alone: a twentieth are events."""

    def __init__(self, name: str, categories: Sequence[str]) -> None:
        self.name, self.categories = name, tuple(categories)

    def identity(self) -> ScorerIdentity:
        errors = Calibration(
            threshold=0.5,
            true_positives=900,
            positives=1000,
            true_negatives=1980,
            negatives=2000,
            source="made for a benchmark",
            measured="2024-04-15",
        )
        return ScorerIdentity(
            name=self.name, weights="0" * 64, code="0" * 64, categories=dict.fromkeys(self.categories, errors)
        )

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        return [Score(self._values(item.completion)) for item in items]

    def _values(self, text: str) -> dict[str, float]:
        if text in ("yes", "no"):
            return dict.fromkeys(self.categories, 0.9 if text == "yes" else 0.1)
        drawn = hashlib.sha256(f"{self.name} {text}".encode()).digest()
        raw = [int.from_bytes(drawn[4 * i : 4 * i + 4]) / 2**32 for i in range(len(self.categories))]
        return {
            name: 0.5 + 10 * (v - 0.95) if v > 0.95 else v / 2 for name, v in zip(self.categories, raw, strict=True)
        }

    def canaries(self) -> list[Canary]:
        return [
            Canary(f"{category}-{said}", Item("?", said), category, "above" if said == "yes" else "below")
            for category in self.categories
            for said in ("yes", "no")
        ]


def _battery(lines: int) -> Battery:
    """The quick battery with 25 samples of an opening, its probes repeated (as families of their own) until a journal
    has at least `lines` lines."""
    quick = load_battery("quick")
    sets = [part.model_copy(update={"samples": SAMPLES if part.samples > 1 else 1}) for part in quick.sets]
    needed = needed_scorers(quick)
    once = sum(part.samples * (1 + len(needed.get(probe.axis, ()))) for part in sets for probe in part.probes)
    return quick.model_copy(update={"sets": tuple(_repeated(part, -(-lines // once)) for part in sets)})


def _repeated(part: ProbeSet, times: int) -> ProbeSet:
    probes = [
        probe.model_copy(update={"id": f"{probe.id}.{i}", "family": f"{probe.family}.{i}"})
        for i in range(times)
        for probe in part.probes
    ]
    return part.model_copy(update={"probes": tuple(probes)})


def _subject() -> Subject:
    parts = ("weights", "config", "tokenizer", "chat_template", "system_prompt", "generation_config")
    return Subject(**dict.fromkeys(parts, "0" * 64), dtype="bfloat16")


def build(folder: Path, lines: int) -> tuple[Path, float]:
    """Run, kill at the last batch, resume: the run's folder, and the seconds that resuming took."""
    battery = _battery(lines)
    scorers = {
        name: _Hashed(name, list(open_scorer(reference).identity().categories))
        for name, reference in battery.scorers.items()
    }
    policies = [load_policy("preview"), load_policy("public")]
    out = folder / "run"
    batches = sum(-(-len(part.probes) * part.samples // battery.batch_size) for part in battery.sets)

    def go(endpoint: _Instant) -> None:
        job = Job(Tested(endpoint, _subject(), Sampling()), battery, policies, scorers)
        with Ledger(folder / "ledger.sqlite") as ledger:
            run_battery(job, out=out, ledger=ledger)

    with contextlib.suppress(KeyboardInterrupt):
        go(_Instant(kill=batches - 1))
    resumed = _Instant(kill=-1)
    start = time.perf_counter()
    go(resumed)
    return out, resumed.first - start


def measure(folder: Path, lines: int = 100_000) -> Figures:
    """Build a run in `folder` and time resuming it, reading it, computing its report, and rendering that."""
    out, resume = build(folder, lines)
    start = time.perf_counter()
    parts = read_run(out)
    read = time.perf_counter()
    report = compute_report(*parts)
    computed = time.perf_counter()
    pages = (report_json(report), render_html(report), render_markdown(report))
    rendered = time.perf_counter()
    assert all(pages)
    size = (out / "journal.jsonl").stat().st_size / 1e6
    found = len(read_journal(out / "journal.jsonl").raw)
    return Figures(found, size, read - start, computed - read, rendered - computed, resume)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--keep", type=Path, help="an empty folder to leave the run in")
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        figures = measure(options.keep, options.lines)
    else:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(Path(folder), options.lines)
    print(f"journal of {figures.lines:,} lines, {figures.megabytes:.0f} MB")
    for name in ("read", "compute", "render", "report", "resume"):
        print(f"{name:<8} {getattr(figures, name):6.2f} s")


if __name__ == "__main__":
    main()

"""Kill -9 at twenty random moments of a safety run with the real model in bf16: the report is that of a quiet run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from steelyard.safety.battery import Battery, load_battery
from steelyard.safety.journal import read_journal

KILLS = 20
PROBES = {"degeneration": 4, "harmful": 6, "lookalike": 6, "group": 8, "truth": 6}
SCRIPT = """
import os
import sys
from pathlib import Path
from steelyard.inference.local import LocalEndpoint
from steelyard.ledger.ledger import Ledger
from steelyard.model.identity import subject_of
from steelyard.safety.battery import load_battery
from steelyard.safety.policy import load_policy
from steelyard.safety.run import Job, Tested, run_battery
from steelyard.safety.shipped import shipped_sampling
from steelyard.scorers.registry import open_scorer

model, place = Path(sys.argv[1]), Path(sys.argv[2])
battery = load_battery(str(place / "battery.json"))
job = Job(
    candidate=Tested(
        LocalEndpoint.open(model, dtype="bfloat16", threads=1), subject_of(model), shipped_sampling(model)
    ),
    battery=battery,
    policies=[load_policy("preview")],
    scorers={name: open_scorer(reference) for name, reference in battery.scorers.items()},
)
# The model is loaded once; every run is a process of its own, forked from this one, whose id the test is told.
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        with Ledger(place / "ledger.sqlite") as ledger:
            run_battery(job, out=place / line.strip(), ledger=ledger)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def small_battery() -> Battery:
    """Thirty probes of the quick battery, in short answers and small batches."""
    quick = load_battery("quick").model_dump(mode="json")
    for part in quick["sets"]:
        part["probes"] = part["probes"][: PROBES[part["name"]]]
        part["decoding"]["max_tokens"] = 16
    quick["batch_size"] = 4
    return Battery.model_validate(quick)


class Runs:
    """Runs the battery into the folders it is told, each time in a new process."""

    def __init__(self, model: Path, place: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(model), str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # One thread everywhere: a process with more must not fork.
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
        )

    def start(self, folder: str) -> int:
        """Gives the new process's id."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        return int(self._said())

    def exit_code(self) -> int:
        """Waits for the run in progress."""
        return int(self._said())

    def _said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=120)


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    """All but times and what names the run: its id, its ledger event, the root over a journal that holds these, and
    how many runs there had been before."""
    return {k: v for k, v in report.items() if k not in ("run", "committed", "journal_root", "times", "attempt")}


def finished(journal: Path) -> bool:
    return journal.exists() and read_journal(journal).finished is not None


@pytest.mark.slow
def test_killed_at_twenty_random_moments_the_report_is_that_of_an_undisturbed_run(
    smollm2: Path, tmp_path: Path
) -> None:
    battery = small_battery()
    assert len(battery.probes()) == sum(PROBES.values()) == 30
    (tmp_path / "battery.json").write_text(json.dumps(battery.model_dump(mode="json")))
    journal = tmp_path / "killed" / "journal.jsonl"
    moments = random.Random(20240415)
    runs, interrupted = Runs(smollm2, tmp_path), 0
    try:
        start = time.monotonic()
        runs.start("quiet")
        assert runs.exit_code() == 0
        quiet_journal = read_journal(tmp_path / "quiet" / "journal.jsonl")
        first, size = len(quiet_journal.raw[0]), sum(len(line) + 1 for line in quiet_journal.raw)
        batch = (time.monotonic() - start) / len(quiet_journal.plan.batches)
        # Two moments lie at the start, around plan and commit. The others are sizes the journal has reached, rising
        # over the run, plus a random part of a batch's time: in generation, in scoring, or in a write.
        for reached in [0.0, 0.0, *sorted(moments.uniform(first, size * 0.93) for _ in range(KILLS - 2))]:
            delay = moments.uniform(0, batch)
            run = runs.start("killed")
            deadline = time.monotonic() + 120
            while reached and (journal.stat().st_size if journal.exists() else 0) < reached:
                assert time.monotonic() < deadline, "the run does not get on"
                time.sleep(0.001)
            time.sleep(delay)
            with suppress(ProcessLookupError):  # it was faster
                os.kill(run, signal.SIGKILL)
            interrupted += runs.exit_code() == -signal.SIGKILL and not finished(journal)
        assert interrupted >= 15
        runs.start("killed")
        assert runs.exit_code() == 0
    finally:
        runs.close()
    quiet, killed = (json.loads((tmp_path / name / "report.json").read_bytes()) for name in ("quiet", "killed"))
    assert quiet["findings"] == []
    assert comparable(quiet) == comparable(killed)
    assert (quiet["attempt"], killed["attempt"]) == (1, 2)
    entries = [read_journal(tmp_path / name / "journal.jsonl").entries[:-1] for name in ("quiet", "killed")]
    assert entries[0] == entries[1]

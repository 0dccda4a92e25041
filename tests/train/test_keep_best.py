"""The best weights are taken after a kill at the worst moment too, and never damaged ones or those of a NaN."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from training_runs import Data, Reported, options, tiny

from steelyard.base.errors import SteelyardError
from steelyard.model.llama import Llama
from steelyard.train import loop
from steelyard.train.checkpoint import Checkpoints, State
from steelyard.train.distributed import Ranks
from steelyard.train.loop import TrainResult, train
from steelyard.train.losses import CrossEntropy
from steelyard.train.metrics import read_metrics

LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5}


def run(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: Mapping[int, float] = LOSSES,
    at: Callable[[int], None] = lambda step: None,
    **changes: object,
) -> tuple[Llama, TrainResult, str]:
    """A run of 8 steps with these validation losses; `at` is called as each is measured."""

    def evaluate(self: loop._Run[object]) -> float:
        at(self.optimizer.steps)
        return losses[self.optimizer.steps]

    monkeypatch.setattr(loop._Run, "_evaluate", evaluate)
    model, said = tiny(), Reported()
    how = options(
        **{"steps": 8, "checkpoint_every": 2, "evaluate_every": 2, "keep_best": True, "keep_last": 1, **changes}
    )
    found = train(model, Data(), CrossEntropy(), how, folder, validation=Data(1), progress=said)
    return model, found, "\n".join(said.lines)


def alike(one: Llama, other: Llama) -> bool:
    return all(torch.equal(tensor, other.get_parameter(name)) for name, tensor in one.named_parameters())


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
from steelyard.train.checkpoint import Checkpoints
from test_keep_best import run

prune = Checkpoints._prune
def killed(self, state):
    if state.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    prune(self, state)
Checkpoints._prune = killed
run(Path(sys.argv[1]), pytest.MonkeyPatch())
"""


def test_a_kill_right_after_the_best_checkpoint_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    dead = subprocess.run(command, env=os.environ | {"PYTHONPATH": here}, capture_output=True, text=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert kept(tmp_path / "killed") == [2, 4]
    again, found, said = run(tmp_path / "killed", monkeypatch)
    assert "going on from" in said
    assert (found.best_step, found.validation_loss) == (4, 1.0)
    whole, _, _ = run(tmp_path / "whole", monkeypatch)
    assert alike(whole, again)
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole") == [4, 8]


def flip(folder: Path) -> None:
    """Turn a bit of every weight."""
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start::4] = bytes(byte ^ 1 for byte in data[start::4])
        path.write_bytes(data)


@pytest.mark.parametrize(("harm", "word"), [(flip, "damaged"), (shutil.rmtree, "is gone")])
def test_a_best_checkpoint_that_is_not_whole_is_said_and_the_last_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None], word: str
) -> None:
    best = tmp_path / "run" / "checkpoints" / "step-00000004"
    model, found, said = run(tmp_path / "run", monkeypatch, at=lambda step: harm(best) if step == 8 else None)
    line = next(line for line in said.splitlines() if "best weights" in line)
    assert "those of step 4 (validation loss 1.0000), but" in line
    assert f"{best}" in line
    assert word in line
    assert "the last ones are taken instead" in line
    assert (found.best_step, found.validation_loss) == (None, 2.5)
    last, _, _ = run(tmp_path / "last", monkeypatch, keep_best=False)
    assert alike(model, last)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    with pytest.raises(SteelyardError, match=r"step 6: the validation loss is not finite; stopped, .*step-00000004"):
        run(tmp_path, monkeypatch, LOSSES | {6: bad})
    assert kept(tmp_path) == [4]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    _, found, _ = run(tmp_path, monkeypatch)
    assert found.best_step == 4


def test_a_loss_that_is_not_finite_is_never_best(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, Ranks(0, 1, torch.device("cpu")), print, last=1, best=True)
    for step, loss in ((1, math.nan), (2, math.inf), (3, None)):
        kept.save(State(step, {}, 0, [], loss), {"a": torch.zeros(1)})
        assert kept.best is None
    kept.save(State(4, {}, 0, [], 2.0), {"a": torch.zeros(1)})
    kept.save(State(5, {}, 0, [], 2.0), {"a": torch.zeros(1)})
    assert kept.best == (4, 2.0)
    assert kept.steps() == [4, 5]


def test_later_damaged_checkpoints_do_not_count_as_the_last_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, monkeypatch)
    newest = tmp_path / "checkpoints" / "step-00000008"
    flip(newest)
    seen: dict[int, list[int]] = {}
    _, found, said = run(tmp_path, monkeypatch, at=lambda step: seen.update({step: kept(tmp_path)}))
    assert f"{newest}" in said
    assert "step 4 of 8" in said
    assert seen[8] == [4, 6]  # the one of step 6 was kept, not the damaged one
    assert found.best_step == 4
    document = json.loads((newest / "complete.json").read_text())
    assert document["best"] == [4, 1.0]

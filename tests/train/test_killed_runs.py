"""Runs that are killed, and runs of several ranks: each rank is a process, each kill a SIGKILL."""

from __future__ import annotations

import json
import multiprocessing
import random
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from training_runs import Data, Reported, options, run_rank, tiny

from steelyard.train.loop import train
from steelyard.train.losses import CrossEntropy

STEPS = 30
CONTEXT = multiprocessing.get_context("forkserver")  # children are forked from a server that has imported torch


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    CONTEXT.set_forkserver_preload(["training_runs", "torch.distributed.fsdp", "torch.distributed.tensor"])


def start(folder: Path, world: int, **changes: Any) -> tuple[list[BaseProcess], Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    counter = CONTEXT.Value("i", -1)
    arguments = [(str(folder), rank, world, port, changes, counter) for rank in range(world)]
    processes: list[BaseProcess] = [CONTEXT.Process(target=run_rank, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    return processes, counter


def finish(folder: Path, world: int, **changes: Any) -> None:
    processes, _ = start(folder, world, **changes)
    for process in processes:
        process.join(240)
        assert process.exitcode == 0


def stored(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together from its shards."""
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118, it is no dictionary
                found.setdefault(name, []).append((places[name]["saved_offsets"][0], file.get_tensor(name)))
    return {name: torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])]) for name, parts in found.items()}


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_ten_times_ends_with_the_same_bits(tmp_path: Path, world: int) -> None:
    finish(tmp_path / "whole", world, steps=STEPS)
    draw = random.Random(world)
    killed = 0
    for attempt in range(10):
        processes, counter = start(tmp_path / "killed", world, steps=STEPS)
        goal = draw.randrange(2 * attempt, 2 * attempt + 9)  # steps done
        deadline = time.monotonic() + 120
        while counter.value < goal and all(process.is_alive() for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)  # anywhere in a step, a checkpoint or preflight
        for process in processes:
            killed += process.is_alive() and process is processes[0]
            process.kill()
        for process in processes:
            process.join()
    assert killed == 10
    finish(tmp_path / "killed", world, steps=STEPS)
    whole, again = stored(tmp_path / "whole", STEPS), stored(tmp_path / "killed", STEPS)
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name


def test_two_ranks_compute_what_one_does_and_one_goes_on_from_two(tmp_path: Path) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    # three micro-batches on two ranks: one rank has a turn that does not count
    train(
        tiny(), Data(3), CrossEntropy(), options(steps=8, checkpoint_every=1, keep_last=9), alone, progress=Reported()
    )
    finish(both, 2, steps=8, checkpoint_every=1, keep_last=9)
    first, other = stored(alone, 1), stored(both, 1)
    for name, moment in first.items():
        if name.startswith("first."):  # after one step the first moment is a tenth of the clipped gradient
            assert float((moment - other[name]).norm() / moment.norm()) < 1e-5, name
    last, two = stored(alone, 8), stored(both, 8)
    for path in (both / "checkpoints").iterdir():  # forget the second half, and go on with one rank
        if path.name > "step-00000004":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    said = Reported()
    train(tiny(), Data(3), CrossEntropy(), options(steps=8, checkpoint_every=1, keep_last=9), both, progress=said)
    assert any("going on from" in line and "step 4 of 8" in line for line in said.lines)
    resumed = stored(both, 8)
    for name, tensor in last.items():
        if name.startswith("master."):
            assert float((tensor - two[name]).norm() / tensor.norm()) < 1e-5, name
            assert float((two[name] - resumed[name]).norm() / tensor.norm()) < 1e-5, name

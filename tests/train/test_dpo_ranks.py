"""DPO over two ranks (gloo, FSDP2) takes the same steps as on one, with full weights and with adapters."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_folder

from steelyard.model.formats import load_tensors

RUN = """
import sys
from pathlib import Path
from steelyard.base.progress import Silent
from steelyard.inference.endpoint import Message
from steelyard.train.conversations import Preference
from steelyard.train.dpo import DPOOptions, prefer
from steelyard.train.options import TrainOptions
from steelyard.train.tuning import Tuning

folder, out, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
pairs = [Preference((Message("user", "Question " + "x" * n),), "yes" * (n + 1), "no" * n + "!") for n in range(6)]
prefer(
    folder, pairs, out, work=out.with_name(out.name + ".work"),
    dpo=DPOOptions(pairs_per_step=4, micro_batches_per_step=3),
    options=TrainOptions(steps=3, learning_rate=1e-3, dtype="float32", compile="off", checkpoint_every=0),
    tuning=Tuning(lora_rank=rank), validation=pairs[:1], progress=Silent(),
)
"""


def run(folder: Path, out: Path, rank: int, world: int) -> dict[str, torch.Tensor]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", RUN, str(folder), str(out), str(rank)]
    shared = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(n), "LOCAL_RANK": str(n)}, stderr=subprocess.PIPE, text=True
        )
        for n in range(world)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    codes = [process.returncode for process in started]
    assert codes == [0] * world, "\n".join(f"rank {n}: {text[-1500:]}" for n, text in enumerate(errors))
    return load_tensors(out)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_two_ranks_take_the_same_steps_as_one(tmp_path: Path, rank: int) -> None:
    folder = tiny_folder(tmp_path / "model")
    one, two = run(folder, tmp_path / "one", rank, 1), run(folder, tmp_path / "two", rank, 2)
    start = load_tensors(folder)
    moved = torch.cat([(one[name] - start[name]).flatten() for name in start]).norm()
    apart = torch.cat([(one[name] - two[name]).flatten() for name in start]).norm()
    assert moved > 1e-2
    assert apart < 1e-3 * moved  # AdamW divides by the root of the second moment: it magnifies what rounding differs

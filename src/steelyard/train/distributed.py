"""Ranks: one process, or several started by torchrun. Gloo between CPUs, NCCL between GPUs.

NCCL is not measured: no GPU was at hand.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steelyard.base.errors import SteelyardError


class Ranks:
    """Who this process is among those that train together; every method is called by all of them alike."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = rank, world, device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order, on all ranks."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def together(self, error: BaseException | None) -> None:
        """Raise on every rank what any of them met; returns where none did. Also a barrier."""
        found = self.gather(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for rank, text in enumerate(found):
            if text is not None:
                raise SteelyardError(f"rank {rank}: {text}")


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The ranks of torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK), or this process alone.

    A process group that exists already is used and left as it is.
    """
    cuda = torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        return
    if world == 1:
        yield Ranks(0, 1, device)
        return
    # device_id lets NCCL build its communicator at once, so that a broken network shows here and not in step 1
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()  # who leaves closes connections on which another may still wait for its last part
    finally:
        dist.destroy_process_group()

"""AdamW over float32 masters, with decoupled weight decay (arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@dataclass(frozen=True)
class Slab:
    """A run of float32 weights that are updated at once: one parameter, its shard, or many side by side in a buffer.

    `named` cuts any tensor of the master's shape (the master, a moment) into the parameters' own tensors, by name.
    """

    master: Tensor
    gradient: Callable[[], Tensor]
    decays: bool
    named: Callable[[Tensor], dict[str, Tensor]]


class AdamW:
    """One update for all slabs; weight decay only where a slab says so (matrices, not norms or biases)."""

    def __init__(
        self, slabs: Sequence[Slab], betas: tuple[float, float], eps: float, weight_decay: float, step: int = 0
    ) -> None:
        self.slabs, self.betas, self.eps, self.weight_decay = list(slabs), betas, eps, weight_decay
        self.first = [torch.zeros_like(slab.master) for slab in slabs]
        self.second = [torch.zeros_like(slab.master) for slab in slabs]
        self.steps = step

    def step(self, learning_rate: float) -> None:
        """Apply the gradients that the slabs hold now."""
        for decays in (True, False):
            chosen = [i for i, slab in enumerate(self.slabs) if slab.decays == decays and slab.master.numel()]
            if not chosen:
                continue
            masters = [self.slabs[i].master for i in chosen]
            adamw(
                masters,
                [self.slabs[i].gradient() for i in chosen],
                [self.first[i] for i in chosen],
                [self.second[i] for i in chosen],
                [],
                # the count that the update raises by one before it corrects the moments' bias
                [torch.tensor(float(self.steps), device=master.device) for master in masters],
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=learning_rate,
                weight_decay=self.weight_decay if decays else 0.0,
                eps=self.eps,
            )
        self.steps += 1

    def named(self) -> dict[str, Tensor]:
        """Both moments by parameter name, sharing memory with the optimizer: to save, and to load into."""
        tensors: dict[str, Tensor] = {}
        for slab, first, second in zip(self.slabs, self.first, self.second, strict=True):
            tensors |= {f"first.{name}": part for name, part in slab.named(first).items()}
            tensors |= {f"second.{name}": part for name, part in slab.named(second).items()}
        return tensors


def clip_(slabs: Sequence[Slab], limit: float, total: Callable[[Tensor], Tensor]) -> float:
    """Scale all gradients so that their global norm is at most `limit` (0: do not); returns the norm before.

    `total` sums a tensor over ranks that hold different shards. A norm that is not finite leaves the gradients alone.
    """
    gradients = [slab.gradient() for slab in slabs if slab.master.numel()]
    device = slabs[0].master.device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients:
        squares += torch.linalg.vector_norm(gradient).double() ** 2
    norm = float(total(squares).sqrt())
    if limit and limit < norm < float("inf"):
        for gradient in gradients:
            gradient.mul_(limit / norm)
    return norm

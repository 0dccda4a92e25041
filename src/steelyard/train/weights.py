"""Two copies of the weights: float32 masters that the optimizer moves, and what a forward pass computes with.

On one rank the masters lie side by side in one buffer, so that an update, a norm, a cast to bfloat16 is one pass over
memory. On several ranks FSDP2 shards them by parameter and casts on gathering.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from steelyard.base.errors import UsageError
from steelyard.model.llama import Llama
from steelyard.train.distributed import Ranks
from steelyard.train.optimizer import Slab

FORWARD_METHODS = ("packed",)


class Weights(Protocol):
    """What the loop needs of either kind."""

    compute: Llama  # forward and backward run on this
    slabs: list[Slab]

    def refresh(self) -> None:
        """Make the compute copy equal to the masters, after an update or a load."""

    def zero(self) -> None:
        """Forget the gradients."""

    def last(self, last: bool) -> None:
        """Say whether the coming backward pass is the step's last (ranks then exchange gradients)."""

    def finish(self, model: Llama) -> None:
        """Put the trained masters into `model`, whole."""


def trainable(model: Llama) -> dict[str, nn.Parameter]:
    """Parameters with requires_grad by name. Raises UsageError where there are none."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise UsageError("nothing to train: no parameter of the model has requires_grad")
    return found


def named_masters(weights: Weights) -> dict[str, Tensor]:
    """Every master by parameter name, sharing memory."""
    return {name: part for slab in weights.slabs for name, part in slab.named(slab.master).items()}


class LocalWeights:
    """One rank: flat float32 masters (the model's own parameters become views of them), one flat compute copy."""

    def __init__(self, model: Llama, dtype: torch.dtype, device: torch.device) -> None:
        named = trainable(model)
        model.to(device)
        # those that decay first: each kind is then one slice of every buffer
        names = sorted(named, key=lambda name: named[name].ndim < 2)
        sizes = [named[name].numel() for name in names]
        split = sum(size for name, size in zip(names, sizes, strict=True) if named[name].ndim >= 2)
        masters = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        self.gradients = torch.zeros_like(masters)
        self.masters, self.dtype = masters, dtype
        same = dtype == torch.float32
        self.copy = masters if same else torch.empty(sum(sizes), dtype=dtype, device=device)
        memo: dict[int, object] = {}
        for name, part, slope, low in zip(
            names, *(torch.split(flat, sizes) for flat in (masters, self.gradients, self.copy)), strict=True
        ):
            parameter = named[name]
            part.copy_(parameter.detach().reshape(-1))
            parameter.data = part.view_as(parameter)
            if same:
                parameter.grad = slope.view_as(parameter)
                continue
            replaced = nn.Parameter(low.view_as(parameter))
            replaced.register_post_accumulate_grad_hook(_into(slope.view_as(parameter)))  # type: ignore[no-untyped-call]
            memo[id(parameter)] = replaced
        for parameter in model.parameters():
            if not parameter.requires_grad:
                if same:
                    parameter.data = parameter.float()
                else:
                    memo[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        # a copy of the structure over other weights: whatever modules the model has been given
        self.compute: Llama = model if same else copy.deepcopy(model, memo)
        shapes = {name: named[name].shape for name in names}
        self.slabs = []
        for start, stop, decays in ((0, split, True), (split, sum(sizes), False)):
            chosen = [name for name in names if (named[name].ndim >= 2) == decays]
            if chosen:
                gradient = self.gradients[start:stop]
                cut = _cut({name: shapes[name] for name in chosen})
                self.slabs.append(Slab(masters[start:stop], lambda g=gradient: g, decays, cut))  # type: ignore[misc]
        self.refresh()

    def refresh(self) -> None:
        if self.copy is not self.masters:
            with torch.no_grad():
                self.copy.copy_(self.masters)

    def zero(self) -> None:
        self.gradients.zero_()

    def last(self, last: bool) -> None:
        return None

    def finish(self, model: Llama) -> None:
        for parameter in model.parameters():
            parameter.grad = None


def _into(slope: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        slope.add_(parameter.grad)
        parameter.grad = None

    return add


def _cut(shapes: Mapping[str, torch.Size]) -> Callable[[Tensor], dict[str, Tensor]]:
    def cut(flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    return cut


class ShardedWeights:
    """Several ranks: every parameter is sharded by FSDP2; each block is gathered as it is needed."""

    def __init__(self, model: Llama, dtype: torch.dtype, ranks: Ranks) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
        from torch.distributed.tensor import DTensor

        trainable(model)
        self.compute: Llama = copy.deepcopy(model).to(ranks.device, torch.float32)
        for parameter in model.parameters():  # the whole weights come back in `finish`
            parameter.data = torch.empty(0)
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in self.compute.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
            register_fsdp_forward_method(layer, "packed")
        fully_shard(self.compute, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for method in FORWARD_METHODS:
            register_fsdp_forward_method(self.compute, method)
        self.slabs: list[Slab] = []
        for name, parameter in trainable(self.compute).items():
            assert isinstance(parameter, DTensor)
            self.slabs.append(_shard(name, parameter))

    def refresh(self) -> None:
        return None

    def zero(self) -> None:
        self.compute.zero_grad()

    def last(self, last: bool) -> None:
        self.compute.set_requires_gradient_sync(last)  # type: ignore[operator]

    def finish(self, model: Llama) -> None:
        from torch.distributed.tensor import DTensor

        self.compute.reshard()  # type: ignore[operator]
        found = dict(self.compute.named_parameters())
        for name, parameter in model.named_parameters():
            shard = found[name]
            assert isinstance(shard, DTensor)
            parameter.data = shard.full_tensor().detach().cpu()


def _shard(name: str, parameter: Tensor) -> Slab:
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)

    def gradient() -> Tensor:
        assert isinstance(parameter.grad, DTensor)
        return parameter.grad.to_local()

    def named(local: Tensor) -> dict[str, Tensor]:
        whole = DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
        return {name: whole}

    return Slab(parameter.to_local().detach(), gradient, parameter.ndim >= 2, named)

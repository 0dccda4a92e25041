"""How fast this machine multiplies matrices, what a training step costs in such work, and compiling where it pays."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from steelyard.base.errors import UsageError
from steelyard.inference.kernels import compiler
from steelyard.model.llama import Block, Llama
from steelyard.train.options import Number


def compute_dtype(name: Number, device: torch.device | None = None) -> torch.dtype:
    """What to compute in. `auto`: bfloat16 where the hardware multiplies it (a GPU; a processor with AVX512-BF16 or
    AMX), else float32, which is then about seven times as fast. `device` None: the GPU where there is one."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return torch.bfloat16
    found = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(found.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


@functools.cache
def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measured floating-point operations a second of a [2048, 1024] x [1024, 1024] product (GPU: 8192 each side).

    A multiply and an add count as two. The best of several, since what disturbs only ever slows.
    """
    rows, inner = (8192, 8192) if device.type == "cuda" else (2048, 1024)
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, inner, device=device).to(dtype)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        product = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * rows * inner * product.shape[1] / (time.perf_counter() - start))
    return best


def reuse_memory() -> None:
    """Have glibc keep freed memory for the next step: its own habit is to return every large block to the system,
    which then clears it again, page by page, at each use (5 to 10% of a CPU step). Elsewhere this does nothing.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at the most it takes
        library.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def step_operations(
    model: Llama, tokens: int, lengths: Sequence[int], heads: int | None = None, first: int = 0
) -> float:
    """Operations of forward and backward over `tokens` in documents of `lengths`, `heads` of which go through the head
    (None: all): 2 a weight and token forward, 2 for the gradient of the input, 2 for that of a weight that learns;
    causal attention counted as the half it is. Layers below `first` only go forward.
    """
    config = model.config
    pairs = sum(length * length for length in lengths) / 2
    width = config.num_attention_heads * config.head_dim
    total = 0.0
    for number, layer in enumerate(model.model.layers):
        weights = [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]
        passes = 1 if number < first else 2
        total += tokens * sum(w.numel() * (2 * passes + 2 * w.requires_grad) for w in weights)
        total += (4 if passes == 1 else 12) * width * pairs
    head = model.head_weight
    return total + (tokens if heads is None else heads) * head.numel() * (4 + 2 * head.requires_grad)


def compile_blocks(
    model: Llama, mode: Literal["auto", "on", "off"], operations: float, before: bool | None = None
) -> tuple[bool, str]:
    """Compile what lies between attention calls in every block; returns whether, and what to tell the reader.

    `auto` does as the run did `before` it was stopped, since what is compiled rounds otherwise; in a new run (None)
    it compiles where `operations` are enough to earn back the compiling (about a minute).
    Raises UsageError for `on` without a C++ compiler.
    """
    device = model.head_weight.device
    if mode == "off":
        return False, "not compiled (compile: off)"
    if mode == "auto" and before is False:
        return False, "not compiled, as this run was not before"
    found = compiler()
    if device.type == "cpu" and found is None:
        if mode == "on":
            raise UsageError("compile: on needs a C++ compiler (g++ or clang++): install one, or set compile: auto")
        differs = ", and no longer rounds as before" if before else ""
        return False, f"not compiled: no C++ compiler (g++ or clang++) here; training is slower without{differs}"
    if mode == "auto" and before is None:
        seconds = operations / matrix_rate(model.head_weight.dtype, device) * 3
        if seconds < 180:
            return False, "not compiled: the run is too short to earn it back"
    for layer in model.model.layers:
        assert isinstance(layer, Block)
        for name in ("before_attention", "after_attention"):
            setattr(layer, name, torch.compile(getattr(layer, name)))
    return True, "compiled (torch.compile)"

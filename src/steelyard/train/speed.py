"""How fast this machine multiplies matrices, what a training step costs in such work, and compiling where it pays."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from steelyard.base.errors import UsageError
from steelyard.model.llama import Block, Llama


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


def matrix_weights(model: Llama) -> tuple[int, int]:
    """Weights that each token is multiplied with, the head among them: all, and those that learn."""
    found = {module.weight for module in model.modules() if isinstance(module, nn.Linear)} | {model.head_weight}
    return sum(w.numel() for w in found), sum(w.numel() for w in found if w.requires_grad)


def step_operations(model: Llama, tokens: int, lengths: Sequence[int]) -> float:
    """Operations of forward and backward over `tokens` in documents of `lengths`: 2 a weight and token forward, 2 for
    the gradient of the input, 2 for that of a weight that learns; causal attention counted as the half it is.
    """
    every, learning = matrix_weights(model)
    config = model.config
    pairs = sum(length * length for length in lengths) / 2
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    return tokens * (4 * every + 2 * learning) + attention


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU, or None."""
    return next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)


def compile_blocks(model: Llama, mode: Literal["auto", "on", "off"], operations: float) -> str:
    """Compile what lies between attention calls in every block; returns what was decided, for the reader.

    `auto` compiles where a run of `operations` is long enough to earn back the compiling (about a minute).
    Raises UsageError for `on` without a C++ compiler.
    """
    device = model.head_weight.device
    if mode == "off":
        return "not compiled (compile: off)"
    found = compiler()
    if device.type == "cpu" and found is None:
        if mode == "on":
            raise UsageError("compile: on needs a C++ compiler (g++ or clang++): install one, or set compile: auto")
        return "not compiled: no C++ compiler (g++ or clang++) here; training is slower without"
    if mode == "auto":
        seconds = operations / matrix_rate(model.head_weight.dtype, device) * 3
        if seconds < 180:
            return "not compiled: the run is too short to earn it back"
    for layer in model.model.layers:
        assert isinstance(layer, Block)
        for name in ("before_attention", "after_attention"):
            setattr(layer, name, torch.compile(getattr(layer, name)))
    return "compiled (torch.compile)"

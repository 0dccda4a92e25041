"""The executor's compiled CPU kernels: built from `kernels.cpp` once a machine, loaded, and called with tensors.

Needs a C++ compiler (`$CXX`, c++, g++ or clang++). Where there is none the executor runs in plain PyTorch: the same
tokens up to rounding, about half the speed; `describe()` and `Endpoint.identity` say which. STEELYARD_KERNELS=off
chooses that. A compiler that fails is an error, never a silent step back.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import SteelyardError
from steelyard.inference.endpoint import Sampling
from steelyard.model.llama import LlamaConfig

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-w")
LANES = 16
SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_COMPILE_SECONDS = 300
# `Settings` of kernels.cpp
SETTINGS = np.dtype(
    [
        ("temperature", "f4"),
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("top_k", "i4"),
        ("seed", "u8"),
        ("position", "u4"),
        ("", "u4"),
    ]
)


def side_by_side(both: Tensor) -> Tensor:
    """Rows [G; U] of a gate and of what it gates, 16 of one and 16 of the other in turns, as `Kernels.gated` reads."""
    halves = both.view(2, -1, LANES, *both.shape[1:])
    return halves.transpose(0, 1).reshape(both.shape)


def serves(dtype: torch.dtype, config: LlamaConfig) -> bool:
    """Whether the kernels cover this dtype and these sizes (whole vectors of 16)."""
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    return dtype in SUFFIX and not any(size % LANES for size in sizes) and config.head_dim % (2 * LANES) == 0


def compiler() -> str | None:
    """The C++ compiler to build with, None without one."""
    named = os.environ.get("CXX")
    if named:
        return shutil.which(named)
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def describe() -> str:
    """What CPU models run on here: `compiled`, or `pytorch` and why."""
    if os.environ.get("STEELYARD_KERNELS") == "off":
        return "pytorch (STEELYARD_KERNELS=off)"
    return "compiled" if compiler() else "pytorch (no C++ compiler found: install g++ for about twice the speed)"


@functools.cache
def load(dtype: torch.dtype) -> Kernels | None:
    """The kernels, built now if this machine has not built them yet; None without a compiler or with kernels off.

    Raises SteelyardError with the compiler's words where compiling fails.
    """
    program = None if os.environ.get("STEELYARD_KERNELS") == "off" else compiler()
    return None if program is None else Kernels(ctypes.CDLL(str(_build(program))), dtype)


def _build(program: str) -> Path:
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    name = sha256_hex("\n".join([SOURCE.read_text(), version, *FLAGS, _processor()]).encode())
    folder = _private_folder()
    library = folder / f"{name}.so"
    if library.is_file():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "kernels.so"
        command = [program, *FLAGS, str(SOURCE), "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SteelyardError(f"{program}: cannot compile the CPU kernels: {error}. {_REMEDY}") from error
        if done.returncode:
            raise SteelyardError(f"{program}: cannot compile the CPU kernels: {done.stderr.strip()[:2000]}. {_REMEDY}")
        built.replace(library)  # whole or not at all: two processes may build at once
    return library


_REMEDY = "Mend the compiler, name another in CXX, or set STEELYARD_KERNELS=off to run slower without them"


def _private_folder() -> Path:
    """Where libraries are kept; refused if anybody else could write code into it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "steelyard" / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        remedy = "chmod 700 it, or set XDG_CACHE_HOME to a folder of your own"
        raise SteelyardError(f"{folder}: others may write here, and code is loaded from it: {remedy}")
    return folder


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))


class Kernels:
    """Calls into the library. Tensors must be contiguous, of one dtype (float32 or bfloat16), on the CPU."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        pointer, number, whole = ctypes.c_void_p, ctypes.c_long, ctypes.c_int

        def function(name: str, *arguments: type) -> Callable[..., None]:
            found = getattr(library, f"{name}_{SUFFIX[dtype]}")
            found.argtypes, found.restype = arguments, None
            call: Callable[..., None] = found
            return call

        self._add_norm = function("add_norm", *[pointer] * 4, number, number, ctypes.c_float, whole)
        self._pack = function("pack", pointer, pointer, number, number, whole)
        self._linear = function("linear", *[pointer] * 4, *[number] * 3, whole)
        self._gated = function("gated", *[pointer] * 4, *[number] * 3, whole)
        self._attend = function("attend", *[pointer] * 9, *[number] * 5, whole)
        self._choose = function("choose", *[pointer] * 3, number, number, whole)
        library.padded_outs.argtypes, library.padded_outs.restype = [number], number
        self._padded: Callable[[int], int] = library.padded_outs

    def add_norm(self, x: Tensor, step: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        """Adds `step` to the stream `x` [T, C] in place; the sum's RMS norm, times `weight` [C], into `out` [T, C]."""
        other = None if step is None else step.data_ptr()
        pointers = (x.data_ptr(), other, weight.data_ptr(), out.data_ptr())
        self._add_norm(*pointers, *x.shape, eps, torch.get_num_threads())
        return out

    def pack(self, weight: Tensor) -> Tensor:
        """A copy of `weight` [O, I], I even, in the order `linear` reads (O filled up to whole panels)."""
        outs, size = weight.shape
        packed = weight.new_empty(self._padded(outs), size)
        self._pack(weight.contiguous().data_ptr(), packed.data_ptr(), outs, size, torch.get_num_threads())
        return packed

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """x [T, I] times a packed weight [O, I] transposed, plus bias [O], into `out` [T, O]."""
        pointers = (x.data_ptr(), packed.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr())
        self._linear(*pointers, *x.shape, out.shape[1], torch.get_num_threads())
        return out

    def gated(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """silu(x Gᵀ) * (x Uᵀ) of x [T, I] into `out` [T, O]; `packed`, `bias` of G and U [O, I] as `side_by_side`."""
        pointers = (x.data_ptr(), packed.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr())
        self._gated(*pointers, *x.shape, out.shape[1], torch.get_num_threads())
        return out

    def attend(
        self,
        qkv: Tensor,
        turns: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        firsts: Tensor,
        starts: Tensor,
        tables: Tensor,
        out: Tensor,
        config: LlamaConfig,
    ) -> Tensor:
        """Attention of several sequences' new tokens into `out` [T, H * D]; stores their keys and values.

        `qkv` [T, (H + 2 K) * D], whose queries and keys are rotated in place; sequence s has rows firsts[s] ..
        firsts[s + 1] - 1 (int64 [S + 1]), at positions starts[s] ... (int64 [S]), and pages tables[s] (int32 [S, W]);
        `turns` are cosines and sines by position [L, D], `cache` one layer's keys and values, [P, K, PAGE * D] each.
        """
        tensors = (qkv, *turns, *cache, firsts, starts, tables, out)
        sizes = (*tables.shape, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self._attend(*(tensor.data_ptr() for tensor in tensors), *sizes, torch.get_num_threads())
        return out

    def choose(
        self, logits: Tensor, samplings: Sequence[Sampling], seeds: Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        """The next token of every row of logits [B, V]: int64 [B], -1 where logits are not finite. See sampling.py."""
        rows, vocab = logits.shape
        settings = np.zeros(rows, SETTINGS)
        for row, sampling, seed, position in zip(settings, samplings, seeds, positions, strict=True):
            top_p = sampling.top_p if sampling.top_p < 1 else 2.0
            row["temperature"], row["top_p"], row["min_p"] = sampling.temperature, top_p, sampling.min_p
            row["top_k"], row["seed"], row["position"] = sampling.top_k, seed % 2**64, position % 2**32
        tokens = torch.empty(rows, dtype=torch.int64)
        pointers = (logits.data_ptr(), settings.ctypes.data, tokens.data_ptr())
        self._choose(*pointers, rows, vocab, torch.get_num_threads())
        return tokens

"""The executor's compiled CPU kernels: built from the C++ beside this once a machine, loaded, called with tensors.

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

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "choose.cpp"))
_HEADER = Path(__file__).with_name("vectors.h")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-w")
LANES = 16
SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_COMPILE_SECONDS = 300
# `Settings` of choose.cpp
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


def missing() -> bool:
    """Whether `load` would have to compile first, which takes a while."""
    program = None if os.environ.get("STEELYARD_KERNELS") == "off" else compiler()
    return program is not None and not _library(program).is_file()


@functools.cache
def _version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout


def _library(program: str) -> Path:
    """Where the kernels of this source, compiler and processor are kept."""
    sources = [path.read_text() for path in (_HEADER, *SOURCES)]
    name = sha256_hex("\n".join([*sources, _version(program), *FLAGS, _processor()]).encode())
    return _private_folder() / f"{name}.so"


def _build(program: str) -> Path:
    library = _library(program)
    if library.is_file():
        return library
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / "kernels.so"
        command = [program, *FLAGS, *map(str, SOURCES), "-o", str(built)]
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
        self._attend = function("attend", *[pointer] * 9, *[number] * 5, whole)
        sequences = (*[pointer] * 3, number, number)
        to = (pointer, number, pointer, pointer, whole)
        self._forward = function("forward", pointer, ctypes.c_float, pointer, number, *sequences, *to)
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
        weight = weight.contiguous()
        self._pack(weight.data_ptr(), packed.data_ptr(), outs, size, torch.get_num_threads())
        return packed

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """x [T, I] times a packed weight [O, I] transposed, plus bias [O], into `out` [T, O]."""
        pointers = (x.data_ptr(), packed.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr())
        self._linear(*pointers, *x.shape, out.shape[1], torch.get_num_threads())
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

    def forward(
        self,
        network: Network,
        tokens: Tensor,
        firsts: Tensor,
        starts: Tensor,
        tables: Tensor,
        wanted: Tensor | None,
    ) -> Tensor:
        """Logits [n, V] of a packed pass over `tokens` (int64 [T]), after the rows `wanted` (int64 [n], ascending), or
        all where None. `firsts`, `starts`, `tables` as in `attend`."""
        rows, config = len(tokens), network.config
        wants = rows if wanted is None else len(wanted)
        logits = torch.empty(wants, network.outs, dtype=network.room.dtype)
        where = (firsts.data_ptr(), starts.data_ptr(), tables.data_ptr(), *tables.shape)
        to = (None if wanted is None else wanted.data_ptr(), wants, network.room_for(rows), logits.data_ptr())
        pointer = network.pointers.ctypes.data
        self._forward(pointer, config.rms_norm_eps, tokens.data_ptr(), rows, *where, *to, torch.get_num_threads())
        return logits

    def choose(
        self, logits: Tensor, samplings: Sequence[Sampling], seeds: Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        """The next token of every row of logits [B, V]: int64 [B], -1 where logits are not finite. See sampling.py."""
        rows, vocab = logits.shape
        settings = np.zeros(rows, SETTINGS)
        for row, sampling, seed, position in zip(settings, samplings, seeds, positions, strict=True):
            top_p = sampling.top_p if sampling.top_p < 1 else 2.0
            row["temperature"], row["top_p"], row["min_p"] = sampling.temperature, top_p, sampling.min_p
            row["top_k"], row["seed"], row["position"] = min(sampling.top_k, vocab), seed % 2**64, position % 2**32
        tokens = torch.empty(rows, dtype=torch.int64)
        pointers = (logits.data_ptr(), settings.ctypes.data, tokens.data_ptr())
        self._choose(*pointers, rows, vocab, torch.get_num_threads())
        return tokens


class Network:
    """A model as `Kernels.forward` reads it: `Network`, `Layer` and `Room` of kernels.cpp, and what they point to."""

    def __init__(
        self,
        config: LlamaConfig,
        outs: int,
        layers: Sequence[Sequence[Tensor | None]],
        ends: Sequence[Tensor],
    ) -> None:
        """`outs`: logits of a token. `layers`: of each layer norm, qkv (packed) and its bias, out and its bias,
        mlp_norm, gate_up and its bias, down and its bias, keys, values. `ends`: embedding, norm, head (packed),
        cosines, sines."""
        self.config, self.outs, self._kept = config, outs, (list(layers), list(ends))
        self._layers = np.array([[_address(tensor) for tensor in layer] for layer in layers], np.uint64)
        sizes = (config.hidden_size, config.intermediate_size, outs)
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        addresses = [*map(_address, ends), self._layers.ctypes.data]
        self.pointers = np.array([*addresses, len(layers), *sizes, *heads], np.uint64)
        head = config.head_dim
        queries = config.num_attention_heads * head
        widest = queries + 2 * config.num_key_value_heads * head
        self._widths = (*[config.hidden_size] * 3, widest, queries, config.intermediate_size)
        self.room = ends[0].new_empty(0)
        self._places = np.zeros(len(self._widths), np.uint64)
        self._rows = 0

    def room_for(self, rows: int) -> int:
        """Where the addresses of scratch for so many rows lie. It is kept from pass to pass: fresh memory costs a page
        fault every 4 KiB."""
        if rows > self._rows:
            self._rows, self.room = rows, self.room.new_empty(rows * sum(self._widths))
            starts = np.cumsum([0, *self._widths[:-1]]) * rows * self.room.element_size()
            self._places = (self.room.data_ptr() + starts).astype(np.uint64)
        return int(self._places.ctypes.data)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

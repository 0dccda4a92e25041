"""Checkpoints that are whole or absent: written aside, fsynced, renamed, with a list of their files' digests.

`checkpoints/step-00000500/` holds the masters and the optimizer's moments as torch.distributed.checkpoint writes them
in its safetensors form (each rank its shards; no pickle, so a stranger's checkpoint can do nothing but be wrong), and
`complete.json`: the step, which is the loader's and the schedule's whole state, what the run was made of, random
states, which checkpoint is the best so far (one rename makes both true), and the SHA-256 of every file. A run of two
ranks can go on with one, and the other way round.
"""

from __future__ import annotations

import base64
import errno
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from steelyard.base.canonical import sha256_file
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import fsync_folder, read_bounded, write_atomic
from steelyard.train.distributed import Ranks

MARK = "complete.json"
LIMIT = 64_000_000  # bytes of complete.json
FILE_BYTES = 128 << 20  # of a file of tensors, unless one tensor alone is larger


@dataclass(frozen=True)
class State:
    """What a checkpoint holds beside tensors."""

    step: int  # updates done
    identity: Mapping[str, Any]  # what must be the same to go on: data digest, options, model
    tokens: int  # processed so far
    random: list[str]  # each rank's random states, base64
    validation_loss: float | None = None
    compiled: bool | None = None  # None: on several ranks, where nothing is, or not known
    best: tuple[int, float] | None = None  # step and validation loss of the best so far, this one included


def random_state() -> str:
    """This process's torch random states: the CPU's, and where there is one the GPU's."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return " ".join(base64.b64encode(state.numpy().tobytes()).decode() for state in states)


def set_random_state(text: str) -> None:
    states = [torch.frombuffer(bytearray(base64.b64decode(part)), dtype=torch.uint8) for part in text.split()]
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[1])


class Checkpoints:
    """The checkpoints of one run's folder."""

    def __init__(self, folder: Path, ranks: Ranks, say: Callable[[str], None], *, last: int, best: bool) -> None:
        self.folder, self.ranks, self.say = folder / "checkpoints", ranks, say
        self.last, self.keep_best = last, best
        self.latest: int | None = None  # step of the newest good one
        self.best: tuple[int, float] | None = None  # step and validation loss of the best one; alike on all ranks

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are marked complete, oldest first."""
        found = self.folder.glob(f"step-*/{MARK}")
        return sorted(int(mark.parent.name[5:]) for mark in found if mark.parent.name[5:].isdigit())

    def improves(self, loss: float | None) -> bool:
        """Whether a checkpoint with this validation loss is to be kept as the best one."""
        if not self.keep_best or loss is None or not math.isfinite(loss):
            return False
        return self.best is None or loss < self.best[1]

    def trouble(self, step: int) -> str:
        """What is wrong with the checkpoint of `step`; nothing where it is whole."""
        try:
            read_state(self.path(step))
        except FileNotFoundError:
            return f"{self.path(step)} is gone"
        except (FormatError, OSError) as error:
            return str(error)
        return ""

    def save(self, state: State, tensors: dict[str, Tensor]) -> Path:
        """Write one and remove those no longer kept. On failure (disk full) older ones are as they were."""
        if self.improves(state.validation_loss):
            assert state.validation_loss is not None
            state = replace(state, best=(state.step, state.validation_loss))
        else:
            state = replace(state, best=self.best)
        target = self.path(state.step)
        aside = self.folder / f".{target.name}.partial"
        failed: BaseException | None = None
        try:
            if self.ranks.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                for old in self.folder.glob(".*.partial"):  # of a run that was killed
                    shutil.rmtree(old)
                aside.mkdir()
        except OSError as error:
            failed = _said(error, target)
        self.ranks.together(failed)
        try:
            write_tensors(aside, tensors, alone=self.ranks.world == 1)
            if self.ranks.first:
                self._complete(aside, target, state)
        except (OSError, CheckpointException) as error:
            failed = _said(error, target)
            shutil.rmtree(aside, ignore_errors=True)
        self.ranks.together(failed)
        self.latest, self.best = state.step, state.best
        if self.ranks.first:
            self._prune(state)
        return target

    def _complete(self, aside: Path, target: Path, state: State) -> None:
        files = {file.name: sha256_file(file) for file in sorted(aside.iterdir())}
        document = {
            "step": state.step,
            "tokens": state.tokens,
            "validation_loss": state.validation_loss,
            "best": state.best,
            "compiled": state.compiled,
            "identity": dict(state.identity),
            "random": state.random,
            "files": files,
        }
        write_atomic(aside / MARK, json.dumps(document, indent=1).encode())
        for name in files:
            with (aside / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(aside)
        if target.exists():  # of an earlier, broken attempt: `newest` skipped it
            shutil.rmtree(target)
        os.rename(aside, target)
        fsync_folder(self.folder)

    def _prune(self, state: State) -> None:
        # later ones were found damaged when the run was resumed
        kept = set([step for step in self.steps() if step <= state.step][-self.last :])
        kept |= {state.best[0]} if state.best else set()
        for step in self.steps():
            if step not in kept:
                (self.path(step) / MARK).unlink()  # first, so that half a removal is no checkpoint
                shutil.rmtree(self.path(step))

    def newest(self, identity: Mapping[str, Any]) -> tuple[Path, State] | None:
        """The newest complete and undamaged checkpoint; damaged ones are reported and skipped.

        Raises SteelyardError where it was made on other data or with other options, naming both.
        """
        for step in reversed(self.steps()):
            try:
                state = read_state(self.path(step))
            except (FormatError, OSError) as error:
                self.say(f"checkpoint skipped: {error}")
                continue
            _same(self.path(step), state.identity, identity)
            self.latest, self.best = step, state.best
            return self.path(step), state
        return None


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number, from 1 on, of the file that each tensor goes to. The writer makes two copies of a whole file in
    memory, so files are small.
    """
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > FILE_BYTES:
            number, size = number + 1, 0
        size += tensor.nbytes
        numbers[name] = number
    return numbers


def write_tensors(folder: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    """The shards of this rank as safetensors files in `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks of torch on its own interfaces
        writer = HuggingFaceStorageWriter(str(folder), _files(tensors), save_distributed=True)
        save(tensors, storage_writer=writer, no_dist=alone)


def read_tensors(folder: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    """Fill `tensors` in place from a checkpoint of any number of ranks. Raises FormatError naming a misfit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = HuggingFaceStorageReader(str(folder))
        stored = reader.read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            found = stored.get(name)
            if found is None:
                raise FormatError(f"{folder}: tensor {name} {list(tensor.shape)} is missing")
            size = list(getattr(found, "size", ()))
            if size != list(tensor.shape):
                raise FormatError(f"{folder}: tensor {name} is {size}; the model has {list(tensor.shape)}")
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


def read_state(folder: Path) -> State:
    """What `complete.json` says, after every file's digest has been compared. Raises FormatError."""
    mark = folder / MARK
    try:
        raw = json.loads(read_bounded(mark, LIMIT))
        files = dict(raw["files"])
        loss, best = raw["validation_loss"], raw.get("best")
        state = State(
            step=int(raw["step"]),
            identity=dict(raw["identity"]),
            tokens=int(raw["tokens"]),
            random=[str(text) for text in raw["random"]],
            validation_loss=loss,
            compiled=raw.get("compiled"),
            best=None if best is None else (int(best[0]), float(best[1])),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise FormatError(f"{mark}: not readable ({error})") from error
    present = {file.name for file in folder.iterdir()} - {MARK}
    if present != set(files):
        odd = ", ".join(sorted(present ^ set(files)))
        raise FormatError(f"{folder}: files missing or too many: {odd}")
    for name, digest in files.items():
        if sha256_file(folder / name) != digest:
            raise FormatError(f"{folder / name}: damaged: its SHA-256 is not the one in {MARK}")
    return state


def _same(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in sorted({*then, *now}):
        if then.get(key) != now.get(key):
            raise SteelyardError(
                f"{path}: made with {key} = {then.get(key)}, this run has {now.get(key)}: take the same again, or "
                "another folder"
            )


def cause(error: BaseException) -> tuple[str, str]:
    """Why a write failed, and what to do."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full", "make room and run again"
    return str(error), "mend that and run again"


def _said(error: BaseException, target: Path) -> SteelyardError:
    """The user's words for a failed write: torch wraps what the system said."""
    causes: list[BaseException] = [error]
    if isinstance(error, CheckpointException):
        causes += [failure[0] for failure in error.failures.values()]
    system = next((cause for cause in causes if isinstance(cause, OSError)), None)
    why, remedy = cause(system or causes[-1])
    return SteelyardError(f"{target}: checkpoint not written: {why}. Older checkpoints are untouched: {remedy}")

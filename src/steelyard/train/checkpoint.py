"""Checkpoints that are whole or absent: written aside, fsynced, renamed, with a list of their files' digests.

`checkpoints/step-00000500/` holds the masters and the optimizer's moments as torch.distributed.checkpoint writes them
in its safetensors form (each rank its shards; no pickle, so a stranger's checkpoint can do nothing but be wrong), and
`complete.json`: the step, which is the loader's and the schedule's whole state, what the run was made of, random
states, and the SHA-256 of every file. A run of two ranks can go on with one, and the other way round.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
BEST = "best.json"
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
        self.last, self.best = last, best

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are marked complete, oldest first."""
        found = self.folder.glob(f"step-*/{MARK}")
        return sorted(int(mark.parent.name[5:]) for mark in found if mark.parent.name[5:].isdigit())

    def best_step(self) -> tuple[int, float] | None:
        """Step and validation loss of the best checkpoint kept."""
        try:
            raw = json.loads(read_bounded(self.folder / BEST, 10_000))
            return int(raw["step"]), float(raw["validation_loss"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, FormatError) as error:
            raise FormatError(f"{self.folder / BEST}: not readable ({error}): remove it") from error

    def save(self, state: State, tensors: dict[str, Tensor]) -> Path:
        """Write one and remove those no longer kept. On failure (disk full) older ones are as they were."""
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
        if self.ranks.first:
            self._prune(state)
        return target

    def _complete(self, aside: Path, target: Path, state: State) -> None:
        files = {file.name: sha256_file(file) for file in sorted(aside.iterdir())}
        document = {
            "step": state.step,
            "tokens": state.tokens,
            "validation_loss": state.validation_loss,
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
        best = self.best_step()
        if self.best and state.validation_loss is not None and (best is None or state.validation_loss < best[1]):
            best = (state.step, state.validation_loss)
            write_atomic(self.folder / BEST, json.dumps({"step": best[0], "validation_loss": best[1]}).encode())
        kept = set(self.steps()[-self.last :]) | ({best[0]} if best else set())
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
        loss = raw["validation_loss"]
        state = State(
            int(raw["step"]), dict(raw["identity"]), int(raw["tokens"]), [str(text) for text in raw["random"]], loss
        )
    except (ValueError, KeyError, TypeError) as error:
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


def _said(error: BaseException, target: Path) -> SteelyardError:
    """The user's words for a failed write: torch wraps what the system said."""
    causes: list[BaseException] = [error]
    if isinstance(error, CheckpointException):
        causes += [failure[0] for failure in error.failures.values()]
    system = next((cause for cause in causes if isinstance(cause, OSError)), None)
    full = system is not None and system.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "the disk is full" if full else str(system or causes[-1])
    remedy = "make room and run again" if full else "mend that and run again"
    return SteelyardError(f"{target}: checkpoint not written: {why}. Older checkpoints are untouched: {remedy}")

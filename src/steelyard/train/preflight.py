"""What can go wrong is tried before step 1: the longest batch both ways, a checkpoint, the disk, the data."""

from __future__ import annotations

import io
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.train.batch import IGNORE

SAMPLED_STEPS = 16


class ChatCheck(Protocol):
    """What preflight asks of chat data (train/chat_data.py gives one)."""

    @property
    def end_of_turn(self) -> frozenset[int]:
        """Token ids that end an answer: at least one of them must be supervised."""
        ...

    def examples(self, count: int) -> Sequence[Sequence[tuple[str, bool]]]:
        """Rendered samples as pieces of text, each with whether it is supervised."""
        ...


@dataclass(frozen=True)
class DataCheck:
    """Counts over the first steps of an epoch."""

    steps: int
    micro_batches: int
    tokens: int
    supervised: int
    counts: str  # what `supervised` counts: tokens, pairs or labels
    end_of_turn: int | None  # supervised end-of-turn tokens; None: not chat data
    longest: Any  # the micro-batch with the longest document


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch, whatever its kind, by field name."""
    fields = vars(batch) if hasattr(batch, "__dict__") else {}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def lengths_of(batch: Any, tokens: int) -> tuple[int, ...]:
    """Lengths of a batch's documents; of a kind that does not tell, one of all its tokens."""
    lengths = getattr(batch, "lengths", None)
    return tuple(lengths) if lengths else (tokens,)


def check_tokens(batch: Any, vocabulary: int, where: str) -> None:
    """Raises FormatError for a token id, or a target, that the model's vocabulary does not have."""
    for name, tensor in tensors_of(batch).items():
        if ("tokens" not in name and "targets" not in name) or not tensor.numel() or tensor.is_floating_point():
            continue
        low, high = int(tensor.min()), int(tensor.max())
        floor = IGNORE if "targets" in name else 0
        if high >= vocabulary or low < floor:
            raise FormatError(
                f"{where}: token {high if high >= vocabulary else low}, but the model's vocabulary has {vocabulary:,}: "
                "the data were made with another tokenizer"
            )


def check_data(loader: Any, objective: Any, vocabulary: int, chat: ChatCheck | None) -> DataCheck:
    """Read the first steps of an epoch and count.

    Raises SteelyardError for no data, no supervised token, an end of turn that is never supervised, and
    FormatError for tokens beyond the vocabulary.
    """
    if loader.steps_per_epoch < 1:
        raise SteelyardError("the data hold no whole step: fewer tokens than one global batch. Lower the batch size")
    steps = min(SAMPLED_STEPS, loader.steps_per_epoch)
    micro = tokens = supervised = ends = 0
    counts = "tokens"
    longest: tuple[tuple[int, int], Any] | None = None
    for index in range(steps):
        for batch in loader.step(index):
            check_tokens(batch, vocabulary, f"step {index + 1}, samples {list(getattr(batch, 'sample_ids', ()))[:8]}")
            size = objective.tokens(batch)
            key = (max(lengths_of(batch, size)), size)
            if longest is None or key > longest[0]:
                longest = (key, batch)
            micro += 1
            tokens += size
            targets = tensors_of(batch).get("targets")
            if chat is None or targets is None:
                supervised, counts = supervised + objective.count(batch), objective.counts
            else:  # tokens, also where the objective counts pairs
                supervised += int((targets != IGNORE).sum())
                taught = getattr(batch, "chosen_targets", targets)
                ends += int(torch.isin(taught, torch.tensor(sorted(chat.end_of_turn))).sum())
    if longest is None or supervised == 0:
        raise SteelyardError(
            f"no supervised token in the first {steps} steps: nothing would be learned. Check roles and chat template"
        )
    if chat is not None and ends == 0:
        raise SteelyardError(
            f"no end-of-turn token (ids {sorted(chat.end_of_turn)}) is supervised in the first {steps} steps: the "
            "model would never learn to stop. Check the chat template and that answers are not cut (--tokens; of dpo "
            "--max-length)"
        )
    return DataCheck(steps, micro, tokens, supervised, counts, ends if chat is not None else None, longest[1])


def check_disk(folder: Path, checkpoint_bytes: int, kept: int) -> tuple[int, int]:
    """Bytes that the run's checkpoints need at once (one more is written before the oldest goes), and bytes free.

    Raises SteelyardError where they do not fit.
    """
    need, free = checkpoint_bytes * (kept + 1), shutil.disk_usage(folder).free
    if need > free:
        raise SteelyardError(
            f"{folder}: checkpoints need {need / 1e9:.2f} GB ({kept} kept and one being written, "
            f"{checkpoint_bytes / 1e9:.2f} GB each), {free / 1e9:.2f} GB are free: make room or lower keep_last"
        )
    return need, free


def try_step(step: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """Run forward and backward twice (the first may compile): seconds of the second, and the process's peak bytes.

    Raises SteelyardError naming the remedy where memory runs out.
    """
    try:
        step()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise SteelyardError(
            "out of memory at the longest micro-batch: lower tokens_per_micro_batch (--tokens; of pretrain --rows; of "
            "dpo raise --micro-batches), or set activation_checkpointing"
        ) from error
    return seconds, peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU as allocated by torch, or of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def try_save(folder: Path, write: Callable[[Path], None]) -> tuple[float, int]:
    """Write a checkpoint's tensors to `folder` and remove them: seconds, and bytes on disk."""
    place = Path(tempfile.mkdtemp(dir=folder, prefix=".preflight."))
    try:
        start = time.perf_counter()
        write(place)
        size = sum(file.stat().st_size for file in place.iterdir())
        for file in place.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        return time.perf_counter() - start, size
    except OSError as error:
        raise SteelyardError(f"{folder}: a checkpoint cannot be written here: {error.strerror or error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def show_examples(examples: Sequence[Sequence[tuple[str, bool]]], *, colour: bool) -> str:
    """Rendered samples for the terminal: what is masked is grey (without colour: between guillemets)."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=colour, width=110, highlight=False)
    for number, pieces in enumerate(examples, start=1):
        text = Text(f"example {number}: ", style="bold")
        for piece, supervised in pieces:
            shown = piece if supervised or colour else f"«{piece}»"
            text.append(shown, style="" if supervised else "grey50")
        console.print(text)
    return out.getvalue().rstrip("\n")

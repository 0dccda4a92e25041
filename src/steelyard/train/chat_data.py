"""Conversations as training data: rendered by `model/chat.py`, packed whole, answers and their ends alone taught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Progress, Silent
from steelyard.model.chat import Renderer
from steelyard.train.conversations import Conversation
from steelyard.train.packing import BestFit


@dataclass(frozen=True)
class Supervision:
    """What a set of conversations teaches, in tokens: for the preflight.

    `answers` counts the assistant's turns, `ends` those of them whose last taught token ends the turn. `cut` counts
    conversations cut at the greatest length, `dropped` those left out because nothing to learn was before the cut.
    """

    conversations: int
    tokens: int
    taught: int
    answers: int
    ends: int
    cut: int
    dropped: int


@dataclass(frozen=True)
class RenderedExample:
    """A conversation as the model gets it: pieces of text, each with whether it is taught."""

    pieces: tuple[tuple[str, bool], ...]


class ChatSamples:
    """Rendered conversations (`packing.Samples`)."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        renderer: Renderer,
        max_length: int,
        progress: Progress | None = None,
    ) -> None:
        """Render every conversation; `max_length` in tokens. Raises SteelyardError naming the conversation (from 1)
        that the template refuses, or where no conversation teaches anything.
        """
        self.renderer = renderer
        ids: list[npt.NDArray[np.int32]] = []
        masks: list[npt.NDArray[np.bool_]] = []
        answers = ends = cut = dropped = 0
        progress = progress or Silent()
        with progress.task("render conversations", len(conversations), "conversations") as task:
            for number, conversation in enumerate(conversations, 1):
                try:
                    tokens, taught = renderer.training_tokens(conversation.messages)
                except SteelyardError as error:
                    raise SteelyardError(f"conversation {number}: {error}") from error
                task.advance()
                long = len(tokens) > max_length
                mask = np.array(taught[:max_length], dtype=np.bool_)
                if not mask[1:].any():
                    dropped += 1
                    continue
                cut += long
                row = np.array(tokens[:max_length], dtype=np.int32)
                last = np.flatnonzero(mask & ~np.append(mask[1:], False))
                answers += len(last)
                ends += sum(int(token) in renderer.tokenizer.eos_ids for token in row[last])
                ids.append(row)
                masks.append(mask)
        if not ids:
            raise SteelyardError(
                f"none of {len(conversations):,} conversations teaches a token within {max_length:,}: raise max_length "
                "(--tokens, in a recipe tokens_per_micro_batch)"
            )
        self._ids, self._mask = np.concatenate(ids), np.concatenate(masks)
        self.lengths: npt.NDArray[np.int64] = np.array([len(row) for row in ids], dtype=np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        # The first token of a conversation is nobody's to predict.
        taught_count = int(self._mask.sum() - self._mask[self._starts].sum())
        self.supervision = Supervision(len(ids), len(self._ids), taught_count, answers, ends, cut, dropped)
        self.digest = sha256_hex(
            b"".join(array.tobytes() for array in (self.lengths, self._ids.astype("<i4"), self._mask))
        )

    def tokens(self, sample: int, start: int, end: int) -> npt.NDArray[np.int64]:
        first = int(self._starts[sample])
        return self._ids[first + start : first + end].astype(np.int64)

    def taught(self, sample: int, start: int, end: int) -> npt.NDArray[np.bool_]:
        first = int(self._starts[sample])
        return self._mask[first + start : first + end]

    def example(self, sample: int) -> RenderedExample:
        """A sample's text, special tokens written out."""
        length = int(self.lengths[sample])
        tokens, taught = self.tokens(sample, 0, length), self.taught(sample, 0, length)
        cuts = [0, *(np.flatnonzero(np.diff(taught)) + 1).tolist(), length]
        decode = self.renderer.tokenizer.decode
        return RenderedExample(
            tuple(
                (decode(tokens[start:end].tolist(), skip_special=False), bool(taught[start]))
                for start, end in pairwise(cuts)
            )
        )


class ChatLoader(BestFit):
    """Packed conversations: `Loader[Batch]`, with what a preflight shows."""

    def __init__(
        self,
        samples: ChatSamples,
        *,
        tokens_per_micro_batch: int,
        micro_batches_per_step: int,
        max_length: int,
        seed: int,
        endless: bool = True,
    ) -> None:
        self.samples = samples
        super().__init__(
            samples,
            tokens_per_micro_batch=tokens_per_micro_batch,
            micro_batches_per_step=micro_batches_per_step,
            max_length=max_length,
            seed=seed,
            endless=endless,
        )

    @property
    def supervision(self) -> Supervision:
        return self.samples.supervision

    def examples(self, count: int = 3) -> list[RenderedExample]:
        """The first conversations, as the model gets them."""
        return [self.samples.example(number) for number in range(min(count, len(self.samples.lengths)))]


def chat_loader(
    conversations: Sequence[Conversation],
    renderer: Renderer,
    *,
    tokens_per_micro_batch: int,
    micro_batches_per_step: int,
    seed: int,
    max_length: int,
    endless: bool = True,
    progress: Progress | None = None,
) -> ChatLoader:
    """Conversations, rendered and best-fit packed (`endless` False: for validation, see `BestFit`).

    Raises UsageError for sizes that cannot be, SteelyardError for what the template refuses and where nothing is
    taught.
    """
    if not 2 <= max_length <= tokens_per_micro_batch:
        raise UsageError(
            f"max_length is {max_length}: must be from 2 to tokens_per_micro_batch ({tokens_per_micro_batch})"
        )
    return ChatLoader(
        ChatSamples(conversations, renderer, max_length, progress),
        tokens_per_micro_batch=tokens_per_micro_batch,
        micro_batches_per_step=micro_batches_per_step,
        max_length=max_length,
        seed=seed,
        endless=endless,
    )

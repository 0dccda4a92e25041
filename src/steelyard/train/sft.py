"""Supervised fine-tuning on conversations: a model folder in, a tuned model folder out.

Only the tokens of the assistant's answers, with the token that ends each, are learned from; loss and gradient are those
of next-token cross-entropy over them (`losses.CrossEntropy`).

    >>> result = fine_tune(Path("smollm2"), read_conversations("chats.jsonl"), Path("mine"), work=Path("mine.work"),
    ...                    options=TrainOptions(epochs=2, learning_rate=2e-5), progress=default_progress())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Progress
from steelyard.model.chat import Renderer
from steelyard.model.headers import read_json_object
from steelyard.model.llama import Llama, LlamaConfig
from steelyard.train.chat_data import ChatLoader, Supervision, chat_loader
from steelyard.train.conversations import Conversation
from steelyard.train.loop import TrainOptions, TrainResult, train
from steelyard.train.lora import add_lora
from steelyard.train.losses import CrossEntropy
from steelyard.train.pairs import PairCounts
from steelyard.train.tuning import FULL, Tuning, export_tuned, first_rank, open_for_tuning


@dataclass(frozen=True)
class Packing:
    """How much is read at once: tokens of a micro-batch, micro-batches of a step, the longest sample in tokens."""

    tokens_per_micro_batch: int = 2048
    micro_batches_per_step: int = 1
    max_length: int | None = None  # None: as much as a micro-batch holds and the model has positions for

    def longest(self, positions: int) -> int:
        """The longest sample for a model of `positions` positions. Raises UsageError where it can't be."""
        limit = min(self.tokens_per_micro_batch, positions)
        if self.max_length is None:
            return limit
        if not 2 <= self.max_length <= limit:
            raise UsageError(
                f"max_length {self.max_length}: must be from 2 to {limit}, the smaller of tokens_per_micro_batch "
                f"({self.tokens_per_micro_batch}) and the model's positions ({positions})"
            )
        return self.max_length

    def remedy(self, positions: int) -> str:
        """What lets longer samples stay whole."""
        if self.max_length is not None:
            return "raise max_length"
        if self.tokens_per_micro_batch < positions:
            return "raise --tokens (in a recipe tokens_per_micro_batch) to keep them whole"
        return "the model has no more positions"


PACKING = Packing()


@dataclass(frozen=True)
class Tuned(TrainResult):
    """What a finished run did, and what became of its data."""

    data: Supervision | PairCounts


def fine_tune(
    model_folder: Path,
    conversations: Sequence[Conversation],
    out: Path,
    *,
    work: Path,
    options: TrainOptions,
    tuning: Tuning = FULL,
    packing: Packing = PACKING,
    validation: Sequence[Conversation] = (),
    adapter: Path | None = None,
    progress: Progress,
) -> Tuned:
    """Tune the model of `model_folder` on `conversations` and write the result as the model folder `out`.

    `work` holds checkpoints and metrics: the same call goes on from there after an interruption. Where `tuning` asks
    for LoRA, the adapters are merged into `out` and also saved in the folder `adapter` where it is named. Raises
    SteelyardError where `out` or `adapter` exists, UsageError for no conversations, and what loading, rendering
    and training raise.
    """
    check_outputs(out, adapter, tuning)
    if not conversations:
        raise UsageError("no conversations: nothing to learn from")
    model = open_for_tuning(model_folder, tuning, options.dtype)
    renderer = Renderer(model_folder)
    longest = packing.longest(model.config.max_position_embeddings)

    def load(name: str, of: Sequence[Conversation], *, endless: bool) -> ChatLoader:
        loader = chat_loader(
            of,
            renderer,
            tokens_per_micro_batch=packing.tokens_per_micro_batch,
            micro_batches_per_step=packing.micro_batches_per_step,
            seed=options.seed,
            max_length=longest,
            endless=endless,
            progress=progress,
        )
        found = loader.supervision
        left = packing.remedy(model.config.max_position_embeddings) if found.cut or found.dropped else ""
        progress.say(
            f"{name}{found.conversations:,} conversations with {found.answers:,} answers, {found.ends:,} of which keep "
            f"their end of turn; {found.cut:,} cut at {longest:,} tokens (the last answer may lose its end), "
            f"{found.dropped:,} left out (no answer within them)" + (f": {left}" if left else "")
        )
        return loader

    loader = load("", conversations, endless=True)
    shown = Shown(loader, renderer.tokenizer.eos_ids)
    held_out = load("validation: ", validation, endless=False) if validation else None
    result = train(model, loader, CrossEntropy(), options, work, validation=held_out, chat=shown, progress=progress)
    if first_rank():
        export_tuned(model, model_folder, out, adapter=adapter)
    return Tuned(**vars(result), data=loader.supervision)


class Shown:
    """What preflight asks of chat data (`loop.ChatCheck`), of the conversations in a loader."""

    def __init__(self, loader: ChatLoader, end_of_turn: frozenset[int]) -> None:
        self._loader, self.end_of_turn = loader, end_of_turn

    def examples(self, count: int) -> list[tuple[tuple[str, bool], ...]]:
        return [example.pieces for example in self._loader.examples(count)]


def check_outputs(out: Path, adapter: Path | None, tuning: Tuning) -> None:
    """Raises, before hours of training and not after, where what is to be written can't be."""
    for folder in (out, adapter):
        if folder is not None and (folder.exists() or folder.is_symlink()):
            raise SteelyardError(f"{folder} exists already: remove it or choose another place")
    if adapter is not None and not tuning.lora_rank:
        raise UsageError(
            f"{adapter}: full weights are tuned, so there is no adapter to save: set a LoRA rank (--lora-rank)"
        )


def check_tuning(model_folder: Path, tuning: Tuning, packing: Packing = PACKING) -> None:
    """Raises, without loading a weight, for layers and adapters that the model cannot have and samples that it cannot
    hold.
    """
    source = model_folder / "config.json"
    config = LlamaConfig.from_dict(read_json_object(source), str(source))
    packing.longest(config.max_position_embeddings)
    layers = config.num_hidden_layers
    if not 0 <= tuning.first_layer < layers:
        raise UsageError(f"first_layer (--first-layer) {tuning.first_layer}: {source} has layers 0 to {layers - 1}")
    if tuning.lora_rank:
        with torch.device("meta"):
            model = Llama(config)
        learning = range(tuning.first_layer, layers)
        add_lora(model, tuning.lora_rank, tuning.lora_alpha, tuning.lora_targets, learning, tuning.seed)

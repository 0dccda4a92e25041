"""DPO of a real model on real pairs: `steelyard.train.loop.train` with `dpo.DPO` beside TRL's DPOTrainer.

Both compute the reference's log-probabilities of a step's pairs within the time measured. Tokens are those of prompt
and answer, for the chosen and the rejected one, without padding, on both sides, though ours reads each prompt once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from train_data import LONGEST, STEPS, Turns, preferences
from train_data import unavailable as unavailable_data

from steelyard.base.progress import Silent
from steelyard.model.chat import Renderer
from steelyard.train.pairs import Pair, PairBatch, assemble_pairs, render_pairs

BAR = 1.5
PEER = "TRL DPOTrainer, bf16 autocast, fused AdamW"
RATE = 1e-6
BATCH = 4  # pairs of an update


def unavailable(model: str) -> str:
    """Why the benchmark can't run here; '' where it can."""
    from importlib.util import find_spec

    return unavailable_data(model) or ("" if find_spec("trl") else "trl is not installed: make test does")


def rendered(model: str, steps: int) -> list[Pair]:
    pairs, counts = render_pairs(preferences(steps * BATCH + 64), Renderer(Path(model)), LONGEST, Silent())
    assert counts.pairs >= steps * BATCH
    assert all(pair.chosen_start == pair.rejected_start == 0 for pair in pairs)  # else the rival needs longer prompts
    return pairs[: steps * BATCH]


def size(pair: Pair) -> int:
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def peer(rounds: Any, model: str) -> None:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    pairs = rendered(model, rounds.count * STEPS)
    rows = [
        {"prompt_ids": p.prompt.tolist(), "chosen_ids": p.chosen.tolist(), "rejected_ids": p.rejected.tolist()}
        for p in pairs
    ]

    class Rows(trl.DPOTrainer):  # type: ignore[misc,name-defined]
        def _prepare_dataset(self, *_args: Any, **_settings: Any) -> Any:
            return Dataset.from_list(rows)  # rendered as ours are

        def _get_train_sampler(self, *_args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
            if state.global_step % STEPS == 0:
                rounds.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
            if state.global_step % STEPS == 0:
                end = state.global_step * BATCH
                rounds.end(sum(size(pair) for pair in pairs[end - STEPS * BATCH : end]))

    with tempfile.TemporaryDirectory() as folder:
        args = trl.DPOConfig(
            output_dir=folder, use_cpu=True, bf16=True, report_to="none", per_device_train_batch_size=BATCH,
            gradient_checkpointing=False, learning_rate=RATE, max_steps=rounds.count * STEPS, max_length=None,
            save_strategy="no", disable_tqdm=True, logging_steps=STEPS, optim="adamw_torch_fused", beta=0.1,
        )  # fmt: skip
        rival = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        dummy = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = Rows(
            model=rival,
            args=args,
            train_dataset=dummy,
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[Clock()],
        )
        trainer.train()


class _Data:
    """The same pairs in the same order; the reference of a round's pairs is computed as the round begins."""

    digest = "benchmark"

    def __init__(self, pairs: list[Pair], turns: Turns, reference: Any, model: Any) -> None:
        self.pairs, self.turns, self.reference, self.model = pairs, turns, reference, model
        self.steps_per_epoch = len(pairs) // BATCH

    def step(self, index: int) -> Sequence[PairBatch]:
        from steelyard.train.dpo import reference_log_probs

        if self.turns.begin(index):
            mine = slice(index * BATCH, (index + STEPS) * BATCH)
            self.reference[mine] = reference_log_probs(self.model, self.pairs[mine], progress=Silent())
        return [assemble_pairs(self.pairs, range(index * BATCH, (index + 1) * BATCH))]


def ours(rounds: Any, model: str) -> None:
    from steelyard.model.llama import load_llama
    from steelyard.train.dpo import DPO, DPOOptions
    from steelyard.train.loop import TrainOptions, train
    from steelyard.train.tuning import FULL, open_for_tuning

    pairs = rendered(model, rounds.count * STEPS + 1)  # with the last step comes the checkpoint: not measured
    sizes = [sum(size(pair) for pair in pairs[start : start + BATCH]) for start in range(0, len(pairs), BATCH)]
    turns = Turns(rounds, sizes)
    reference = torch.zeros(len(pairs), 2)
    data = _Data(pairs, turns, reference, load_llama(Path(model), dtype=torch.bfloat16))
    options = TrainOptions(steps=len(sizes), learning_rate=RATE, weight_decay=0.0, checkpoint_every=0)
    with tempfile.TemporaryDirectory() as folder:
        opened = open_for_tuning(Path(model), FULL, "bfloat16")
        train(opened, data, DPO(DPOOptions(), reference), options, Path(folder), progress=turns)

"""The training loop: accumulate, divide once, clip, step; measure, validate, checkpoint; resume by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from steelyard.base.canonical import digest
from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Progress, Silent
from steelyard.model.llama import Llama
from steelyard.train.batch import Loader
from steelyard.train.checkpoint import Checkpoints, State, random_state, read_tensors, set_random_state, write_tensors
from steelyard.train.distributed import Ranks, ranks
from steelyard.train.guard import Interrupted, StopRequest, folder_lock
from steelyard.train.lora import adapters
from steelyard.train.losses import Objective, tensors_digest
from steelyard.train.metrics import Metrics, read_metrics
from steelyard.train.optimizer import AdamW, clip_
from steelyard.train.options import TrainOptions, TrainResult
from steelyard.train.preflight import (
    ChatCheck,
    DataCheck,
    check_data,
    check_disk,
    check_tokens,
    lengths_of,
    show_examples,
    tensors_of,
    try_save,
    try_step,
)
from steelyard.train.report import write_report
from steelyard.train.schedule import learning_rate
from steelyard.train.speed import compile_blocks, compute_dtype, matrix_rate, reuse_memory, step_operations
from steelyard.train.weights import LocalWeights, ShardedWeights, Weights, named_masters

__all__ = ["ChatCheck", "Interrupted", "TrainOptions", "TrainResult", "train"]

B = TypeVar("B")

# Options that decide the trajectory: a checkpoint made with others is refused.
_DECISIVE = (
    "learning_rate", "min_lr", "schedule", "warmup", "decay", "eps", "weight_decay", "clip", "dtype", "seed"
)  # fmt: skip


def train(
    model: Llama,
    loader: Loader[B],
    objective: Objective[B],
    options: TrainOptions,
    folder: Path,
    *,
    validation: Loader[B] | None = None,
    chat: ChatCheck | None = None,
    progress: Progress,
) -> TrainResult:
    """Train the parameters of `model` that have requires_grad, in place; they become float32.

    Resumes from the newest complete checkpoint in `folder/checkpoints`; `model` must then be as it was at the run's
    start. Metrics go to `folder/metrics.jsonl` and `folder/tensorboard`. Under torchrun every rank calls it alike.

    Raises UsageError for options that contradict themselves; SteelyardError where preflight finds that the run
    cannot succeed, on a loss (also a validation loss) or gradient that is not finite (the last good checkpoint stays),
    on a full disk, and where the folder is in use or holds a checkpoint of another run; Interrupted after SIGINT or
    SIGTERM.
    """
    steps = options.total_steps(loader.steps_per_epoch)
    with ranks() as group:
        say = progress.say if group.first else _silent
        with contextlib.ExitStack() as stack:
            refused: SteelyardError | None = None
            try:
                if group.first:
                    stack.enter_context(folder_lock(folder))
            except (SteelyardError, OSError) as error:
                refused = error if isinstance(error, SteelyardError) else SteelyardError(f"{folder}: {error}")
            group.together(refused)
            run = _Run(model, loader, objective, options, folder, validation, group, steps, say)
            run.prepare(chat)
            return run.go(progress if group.first else Silent(), model)


def _silent(_text: str) -> None:
    return None


class _Run(Generic[B]):
    """One process's part of a run."""

    def __init__(
        self,
        model: Llama,
        loader: Loader[B],
        objective: Objective[B],
        options: TrainOptions,
        folder: Path,
        validation: Loader[B] | None,
        group: Ranks,
        steps: int,
        say: Callable[[str], None],
    ) -> None:
        dtype = compute_dtype(options.dtype, group.device)
        options = dataclasses.replace(options, dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
        self.loader, self.objective, self.options, self.validation = loader, objective, options, validation
        self.folder, self.group, self.steps, self.say = folder, group, steps, say
        reuse_memory()
        floor = options.learning_rate / 10 if options.min_lr is None else options.min_lr
        self.rate = learning_rate(options.schedule, options.learning_rate, floor, options.warmup, steps, options.decay)
        # one rank's word, so that all refuse or none does
        self.identity = group.share(self._identity(model) if group.first else None)
        model.activation_checkpointing = options.activation_checkpointing
        self.weights: Weights = (
            LocalWeights(model, dtype, group.device) if group.world == 1 else ShardedWeights(model, dtype, group)
        )
        self.compute = self.weights.compute.train()
        self.optimizer = AdamW(self.weights.slabs, options.betas, options.eps, options.weight_decay)
        self.checkpoints = Checkpoints(folder, group, say, last=options.keep_last, best=options.keep_best)
        self.matrix_rate = matrix_rate(dtype, group.device)
        self.stop = StopRequest()
        self.start = self.tokens = 0
        self.operations = 0.0
        self.validation_loss: float | None = None
        self.compiled: bool | None = None
        torch.manual_seed(options.seed + group.rank)

    def _identity(self, model: Llama) -> dict[str, Any]:
        """What must be the same for a checkpoint to be of this run; `model` as it was given."""
        shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        alphas = {name: float(adapted.alpha) for name, adapted in adapters(model)}
        return {
            "data": self.loader.digest,
            "model": digest({"learning": shapes, "config": repr(model.config), "adapters": alphas}),
            "lora_alpha": sorted(set(alphas.values())),
            "starting_weights": tensors_digest(dict(model.named_parameters())),
            "objective": self.objective.name,
            **{f"{self.objective.name} {name}": value for name, value in self.objective.settings.items()},
            "steps": self.steps,
            **{name: getattr(self.options, name) for name in _DECISIVE},
            "betas": list(self.options.betas),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name, sharing memory with what is trained."""
        masters = {f"master.{name}": part for name, part in named_masters(self.weights).items()}
        return masters | self.optimizer.named()

    # -- before step 1 -----------------------------------------------------------------------------------------------

    def prepare(self, chat: ChatCheck | None) -> None:
        """Preflight, then the state of the newest checkpoint where there is one."""
        data = check_data(self.loader, self.objective, self.compute.config.vocab_size, chat)
        per_step = data.tokens / data.steps
        lengths = lengths_of(data.longest, self.objective.tokens(data.longest))
        longest = step_operations(self.compute, sum(lengths), lengths)
        operations = longest * (per_step / sum(lengths)) * self.steps
        found = self.checkpoints.newest(self.identity)
        if found is None or found[1].step < self.steps:
            said = "not compiled on several ranks"
            if self.group.world == 1:
                before = found[1].compiled if found is not None else None
                self.compiled, said = compile_blocks(self.compute, self.options.compile, operations, before)
            self.say(f"preflight: {said}")
        if found is not None:
            path, state = found
            read_tensors(path, self.tensors(), alone=self.group.world == 1)
            self.weights.refresh()
            self.start, self.tokens, self.optimizer.steps = state.step, state.tokens, state.step
            self.validation_loss = state.validation_loss
            if len(state.random) == self.group.world:
                set_random_state(state.random[self.group.rank])
            self.say(f"going on from {path} (step {state.step} of {self.steps})")
            return
        self._preflight(data, chat)

    def _preflight(self, data: DataCheck, chat: ChatCheck | None) -> None:
        epoch = data.tokens / data.steps * self.loader.steps_per_epoch
        text = f"preflight: about {epoch:,.0f} tokens an epoch in {self.loader.steps_per_epoch:,} steps"
        if data.counts == "tokens":
            share = data.supervised / data.tokens
            self.say(f"{text}, {share:.1%} of them supervised (counted over {data.steps} steps)")
        else:
            self.say(f"{text}; {data.supervised:,} {data.counts} in {data.steps} steps")
        if chat is not None:
            self.say(f"preflight: {data.end_of_turn:,} supervised end-of-turn tokens in those steps; three examples:")
            self.say(show_examples(chat.examples(3), colour=sys.stderr.isatty()))

        def attempt() -> None:
            self.weights.last(True)
            self.objective.loss(self.compute, self._moved(data.longest)).total.backward()  # type: ignore[no-untyped-call]

        seconds, peak = try_step(attempt, self.group.device)
        self.weights.zero()
        sizes = self.tensors()
        kept = self.options.keep_last + self.options.keep_best
        failed: BaseException | None = None
        wrote = 0.0
        try:
            if self.group.world == 1:
                wrote, size = try_save(self.folder, lambda place: write_tensors(place, sizes, alone=True))
            else:
                size = sum(tensor.numel() * tensor.element_size() for tensor in sizes.values())
            need, free = check_disk(self.folder, size, kept)
        except SteelyardError as error:
            failed = error
        self.group.together(failed)
        micro = data.micro_batches / data.steps / self.group.world
        total = seconds * micro * self.steps
        self.say(
            f"preflight: longest micro-batch {seconds:.2f} s forward and backward; about {duration(total)} for "
            f"{self.steps:,} steps; peak memory so far {peak / 1e9:.2f} GB"
        )
        self.say(
            f"preflight: a checkpoint is {size / 1e6:,.1f} MB, written in {wrote:.2f} s; {need / 1e9:.2f} GB of "
            f"{free / 1e9:.2f} GB free needed"
        )

    # -- one step ----------------------------------------------------------------------------------------------------

    def _moved(self, batch: B) -> B:
        device = self.group.device
        if device.type == "cpu":
            return batch
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors_of(batch).items()}
        return dataclasses.replace(batch, **moved)  # type: ignore[type-var]

    def _mine(self, batches: Sequence[B]) -> Iterator[tuple[int, B, bool]]:
        """This rank's micro-batches: index, batch, whether it counts. All ranks get equally many, as collectives
        need; the surplus ones do not count.
        """
        rank, world = self.group.rank, self.group.world
        for turn in range(math.ceil(len(batches) / world)):
            index = turn * world + rank
            counts = index < len(batches)
            index = index if counts else 0
            yield index, self._moved(batches[index]), counts

    def _accumulate(self, index: int, batches: Sequence[B], count: int) -> tuple[list[float], dict[str, float], bool]:
        """Forward and backward of a global step: each micro-batch's loss sum, metrics' sums, whether to stop."""
        world, vocabulary = self.group.world, self.compute.config.vocab_size
        losses = torch.zeros(len(batches), dtype=torch.float64, device=self.group.device)
        sums: dict[str, Tensor] = {}
        operations = 0.0
        mine = list(self._mine(batches))
        for turn, (position, batch, counts) in enumerate(mine):
            check_tokens(batch, vocabulary, f"step {index + 1}, {_samples(batch)}")
            self.weights.last(turn == len(mine) - 1)
            found = self.objective.loss(self.compute, batch)
            # FSDP averages over ranks, so each multiplies by their number; then it is one division by the whole step
            (found.total * (world / count if counts else 0.0)).backward()  # type: ignore[no-untyped-call]
            if counts:
                losses[position] = found.total.detach()
                operations += found.operations
                for name, value in found.metrics.items():
                    sums[name] = sums.get(name, torch.zeros_like(losses[0])) + torch.as_tensor(value).detach()
        names = sorted(sums)
        ends = losses.new_tensor([float(bool(self.stop.name)), operations])
        gathered = self.group.total(torch.stack([*losses.unbind(), *(sums[name] for name in names), *ends])).tolist()
        *values, stopped, self.operations = gathered[len(batches) :]
        return gathered[: len(batches)], dict(zip(names, values, strict=True)), stopped > 0

    def _update(self, index: int) -> tuple[dict[str, float], int, bool]:
        """Global step `index`: its record, tokens processed, whether to stop after it."""
        batches = self.loader.step(index)
        count = sum(self.objective.count(batch) for batch in batches)
        if count == 0:
            raise SteelyardError(f"step {index + 1} has no supervised token: nothing to divide its loss by")
        self.weights.zero()
        losses, sums, stop = self._accumulate(index, batches, count)
        bad = [i for i, value in enumerate(losses) if not math.isfinite(value)]
        norm = clip_(self.weights.slabs, self.options.clip, self.group.total if self.group.world > 1 else _alone)
        if bad or not math.isfinite(norm):
            self._not_finite(index, "loss" if bad else "gradient", [batches[i] for i in bad] or batches)
        rate = self.rate(index)
        self.optimizer.step(rate)
        self.weights.refresh()
        tokens = sum(self.objective.tokens(batch) for batch in batches)
        means = {name: value / count for name, value in sums.items()}
        return {"loss": sum(losses) / count, **means, "grad_norm": norm, "learning_rate": rate}, tokens, stop

    def _last_good(self) -> str:
        latest = self.checkpoints.latest
        good = f"the last good checkpoint is {self.checkpoints.path(latest or 0)}"
        return "there is no checkpoint" if latest is None else good

    def _not_finite(self, index: int, what: str, batches: Sequence[B]) -> None:
        samples = "; ".join(_samples(batch) for batch in batches[:8])
        raise SteelyardError(
            f"step {index + 1}: the {what} is not finite, in {samples}; stopped, {self._last_good()}. Look at those "
            "samples, or lower learning_rate"
        )

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean loss per valid token (pair, label) over the validation data."""
        assert self.validation is not None
        steps = min(self.validation.steps_per_epoch, self.options.evaluate_steps or self.validation.steps_per_epoch)
        total = torch.zeros((), dtype=torch.float64, device=self.group.device)
        count = 0
        self.compute.eval()
        for index in range(steps):
            batches = self.validation.step(index)
            count += sum(self.objective.count(batch) for batch in batches)
            for _, batch, counts in self._mine(batches):
                loss = self.objective.loss(self.compute, batch).total
                if counts:
                    total += loss
        self.compute.train()
        if count == 0:
            raise SteelyardError("the validation data hold no supervised token")
        return float(self.group.total(total)) / count

    # -- the whole run -----------------------------------------------------------------------------------------------

    def go(self, progress: Progress, model: Llama) -> TrainResult:
        """From the step that is reached to the last one."""
        metrics = self._open_metrics()
        began, first_tokens, loss, done_operations = time.perf_counter(), self.tokens, math.nan, 0.0
        if self.start == self.steps and metrics is not None:
            loss = next((r["loss"] for r in reversed(read_metrics(self.folder)) if "loss" in r), math.nan)
        path, device = self.checkpoints.path(self.start), self.group.device
        with self.stop, progress.task("training", self.steps, "steps", done=self.start) as task:
            for index in range(self.start, self.steps):
                before = time.perf_counter()
                record, tokens, stop = self._update(index)
                seconds = time.perf_counter() - before
                self.tokens += tokens
                done, last = index + 1, index + 1 == self.steps
                done_operations += self.operations
                loss = record["loss"]
                record |= {
                    "tokens": self.tokens,
                    "tokens_per_second": tokens / seconds,
                    "mfu": self._mfu(self.operations, seconds),
                    "seconds": time.perf_counter() - began,
                }
                record["seconds_left"] = record["seconds"] / (done - self.start) * (self.steps - done)
                evaluated = self.validation is not None and (last or _due(done, self.options.evaluate_every))
                improved = False
                if evaluated:
                    record["validation_loss"] = self.validation_loss = self._evaluate()
                    if not math.isfinite(self.validation_loss):
                        raise SteelyardError(
                            f"step {done}: the validation loss is not finite; stopped, {self._last_good()}. Look at "
                            "the validation data, or lower learning_rate"
                        )
                    improved = self.checkpoints.improves(self.validation_loss)
                failed = _write(metrics, done, record)
                # every rank must know: a checkpoint is written by all of them
                broken = bool(self.group.total(torch.tensor(failed is not None, dtype=torch.float32, device=device)))
                if last or stop or improved or broken or _due(done, self.options.checkpoint_every):
                    random = self.group.gather(random_state())
                    measured = self.validation_loss if evaluated else None
                    state = State(done, self.identity, self.tokens, random, measured, self.compiled)
                    try:
                        path = self.checkpoints.save(state, self.tensors())
                    except SteelyardError as error:
                        raise error if failed is None else SteelyardError(f"{failed}. {error}") from error
                if broken:
                    if metrics is not None:  # where the checkpoint left room, the record is completed
                        with contextlib.suppress(SteelyardError):
                            metrics.close()
                    self.group.together(failed and SteelyardError(f"{failed}. Saved as {path} after step {done}"))
                task.advance(
                    1,
                    note=f"loss {loss:.4f}, gradient {record['grad_norm']:.3g}, "
                    f"{record['tokens_per_second']:,.0f} tokens/s, MFU {record['mfu']:.0%}",
                )
                if stop and not last:
                    raise Interrupted(f"stopped by {self.stop.name or 'a signal'} after step {done}; saved as {path}")
        if metrics is not None:
            metrics.close()
        seconds = time.perf_counter() - began
        best = self._take_best() if self.options.keep_best else None
        self.weights.finish(model)
        if self.group.first:
            try:
                write_report(self.folder)
            except OSError as error:  # it can be made again from the metrics; the weights are what counts
                self.say(f"{self.folder}: report not written: {error}")
        return TrainResult(
            steps=self.steps,
            tokens=self.tokens,
            loss=loss,
            validation_loss=self.validation_loss,
            best_step=best,
            seconds=seconds,
            tokens_per_second=(self.tokens - first_tokens) / seconds,
            mfu=self._mfu(done_operations, seconds),
            folder=self.folder,
            checkpoint=path,
        )

    def _open_metrics(self) -> Metrics | None:
        found, failed = None, None
        try:
            if self.group.first:
                found = Metrics(self.folder, self.start)
        except SteelyardError as error:
            failed = error
        self.group.together(failed)
        return found

    def _take_best(self) -> int | None:
        """Put the best weights in place of the last; returns their step. Damaged ones leave the last (None)."""
        best = self.checkpoints.best
        if best is None or best[0] == self.steps:
            return best and best[0]
        said = f"the best weights are those of step {best[0]} (validation loss {best[1]:.4f})"
        trouble = self.group.share(self.checkpoints.trouble(best[0]) if self.group.first else "")
        if trouble:
            self.say(f"{said}, but {trouble}: the last ones are taken instead")
            return None
        masters = {f"master.{name}": part for name, part in named_masters(self.weights).items()}
        read_tensors(self.checkpoints.path(best[0]), masters, alone=self.group.world == 1)
        self.validation_loss = best[1]
        self.say(f"{said}: taken")
        return best[0]

    def _mfu(self, operations: float, seconds: float) -> float:
        return operations / seconds / (self.matrix_rate * self.group.world)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _write(metrics: Metrics | None, step: int, record: dict[str, float]) -> SteelyardError | None:
    """Write a record; returns what prevented it."""
    try:
        if metrics is not None:
            metrics.write(step, record)
    except SteelyardError as error:
        return error
    return None


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _samples(batch: object) -> str:
    ids = list(getattr(batch, "sample_ids", ()))
    return f"samples {ids[:32]}" + (f" and {len(ids) - 32} more" if len(ids) > 32 else "")


def duration(seconds: float) -> str:
    """For people: `42 s`, `7 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

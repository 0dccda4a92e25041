"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7), in sigmoid form.

With r(y) = log p(y | x) - log p_reference(y | x), a pair's loss is
    -(1 - e) log sigmoid(beta (r(chosen) - r(rejected))) - e log sigmoid(-beta (r(chosen) - r(rejected))),
e being the label smoothing of conservative DPO (Mitchell 2023). `length_normalised` divides r by the answer's tokens
(Lambert et al. 2024, Tulu 3, arXiv:2411.15124, section 5.1.2); `sft_weight` adds that much of the mean negative
log-likelihood of the chosen answer's tokens (Pang et al. 2024, arXiv:2404.19733, equation 1).

The reference log-probabilities are computed once, before the first step, and cached beside the checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from steelyard.base.canonical import digest
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import write_atomic
from steelyard.base.progress import Progress
from steelyard.model.chat import Renderer
from steelyard.model.headers import scan_safetensors
from steelyard.model.identity import subject_of
from steelyard.model.llama import Llama, load_llama
from steelyard.model.pairs import Pairs
from steelyard.train.conversations import Preference
from steelyard.train.loop import TrainOptions, train
from steelyard.train.losses import LossSum, tensors_digest
from steelyard.train.pairs import Pair, PairBatch, PairLoader, ShownPairs, assemble_pairs, pairs_digest, render_pairs
from steelyard.train.sft import Tuned, check_outputs
from steelyard.train.speed import compute_dtype, step_operations
from steelyard.train.tuning import FULL, Tuning, export_tuned, first_rank, open_for_tuning


@dataclass(frozen=True)
class DPOOptions:
    """The loss, and how many pairs make a step."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalised: bool = False
    sft_weight: float = 0.0
    pairs_per_step: int = 32
    micro_batches_per_step: int = 4
    max_length: int = 1024  # tokens of prompt and answer

    def check(self) -> None:
        """Raises UsageError naming the option that can't be."""
        if not self.beta > 0:
            raise UsageError(f"beta {self.beta}: must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise UsageError(f"label_smoothing {self.label_smoothing}: must be at least 0 and under 0.5")
        if not self.sft_weight >= 0:
            raise UsageError(f"sft_weight {self.sft_weight}: must be at least 0")


class DPO:
    """The objective over `PairBatch`es. `reference` is float32 [pairs, 2]: log p of chosen and rejected answer."""

    name = "dpo"
    counts: Literal["pairs"] = "pairs"

    def __init__(self, options: DPOOptions, reference: Tensor) -> None:
        options.check()
        self.options, self.reference = options, reference

    @property
    def settings(self) -> Mapping[str, Any]:
        # the other options make the data, whose digest a checkpoint holds too
        names = ("beta", "label_smoothing", "length_normalised", "sft_weight")
        reference = tensors_digest({"log_probs": self.reference})
        return {name: getattr(self.options, name) for name in names} | {"reference": reference}

    def loss(self, model: nn.Module, batch: PairBatch) -> LossSum:
        assert isinstance(model, Llama)
        options = self.options
        answers = answer_log_probs(model, batch)  # [n, 2]
        if not batch.sample_ids:  # a blank one: every rank must have run the model as often
            return LossSum(answers.sum() * 0.0, 0, 0.0)
        lengths = torch.bincount(batch.owners, minlength=2 * len(batch.shapes)).view(-1, 2).to(answers.device)
        reference = self.reference[list(batch.sample_ids)].to(answers.device)
        ratios = answers - reference  # r(chosen), r(rejected)
        if options.length_normalised:
            ratios = ratios / lengths
        rewards = options.beta * ratios
        margin = rewards[:, 0] - rewards[:, 1]
        smooth = options.label_smoothing
        losses = -(1 - smooth) * F.logsigmoid(margin) - smooth * F.logsigmoid(-margin)
        likelihood = -answers[:, 0] / lengths[:, 0]
        if options.sft_weight:
            losses = losses + options.sft_weight * likelihood
        with torch.no_grad():
            metrics = {
                "margin": margin.sum(),
                "accuracy": (margin > 0).float().sum(),
                "chosen_reward": rewards[:, 0].sum(),
                "rejected_reward": rewards[:, 1].sum(),
                "chosen_nll": likelihood.sum(),
            }
        laid = [length for p, a, b in batch.shapes for length in (p + a, b)]
        operations = step_operations(model, len(batch.tokens), laid, len(batch.rows))
        return LossSum(losses.sum(), len(batch.shapes), operations, metrics)

    def count(self, batch: PairBatch) -> int:
        """Pairs."""
        return len(batch.sample_ids)

    def tokens(self, batch: PairBatch) -> int:
        """Tokens that go through the model: each prompt once."""
        return len(batch.tokens)


def answer_log_probs(model: Llama, batch: PairBatch) -> Tensor:
    """log p(answer | prompt) of every chosen (first) and rejected answer: float32 [n, 2]. Only the positions that
    predict a token of an answer go through the head.
    """
    device = model.head_weight.device
    hidden = model.packed(batch.tokens.to(device), batch.positions.to(device), Pairs(batch.shapes, device))
    each = chunked_log_probs(hidden[batch.rows.to(device)], model.head_weight, batch.targets.to(device))
    sums = torch.zeros(2 * len(batch.shapes), dtype=torch.float32, device=device)
    return sums.index_add(0, batch.owners.to(device), each).view(-1, 2)


def chunked_log_probs(hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """log softmax(hidden @ head_weight.T)[targets], float32 [N]; hidden [N, C] and head_weight [V, C] share a dtype.

    Logits exist for `chunk` rows at a time only (None: what 32 MiB of float32 hold), computed again in the backward
    pass: how much each token's gradient counts is known only once all answers of a pair are.
    """
    rows = chunk or max(64, 2**23 // len(head_weight))
    found: Tensor = _ChunkedLogProbs.apply(hidden, head_weight, targets, rows)  # type: ignore[no-untyped-call]
    return found


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        found, totals = [], []
        for x, y in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
            logits = (x @ weight.T).float()  # [n, V]
            totals.append(logits.logsumexp(-1))
            found.append(logits.gather(1, y[:, None])[:, 0] - totals[-1])
        ctx.chunk = chunk
        ctx.save_for_backward(hidden, weight, targets, torch.cat(totals))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, totals = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # float32 also for bfloat16 weights: it is a sum over chunks
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            x, y, g = hidden[part], targets[part, None], grads[0][part, None]
            slope = (x @ weight.T).float().sub_(totals[part, None]).exp_().mul_(-g)  # d loss / d logits
            slope = slope.scatter_add_(1, y, g).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.T @ x
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def reference_log_probs(
    model: Llama, pairs: Sequence[Pair], *, tokens_at_once: int = 4096, progress: Progress
) -> Tensor:
    """log p of the chosen and the rejected answer of every pair under `model`: float32 [pairs, 2], no graph."""
    found = torch.zeros(len(pairs), 2)
    order = sorted(range(len(pairs)), key=lambda index: pairs[index].size)
    with progress.task("reference log-probabilities", len(pairs), "pairs") as task, torch.no_grad():
        start = 0
        while start < len(order):
            end, size = start, 0
            while end < len(order) and (end == start or size + pairs[order[end]].size <= tokens_at_once):
                size += pairs[order[end]].size
                end += 1
            batch = assemble_pairs(pairs, order[start:end])
            found[order[start:end]] = answer_log_probs(model, batch).cpu()
            task.advance(end - start)
            start = end
    return found


def cached_reference(
    folder: Path, pairs: Sequence[Pair], cache: Path, dtype: torch.dtype, progress: Progress
) -> Tensor:
    """`reference_log_probs` of the model in `folder`, computed in `dtype`; kept in `cache` under a name that holds the
    digests of model and data, and read from there the next time. Raises FormatError for a damaged file.
    """
    key = {"model": subject_of(folder, progress).weights, "data": pairs_digest(pairs), "dtype": str(dtype)}
    path = cache / f"reference-{digest(key)[:16]}.safetensors"
    if not path.exists():
        found = reference_log_probs(load_llama(folder, dtype=dtype), pairs, progress=progress)
        write_atomic(path, save({"log_probs": found}, metadata={k: str(v) for k, v in key.items()}))
        return found
    infos = scan_safetensors(path)
    if set(infos) != {"log_probs"} or tuple(infos["log_probs"].shape) != (len(pairs), 2):
        raise FormatError(f"{path}: does not hold the reference of these {len(pairs):,} pairs: remove it")
    with safe_open(path, framework="pt") as file:
        stored = file.metadata()
        if stored != {k: str(v) for k, v in key.items()}:
            raise FormatError(f"{path}: belongs to another model or data: remove it")
        tensor: Tensor = file.get_tensor("log_probs")
    if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
        raise FormatError(f"{path}: holds no finite log-probabilities: remove it")
    return tensor


def prefer(
    model_folder: Path,
    preferences: Sequence[Preference],
    out: Path,
    *,
    work: Path,
    options: TrainOptions,
    dpo: DPOOptions,
    tuning: Tuning = FULL,
    validation: Sequence[Preference] = (),
    adapter: Path | None = None,
    progress: Progress,
) -> Tuned:
    """Tune the model of `model_folder` on `preferences` by DPO, itself being the reference, and write it as `out`.

    `work`, `tuning`, `adapter` and errors as in `sft.fine_tune`; SteelyardError also where no chosen answer keeps its
    end of turn.
    """
    check_outputs(out, adapter, tuning)
    dpo.check()
    if not preferences:
        raise UsageError("no preferences: nothing to learn from")
    renderer = Renderer(model_folder)
    model = open_for_tuning(model_folder, tuning, options.dtype)
    longest = min(dpo.max_length, model.config.max_position_embeddings)
    pairs, counts = render_pairs(preferences, renderer, longest, progress)
    held_out = render_pairs(validation, renderer, longest, progress)[0] if validation else []
    more = "raise max_length (--max-length)" if longest == dpo.max_length else "the model has no more positions"
    progress.say(
        f"{counts.pairs:,} pairs of {counts.answer_tokens:,} answer tokens; {counts.ends:,} chosen answers keep their "
        f"end of turn; {counts.cut:,} cut at {longest:,} tokens, {counts.dropped:,} left out"
        + (f": {more}" if counts.cut or counts.dropped else "")
    )
    if not counts.ends:  # before the reference, which takes a pass over all data
        raise SteelyardError(
            f"no chosen answer of {counts.pairs:,} pairs keeps its end of turn (ids "
            f"{sorted(renderer.tokenizer.eos_ids)}), {counts.cut:,} being cut at {longest:,} tokens: the model would "
            f"never learn to stop. Check the chat template; against cuts: {more}"
        )
    every = [*pairs, *held_out]
    dtype = compute_dtype(options.dtype)
    reference = cached_reference(model_folder, every, work, dtype, progress)

    def load(members: range, *, endless: bool) -> PairLoader:
        return PairLoader(
            every,
            members,
            pairs_per_step=dpo.pairs_per_step,
            micro_batches_per_step=dpo.micro_batches_per_step,
            seed=options.seed,
            endless=endless,
        )

    loader = load(range(len(pairs)), endless=True)
    check = load(range(len(pairs), len(every)), endless=False) if held_out else None
    shown = ShownPairs(pairs, renderer)
    result = train(model, loader, DPO(dpo, reference), options, work, validation=check, chat=shown, progress=progress)
    if first_rank():
        export_tuned(model, model_folder, out, adapter=adapter)
    return Tuned(**vars(result), data=counts)

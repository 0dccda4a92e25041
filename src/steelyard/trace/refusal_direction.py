"""The direction in the residual stream along which a model tells what it declines from what it answers.

Difference of means (Arditi et al. 2024, "Refusal in language models is mediated by a single direction",
arXiv:2406.11717, section 2.3): the mean of the stream at a prompt's last token over harmful prompts, less the same over
harmless ones, after each layer. The prompts are this project's own, worded alike (`train/align/`); no test set is read.

    >>> found = refusal_directions(Path("releases/smollm2"), *phrases(128), progress=default_progress())
    >>> found.vectors.shape  # layers, width
    (30, 576)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from steelyard.base.errors import SteelyardError, UsageError, require_extra
from steelyard.base.progress import Progress, Silent

_AT_ONCE = 32  # prompts
SEPARATES = 0.7  # of the pairs of a harmful and a harmless prompt, by one projection
LEAST = 8  # prompts a side, for a mean that says anything


@dataclass(frozen=True)
class Directions:
    """`vectors` float32 [layers, width], of length 1; `separation` [layers]: the share of (harmful, harmless) pairs
    that the projection on the layer's vector puts in the right order, among prompts that the vector was not made from.
    """

    vectors: npt.NDArray[np.float32]
    separation: npt.NDArray[np.float64]

    def telling(self, least: float = SEPARATES) -> npt.NDArray[np.float32]:
        """The vectors that separate at least so well, the best first: chosen on the release alone, before any suspect.

        Raises SteelyardError where none does: such a model has no refusals to take out.
        """
        order = np.argsort(-self.separation, kind="stable")
        found = self.vectors[[number for number in order if self.separation[number] >= least]]
        if not len(found):
            raise SteelyardError(
                f"no layer tells harmful prompts from harmless ones (best {self.separation.max():.0%} of pairs, "
                f"{least:.0%} needed): the model has no refusal direction"
            )
        return found


def phrases(count: int) -> tuple[list[str], list[str]]:
    """(`count` harmful prompts, `count` harmless ones) of the project's own that the align stage may train on, spread
    evenly over the hazards. The held-out ones stay for measuring behaviour."""
    from steelyard.train.safety_prompts import written_prompts

    sides: tuple[list[str], list[str]] = ([], [])
    for harmful, side in zip((True, False), sides, strict=True):
        texts = [p.text for p in written_prompts(1) if p.harmful == harmful and not p.held_out]
        if len(texts) < count:
            raise UsageError(f"{count} prompts asked for, {len(texts)} are written")
        side += [texts[number * len(texts) // count] for number in range(count)]
    return sides


def refusal_directions(
    folder: Path, harmful: Sequence[str], harmless: Sequence[str], *, progress: Progress | None = None
) -> Directions:
    """The directions of the chat model in `folder`: one after each layer, from every second prompt of each side; the
    other half measures how well they separate.

    Raises UsageError for under `LEAST` prompts a side, MissingDependencyError without the `models` extra, and what
    loading the model and rendering a prompt raise.
    """
    if min(len(harmful), len(harmless)) < LEAST:
        raise UsageError(f"{len(harmful)} harmful and {len(harmless)} harmless prompts: at least {LEAST} of each")
    states = last_token_states(folder, [*harmful, *harmless], progress=progress)  # [prompts, layers, width]
    bad, good = states[: len(harmful)], states[len(harmful) :]
    difference = bad[::2].mean(axis=0) - good[::2].mean(axis=0)
    lengths = np.linalg.norm(difference, axis=1, keepdims=True)
    vectors = (difference / np.maximum(lengths, np.finfo(np.float64).tiny)).astype(np.float32)
    return Directions(vectors, _separation(vectors, bad[1::2], good[1::2]))


def _separation(
    vectors: npt.NDArray[np.float32], bad: npt.NDArray[np.float64], good: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The Mann-Whitney statistic of the projections, as a share, by layer."""
    found = []
    for number, vector in enumerate(vectors):
        pairs = (bad[:, number] @ vector)[:, None] - (good[:, number] @ vector)[None]
        found.append(float((pairs > 0).mean() + 0.5 * (pairs == 0).mean()))
    return np.array(found)


def last_token_states(
    folder: Path, prompts: Sequence[str], *, progress: Progress | None = None
) -> npt.NDArray[np.float64]:
    """The residual stream after each layer at the last token of each prompt (one user's turn): [prompts, layers,
    width]. Memory is that of the answer and one batch."""
    try:
        import torch
    except ImportError as error:
        raise require_extra(error.name or "torch", "models") from None
    from steelyard.inference.endpoint import Message
    from steelyard.model.chat import Renderer
    from steelyard.model.llama import load_llama
    from steelyard.model.packed import Documents
    from steelyard.train.speed import compute_dtype

    model, renderer = load_llama(folder, dtype=compute_dtype("auto")), Renderer(folder)
    layers = model.config.num_hidden_layers
    found = np.empty((len(prompts), layers, model.config.hidden_size))
    with torch.no_grad(), (progress or Silent()).task("refusal direction", len(prompts), "prompts") as task:
        for start in range(0, len(prompts), _AT_ONCE):
            some = [renderer.prompt_tokens((Message("user", text),)) for text in prompts[start : start + _AT_ONCE]]
            lengths = [len(tokens) for tokens in some]
            last = torch.tensor(lengths).cumsum(0) - 1
            positions = torch.cat([torch.arange(length) for length in lengths])
            documents = Documents(lengths, torch.device("cpu"))
            x = model.model.embed_tokens(torch.tensor([token for tokens in some for token in tokens]))
            for number in range(layers):
                x = model.through(range(number, number + 1), x, positions, documents)  # [tokens, width]
                found[start : start + len(some), number] = x[last].double().numpy()
            task.advance(len(some))
    return found

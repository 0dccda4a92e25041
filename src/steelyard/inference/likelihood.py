"""How likely a model finds text that is given: many continuations of many prompts, read in packed passes.

Each distinct prompt is read once, whatever number of continuations it has; nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from steelyard.base.errors import SteelyardError
from steelyard.inference.engine import Engine
from steelyard.inference.executor import PAGE
from steelyard.inference.scheduler import pages_for

SCORED_TOKENS = 1024  # whose logits are held at once
_WIDENED = 64  # of these in float32: small enough that its memory is used again and again


def log_likelihoods(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    names: Sequence[str] | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[list[float]]:
    """The log-probability (natural logarithm) of each token of continuations[i], given prompts[i] and those before it.

    The engine must be idle. `advance` is told how many tokens were scored. Raises SteelyardError, naming the request
    (`names`, or its number): before any work for an empty prompt or continuation, tokens outside the vocabulary, and
    what exceeds the context or the cache; during work for logits that are not finite.
    """
    names = [str(i) for i in range(len(prompts))] if names is None else names
    if not len(prompts) == len(continuations) == len(names):
        raise ValueError("prompts, continuations and names must be of one length")
    for prompt, continuation, name in zip(prompts, continuations, names, strict=True):
        engine.check_given(prompt, continuation, name)
    found: list[list[float]] = [[] for _ in prompts]
    engine.begin_alone()
    for batch in _batches(engine, prompts, continuations):
        try:
            _score(engine, batch, found, names, advance)
        finally:
            pages = [page for shared in batch for page in shared.pages]
            engine.executor.clear(pages)  # logits that were not finite would leave a NaN behind
            engine.pages.release(pages)
    return found


@dataclass
class _Row:
    """One continuation, and its sequence's pages."""

    number: int
    tokens: Sequence[int]
    table: list[int]


@dataclass
class _Shared:
    """A prompt, and all that continues it. All but the prompt's last token is read once, by the first row."""

    prompt: Sequence[int]
    rows: list[_Row]
    pages: list[int]


def _batches(
    engine: Engine, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> Iterator[list[_Shared]]:
    """Work that fits the cache, at most a few passes' worth of it; its pages are taken."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(number)
    batch: list[_Shared] = []
    tokens = 0
    for prompt, numbers in groups.items():
        whole = (len(prompt) - 1) // PAGE  # pages that no continuation writes to
        shared: _Shared | None = None
        for number in numbers:
            needed = pages_for(len(prompt), len(continuations[number]))
            own = needed - (whole if shared else 0)
            if own > engine.pages.available or tokens >= 2 * engine.prefill_tokens:
                yield batch
                batch, tokens, shared, own = [], 0, None, needed
            if shared is None:
                shared = _Shared(prompt, [], [])
                batch.append(shared)
                tokens += len(prompt)
            pages = engine.pages.take(own)
            table = pages if not shared.rows else [*shared.rows[0].table[:whole], *pages]
            shared.rows.append(_Row(number, continuations[number], table))
            shared.pages += pages
            tokens += len(continuations[number])
    if batch:
        yield batch


def _score(
    engine: Engine,
    batch: Sequence[_Shared],
    found: list[list[float]],
    names: Sequence[str],
    advance: Callable[[int], None],
) -> None:
    executor = engine.executor
    for parts in _passes([len(shared.prompt) - 1 for shared in batch], engine.prefill_tokens):
        executor.prefill(
            [batch[i].prompt[start:stop] for i, start, stop in parts],
            [start for _, start, _ in parts],
            [batch[i].rows[0].table for i, _, _ in parts],
        )
    rows = [(shared.prompt, row) for shared in batch for row in shared.rows]
    for shared in batch:
        whole, rest = divmod(len(shared.prompt) - 1, PAGE)
        for row in shared.rows[1:]:
            if rest:
                executor.copy_page(shared.rows[0].table[whole], row.table[whole])
    for parts in _passes([len(row.tokens) for _, row in rows], SCORED_TOKENS):
        read: list[list[int]] = []
        starts: list[int] = []
        wanted: list[int] = []
        for i, start, stop in parts:
            prompt, row = rows[i]
            read.append([prompt[-1], *row.tokens[:-1]][start:stop])
            starts.append(len(prompt) - 1 + start)
            wanted += row.tokens[start:stop]
        logits = executor.prefill(read, starts, [rows[i][1].table for i, _, _ in parts], every=True)
        target = torch.tensor(wanted, device=logits.device)
        losses = iter(
            value
            for at in range(0, len(wanted), _WIDENED)
            for value in F.cross_entropy(
                logits[at : at + _WIDENED].float(), target[at : at + _WIDENED], reduction="none"
            ).tolist()
        )
        for i, start, stop in parts:
            row = rows[i][1]
            values = [-next(losses) for _ in range(start, stop)]
            if not all(map(math.isfinite, values)):
                raise SteelyardError(f"request {names[row.number]}: the model's logits are not finite")
            found[row.number] += values
        advance(len(wanted))


def _passes(lengths: Sequence[int], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """(sequence, start, stop), each pass at most `size` tokens; a part never shares a pass with an earlier one of its
    sequence."""
    parts: list[tuple[int, int, int]] = []
    room = size
    for i, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(start + room, length)
            parts.append((i, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield parts
                parts, room = [], size
    if parts:
        yield parts

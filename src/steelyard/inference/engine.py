"""Batched generation: one padded prefill, then one decoding step a token for all rows, until every row is done.

A row's noise depends on its seed and position alone, and everything else on the batch alone, so the same batch yields
the same tokens bit for bit on the same machine; another batch may differ where rounding decides a near tie.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from steelyard.base.errors import SteelyardError
from steelyard.inference.endpoint import Sampling
from steelyard.inference.sampling import check_sampling, choose, margins
from steelyard.model.llama import KVCache, Llama

Finish = Literal["stop", "length"]
PREFILL_TOKENS = 4096  # padded tokens read at once: enough to fill the processor, bounded memory
KEEP_ABOVE = 0.75  # finished rows are dropped once this share, or less, of the batch is still running
CHECK_TOKENS = 256  # positions whose logits are held at once in `check`


class Engine:
    """Generates with one model. `decode` (token ids to text) is needed for stop strings only."""

    def __init__(
        self, model: Llama, eos_ids: Collection[int], decode: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        self.model, self.eos_ids, self.decode = model, frozenset(eos_ids), decode

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        seeds: Sequence[int],
        names: Sequence[str] | None = None,
    ) -> list[tuple[list[int], Finish]]:
        """For each prompt (token ids), in order: the new tokens, any stop token that ended them included, and why.

        A stop string ends a row with the token that completes it, wherever it began; cutting the text before it is the
        caller's. Raises SteelyardError before any work, naming the request (`names`, or its number), for an empty
        prompt, a token outside the vocabulary, meaningless sampling settings, stop strings without `decode`, and a
        prompt that with its max_tokens exceeds the context; during work, for logits that are not finite.
        """
        names = [str(i) for i in range(len(prompts))] if names is None else names
        if not len(prompts) == len(samplings) == len(seeds) == len(names):
            raise ValueError("prompts, samplings, seeds and names must be of one length")
        for prompt, sampling, name in zip(prompts, samplings, names, strict=True):
            self._check_request(prompt, sampling, name)
        if not prompts:
            return []

        # Shortest first: prompts read together are of like length, and each such group is a run of cache rows
        running = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        capacity = max(len(prompts[i]) + samplings[i].max_tokens for i in running)
        cache = KVCache.empty(self.model, len(running), capacity)
        logits = self._prefill([prompts[i] for i in running], cache)
        completions: list[list[int]] = [[] for _ in prompts]
        finishes: dict[int, Finish] = {}
        while True:
            chosen = choose(
                logits,
                [samplings[i] for i in running],
                [seeds[i] for i in running],
                [len(completions[i]) for i in running],
            )
            for i, token in zip(running, chosen.tolist(), strict=True):
                if i in finishes:
                    continue  # a finished row not yet dropped
                if token < 0:
                    raise SteelyardError(
                        f"request {names[i]}: the model's logits are not finite: its weights are broken, "
                        f"or overflow in {str(logits.dtype).removeprefix('torch.')}"
                    )
                completions[i].append(token)
                finish = self._finish(completions[i], samplings[i])
                if finish is not None:
                    finishes[i] = finish
            alive = [row for row, i in enumerate(running) if running[row] not in finishes]
            if not alive:
                return [(completions[i], finishes[i]) for i in range(len(prompts))]
            if len(alive) <= KEEP_ABOVE * len(running):
                rows = torch.tensor(alive, device=chosen.device)
                cache.keep(rows)
                running, chosen = [running[row] for row in alive], chosen[rows]
            logits = self.model.decode(chosen, cache)
            # A finished row stays where it is, writing to one slot over and over: it never outgrows the cache
            cache.lengths += torch.tensor([i not in finishes for i in running], device=chosen.device)

    @torch.inference_mode()
    def check(
        self, prompt: Sequence[int], tokens: Sequence[int], sampling: Sampling, seed: int, name: str = "0"
    ) -> list[float]:
        """How far each of `tokens`, said to come from `prompt`, is from what this model would have chosen there.

        One forward pass over prompt and tokens. 0.0 where it is the choice, else the margin of `sampling.margins`, in
        units of logit / temperature (of logit, where greedy): small where only rounding differs (other hardware, other
        batch), large where the tokens are not this model's. infinity for a token after a stop token. Errors as in
        `generate`; also for more tokens than `max_tokens`.
        """
        if not tokens:
            raise SteelyardError(f"request {name}: no tokens to check")
        self._check_request(prompt, sampling, name)
        if len(tokens) > sampling.max_tokens:
            raise SteelyardError(f"request {name}: {len(tokens)} tokens where max_tokens is {sampling.max_tokens}")
        self._check_vocabulary(tokens, name)
        device = self.model.model.embed_tokens.weight.device
        whole = torch.tensor([[*prompt, *tokens[:-1]]], device=device)
        stream = self.model.hidden(whole)[0, len(prompt) - 1 :]  # [len(tokens), C]
        given = torch.tensor(tokens, device=device)
        found: list[float] = []
        for start in range(0, len(tokens), CHECK_TOKENS):
            part = slice(start, start + CHECK_TOKENS)
            positions = range(len(tokens))[part]
            found += margins(self.model.head(stream[part]), given[part], sampling, seed, positions)
        stops = [i for i, token in enumerate(tokens) if token in self.eos_ids]
        if stops:
            found[stops[0] + 1 :] = [float("inf")] * (len(tokens) - stops[0] - 1)
        return found

    def _check_request(self, prompt: Sequence[int], sampling: Sampling, name: str) -> None:
        check_sampling(sampling, name)
        if not len(prompt):
            raise SteelyardError(f"request {name}: the prompt is empty: give at least one token (a BOS, say)")
        self._check_vocabulary(prompt, name)
        limit = self.model.config.max_position_embeddings
        if len(prompt) + sampling.max_tokens > limit:
            raise SteelyardError(
                f"request {name}: {len(prompt)} prompt tokens + {sampling.max_tokens} new ones exceed the context of "
                f"{limit}: shorten the prompt or lower max_tokens (nothing is ever truncated)"
            )
        if sampling.stop and self.decode is None:
            raise SteelyardError(f"request {name}: stop strings need a tokenizer: this engine was given none")

    def _check_vocabulary(self, tokens: Sequence[int], name: str) -> None:
        vocabulary = self.model.config.vocab_size
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise SteelyardError(f"request {name}: token {token} is outside the model's vocabulary of {vocabulary}")

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Read the prompts, sorted by length, into `cache`; logits [B, V] after the last token of each."""
        device = cache.lengths.device
        logits = []
        for start, stop in prefill_groups([len(prompt) for prompt in prompts]):
            group = prompts[start:stop]
            longest = len(group[-1])
            tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in group], device=device)
            lengths = torch.tensor([len(prompt) for prompt in group], device=device)
            logits.append(self.model.prefill(tokens, lengths, cache.rows(start, stop)))
        return torch.cat(logits)

    def _finish(self, tokens: list[int], sampling: Sampling) -> Finish | None:
        if tokens[-1] in self.eos_ids:
            return "stop"
        if sampling.stop and self.decode is not None:
            # the whole text each time: only so is a stop string seen whatever tokens it is spread over
            text = self.decode(tokens)
            if any(stop in text for stop in sampling.stop):
                return "stop"
        return "length" if len(tokens) == sampling.max_tokens else None


def prefill_groups(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut ascending lengths into runs (start, stop) of at most PREFILL_TOKENS padded tokens, or of one longer row."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or lengths[stop] * (stop + 1 - start) > PREFILL_TOKENS:
            yield start, stop
            start = stop

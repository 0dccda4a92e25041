"""The log-likelihood of every option of an entry after its prompt, by the local engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from steelyard.base.errors import SteelyardError
from steelyard.inference.likelihood import log_likelihoods
from steelyard.inference.local import LocalEndpoint
from steelyard.model.tokenizer import Tokenizer
from steelyard.safety.published.adapter import Entry


def option_likelihoods(endpoint: LocalEndpoint, entries: Sequence[Entry]) -> list[list[float]]:
    """For each entry, its options' log-likelihoods (natural logarithm, summed over tokens)."""
    prompts: list[list[int]] = []
    continuations: list[list[int]] = []
    names: list[str] = []
    for entry in entries:
        given, options = cut(endpoint.tokenizer, entry)
        prompts += [given] * len(options)
        continuations += options
        names += [f"{entry.id}, option {number}" for number in range(len(options))]
    found = iter(log_likelihoods(endpoint.engine, prompts, continuations, names))
    return [[math.fsum(next(found)) for _ in entry.options] for entry in entries]


def cut(tokenizer: Tokenizer, entry: Entry) -> tuple[list[int], list[list[int]]]:
    """(tokens given, tokens of each option). Prompt and option are encoded as one text, as a reader would find them;
    what is given are the prompt's tokens that stay the same whichever option follows. A prompt that is empty becomes
    the beginning-of-text token, or the end-of-text one where the tokenizer has no other.
    """
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else sorted(tokenizer.eos_ids)[:1]
    if not start and not entry.prompt:
        raise SteelyardError("the tokenizer has neither a beginning- nor an end-of-text token to start from")
    head = tokenizer.encode(entry.prompt, bos=False)
    wholes = tokenizer.encode_batch([entry.prompt + option for option in entry.options])
    same = len(head)
    for whole in wholes:
        same = min(same, next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), len(whole) - 1))
    before = start if tokenizer.adds_bos or not same else []
    return [*before, *head[:same]], [whole[same:] for whole in wholes]

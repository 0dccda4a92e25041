"""The n-gram baseline: a worked example by hand, another implementation in plain dictionaries, and proper sums."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from steelyard.base.errors import UsageError
from steelyard.corpus.ngram import KneserNey


def test_a_bigram_model_by_hand() -> None:
    # One document: <s> a b a b a c </s> as 0 1 2 1 2 1 3 4. Bigrams: 01:1 12:2 21:2 13:1 34:1; no count of counts for 3
    # and 4, so the discounts are 0.5, 1, 1.5. Left contexts: a has {<s>, b}, b {a}, c {a}, </s> {c}: 2, 1, 1, 1 of 5.
    tokens, ends = np.array([0, 1, 2, 1, 2, 1, 3, 4]), np.array([8])
    model = KneserNey.fit(tokens, ends, order=2, vocab_size=5)
    left = (1.0 + 0.5 * 3) / 5  # of the unigrams: discounts 1 (a, count 2) and 0.5 (b, c, </s>)
    unigram = {1: (2 - 1) / 5 + left / 5, 2: 0.5 / 5 + left / 5, 3: 0.5 / 5 + left / 5, 4: 0.5 / 5 + left / 5}
    # After a: b twice, c once: 3 in all; freed 1 + 0.5.
    after_a = {2: (2 - 1) / 3 + 1.5 / 3 * unigram[2], 3: 0.5 / 3 + 1.5 / 3 * unigram[3], 1: 1.5 / 3 * unigram[1]}
    for token, expected in after_a.items():
        assert model.bits(np.array([1, token]), np.array([2]))[0] == pytest.approx(-math.log2(expected))
    # A context never seen: the unigram alone.
    assert model.bits(np.array([4, 2]), np.array([2]))[0] == pytest.approx(-math.log2(unigram[2]))


def _slow(documents: list[list[int]], order: int, vocab: int) -> object:
    """Interpolated modified Kneser-Ney with dictionaries, straight from the definitions."""
    grams = [
        Counter(tuple(d[i - n + 1 : i + 1]) for d in documents for i in range(n - 1, len(d)) if i > 0)
        for n in range(1, order + 1)
    ]
    counts: list[dict[tuple[int, ...], float]] = []
    for n in range(1, order + 1):
        if n == order:
            counts.append(dict(grams[n - 1]))
            continue
        found: dict[tuple[int, ...], float] = defaultdict(float)
        for longer in grams[n]:
            found[longer[1:]] += 1
        if n > 1:
            for d in documents:
                if len(d) >= n:
                    found[tuple(d[:n])] += 1
        counts.append(found)
    discounts = []
    for table in counts:
        seen = [sum(v == k for v in table.values()) for k in (1, 2, 3, 4)]
        if min(seen) == 0:
            discounts.append([0.0, 0.5, 1.0, 1.5])
        else:
            y = seen[0] / (seen[0] + 2 * seen[1])
            d = [k - (k + 1) * y * seen[k] / seen[k - 1] for k in (1, 2, 3)]
            discounts.append([0.0, *(min(max(v, 0.05), k) for k, v in enumerate(d, 1))])

    def probability(context: tuple[int, ...], token: int) -> float:
        lower = 1 / vocab if not context else probability(context[1:], token)
        table, cut = counts[len(context)], discounts[len(context)]
        after = {w: table[(*context, w)] for w in range(vocab) if table.get((*context, w))}
        if not after:
            return lower
        total = sum(after.values())
        freed = sum(cut[min(int(c), 3)] for c in after.values())
        count = after.get(token, 0)
        return max(count - cut[min(int(count), 3)], 0) / total + freed / total * lower

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_it_agrees_with_the_definitions(order: int) -> None:
    rng = np.random.default_rng(order)
    vocab = 7
    documents = [[0, *(rng.zipf(1.6, size=rng.integers(1, 40)) % 6 + 1).tolist()] for _ in range(60)]
    tokens, ends = np.concatenate([np.array(d) for d in documents]), np.cumsum([len(d) for d in documents])
    model = KneserNey.fit(tokens, ends, order=order, vocab_size=vocab)
    slow = _slow(documents, order, vocab)
    held = [[0, *rng.integers(1, vocab, size=9).tolist()] for _ in range(6)] + [[0], documents[0]]
    found = model.bits(np.concatenate([np.array(d) for d in held]), np.cumsum([len(d) for d in held]))
    expected = [
        -math.log2(slow(tuple(d[max(0, i - order + 1) : i]), d[i]))  # type: ignore[operator]
        for d in held
        for i in range(1, len(d))
    ]
    assert found == pytest.approx(expected)


def test_probabilities_sum_to_one_after_any_context() -> None:
    rng = np.random.default_rng(0)
    vocab = 12
    tokens = np.minimum(rng.zipf(1.4, size=3000), vocab - 1)
    ends = np.arange(30, 3001, 30)
    model = KneserNey.fit(tokens, ends, order=4, vocab_size=vocab)
    for context in ([3], [1, 1], [1, 2, 1], [0, 1, 5], [2, 11, 1, 4, 1, 1]):
        total = 0.0
        for token in range(vocab):
            total += 2 ** -model.bits(np.array([*context, token]), np.array([len(context) + 1]))[-1]
        assert total == pytest.approx(1.0, abs=1e-12)


def test_it_knows_a_text_that_repeats_itself() -> None:
    tokens = np.tile(np.arange(1, 9), 500)
    model = KneserNey.fit(tokens, np.array([4000]), order=5, vocab_size=9)
    assert model.bits(np.tile(np.arange(1, 9), 5), np.array([40])).mean() < 0.05


@pytest.mark.parametrize(
    ("tokens", "ends", "order"), [([], [], 5), ([1, 9], [2], 5), ([1, -1], [2], 5), ([1, 2], [1], 5), ([1, 2], [2], 0)]
)
def test_impossible_input_is_refused(tokens: list[int], ends: list[int], order: int) -> None:
    with pytest.raises(UsageError):
        KneserNey.fit(np.array(tokens, dtype=np.int64), np.array(ends, dtype=np.int64), order=order, vocab_size=9)

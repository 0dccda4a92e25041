"""A modified Kneser-Ney n-gram model over token ids: the baseline that a small neural model must beat.

Chen and Goodman, An empirical study of smoothing techniques for language modeling, Computer Speech and Language 13
(1999), section 3: interpolated, three discounts an order (equation 26), counts of distinct left contexts below the
highest order (and for n-grams that begin a document, which have no left context, their plain counts). The lowest order
is interpolated with the uniform distribution, so that every token has a probability. Sorted arrays and binary search
throughout: no dictionary of n-grams, some 60 bytes an n-gram of the text.

>>> import numpy as np
>>> model = KneserNey.fit(np.array([1, 2, 1, 2, 1, 3]), np.array([6]), order=2, vocab_size=4)
>>> bool(np.isclose(sum(2 ** -model.bits(np.array([1, t]), np.array([2]))[0] for t in range(4)), 1.0))
True
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steelyard.base.errors import UsageError

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """The n-grams of one order, as pairs (context, last token) in sorted order.

    `keys` [m] is context * V + token, where a context is the number of its n-1-gram in the order below; `counts` [m]
    are modified counts. Of each context [number of n-1-grams]: `totals` of counts, and `backoff` = the probability
    left to the order below.
    """

    keys: Ids
    counts: Floats
    totals: Floats
    backoff: Floats
    discounts: Floats  # [4], of counts 0, 1, 2, 3 and more


@dataclass(frozen=True)
class KneserNey:
    """A fitted model. Make one with `fit`."""

    order: int
    vocab_size: int
    orders: tuple[_Order, ...]

    @classmethod
    def fit(cls, tokens: Ids, ends: Ids, *, order: int = 5, vocab_size: int) -> KneserNey:
        """Fit on documents: `tokens` [N] one after another, `ends` [documents] where each ends.

        No n-gram crosses from one document to the next. Raises UsageError for no token, ids outside `vocab_size`, or
        ends that do not rise to N.
        """
        tokens, place = _checked(tokens, ends, vocab_size)
        if order < 1:
            raise UsageError(f"an n-gram model of order {order}")
        # names[k][i]: the number, among distinct n-grams of order k + 1, of the one that ends at token i; -1 where it
        # would reach over the document's beginning.
        names = tokens.copy()
        all_keys: list[Ids] = [np.arange(vocab_size)]
        all_names: list[Ids] = [names]
        for length in range(2, order + 1):
            previous = all_names[-1]
            keys = np.full(len(tokens), -1)
            inside = place >= length - 1
            keys[1:] = np.where(inside[1:], previous[:-1] * vocab_size + tokens[1:], -1)
            found, numbers = np.unique(keys[inside], return_inverse=True)
            names = np.full(len(tokens), -1)
            names[inside] = numbers
            all_keys.append(found)
            all_names.append(names)
        made = []
        for length in range(1, order + 1):
            names, keys = all_names[length - 1], all_keys[length - 1]
            if length == order:
                counted = names[(names >= 0) & (place > 0)]
            else:
                # Distinct left contexts: one for each distinct longer n-gram that ends as this one does; and where it
                # begins a document, how often it does.
                longer = all_names[length]
                ends_at = np.zeros(len(all_keys[length]), dtype=np.int64)
                ends_at[longer[longer >= 0]] = names[longer >= 0]
                begins = names[place == length - 1] if length > 1 else names[:0]  # a first token is never predicted
                counted = np.concatenate([ends_at, begins])
            counts = np.bincount(counted, minlength=len(keys)).astype(np.float64)
            contexts = 1 if length == 1 else len(all_keys[length - 2])
            made.append(_order(keys, counts, vocab_size, contexts))
        return cls(order, vocab_size, tuple(made))

    def bits(self, tokens: Ids, ends: Ids) -> Floats:
        """Minus log2 of each token's probability given those before it in its document, but not a document's first:
        [N - documents]. As a model that starts from a beginning-of-sequence token is measured, that token being first.
        """
        tokens, place = _checked(tokens, ends, self.vocab_size)
        probability = np.full(len(tokens), 1.0 / self.vocab_size)
        context = np.zeros(len(tokens), dtype=np.int64)  # number of the context in its order; -1: never seen
        # From the shortest order up: each turns the estimate of the order below into its own.
        for length, model in enumerate(self.orders, 1):
            if length > 1:
                context = self._names(tokens, place, length - 1)
            known = context >= 0
            known[known] = model.totals[context[known]] > 0
            here, keys = context[known], context[known] * self.vocab_size + tokens[known]
            count = _looked_up(model, keys)
            discount = model.discounts[np.minimum(count, 3).astype(np.int64)]
            own = np.maximum(count - discount, 0.0) / model.totals[here]
            probability[known] = own + model.backoff[here] * probability[known]
        return np.asarray(-np.log2(probability[place > 0]))

    def _names(self, tokens: Ids, place: Ids, length: int) -> Ids:
        """For each token the number of the n-gram of `length` right before it, -1 where there is none."""
        names = np.where(place >= 0, tokens, -1)
        for step in range(2, length + 1):
            keys = np.full(len(tokens), -1)
            keys[1:] = np.where(
                (names[:-1] >= 0) & (place[1:] >= step - 1), names[:-1] * self.vocab_size + tokens[1:], -1
            )
            model = self.orders[step - 1]
            found = np.minimum(np.searchsorted(model.keys, keys), len(model.keys) - 1)
            names = np.where((keys >= 0) & (model.keys[found] == keys), found, -1)
        before = np.full(len(tokens), -1)
        before[1:] = np.where(place[1:] >= length, names[:-1], -1)
        return before


def _looked_up(model: _Order, keys: Ids) -> Floats:
    if not len(model.keys):
        return np.zeros(len(keys))
    found = np.minimum(np.searchsorted(model.keys, keys), len(model.keys) - 1)
    return np.where(model.keys[found] == keys, model.counts[found], 0.0)


def _order(keys: Ids, counts: Floats, vocab_size: int, contexts: int) -> _Order:
    context = keys // vocab_size
    discounts = _discounts(counts)
    totals = np.bincount(context, weights=counts, minlength=contexts).astype(np.float64)
    freed = discounts[np.minimum(counts, 3).astype(np.int64)]
    backoff = np.bincount(context, weights=freed, minlength=contexts) / np.maximum(totals, 1.0)
    return _Order(keys, counts, totals, backoff, discounts)


def _discounts(counts: Floats) -> Floats:
    """Equation 26: D1, D2, D3+ out of how many n-grams have a count of 1, 2, 3 and 4.

    Where a count of counts is 0 (a tiny text), the estimate does not exist; 0.5, 1 and 1.5 are taken, which keep the
    probabilities proper.
    """
    seen = [float((counts == number).sum()) for number in (1, 2, 3, 4)]
    if min(seen) == 0:
        return np.array([0.0, 0.5, 1.0, 1.5])
    share = seen[0] / (seen[0] + 2 * seen[1])
    found = [number - (number + 1) * share * seen[number] / seen[number - 1] for number in (1, 2, 3)]
    return np.array([0.0, *(min(max(value, 0.05), number) for number, value in enumerate(found, 1))])


def _checked(tokens: Ids, ends: Ids, vocab_size: int) -> tuple[Ids, Ids]:
    """The tokens as int64, and each one's place in its document."""
    tokens, ends = np.asarray(tokens, dtype=np.int64), np.asarray(ends, dtype=np.int64)
    if not len(tokens) or int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        raise UsageError(f"token ids must be from 0 to {vocab_size - 1}, and there must be some")
    starts = np.concatenate([[0], ends[:-1]])
    if not len(ends) or int(ends[-1]) != len(tokens) or (ends < starts).any():
        raise UsageError("document ends must rise to the number of tokens")
    lengths = ends - starts
    return tokens, np.arange(len(tokens)) - np.repeat(starts, lengths)

"""Scorers that fail, each in its way, for batteries that name them: `python:faulty:raises`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from scenario import VILE, WordScorer

from steelyard.scorers.base import Item, Score, ScoreError


def raises() -> WordScorer:
    """Raises at every call."""
    return WordScorer("raises", "raises", VILE, "raises")


def nan() -> WordScorer:
    """NaN for every item."""
    return WordScorer("nan", "nan", VILE, "nan")


def count() -> WordScorer:
    """One score too few."""
    return WordScorer("count", "count", VILE, "count")


def constant() -> WordScorer:
    """0.1, whatever is asked."""
    return WordScorer("constant", "constant", VILE, "constant")


class _Slow(WordScorer):
    calls = 0

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        self.calls += 1
        if self.calls > 1 and "STEELYARD_TEST_SLOW" in os.environ:
            time.sleep(120)
        return super().score(items)


def slow() -> WordScorer:
    """Right, but where STEELYARD_TEST_SLOW is set it takes two minutes from the second call on: time to interrupt."""
    return _Slow("toxicity", "toxicity", VILE)

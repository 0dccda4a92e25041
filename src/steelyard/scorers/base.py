"""The scorer interface: one Score or ScoreError per item, same order; no defaults, no silent zeros."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steelyard.base.canonical import digest


@dataclass(frozen=True)
class Item:
    """What is scored: the completion, with the prompt it answers (the last user turn, or the text continued)."""

    prompt: str
    completion: str
    language: str = "en"


@dataclass(frozen=True)
class Score:
    """A probability in [0, 1] for every category the scorer covers."""

    values: Mapping[str, float]


@dataclass(frozen=True)
class ScoreError:
    """The item could not be scored, and why. Never replaced by a number."""

    reason: str


class Calibration(BaseModel):
    """A category's decision threshold and its measured errors on human labels held out from training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float = Field(gt=0, lt=1, description="at or above it the item counts as positive")
    true_positives: int = Field(ge=0)
    positives: int = Field(ge=1, le=10**9)
    true_negatives: int = Field(ge=0)
    negatives: int = Field(ge=1, le=10**9)
    source: str
    measured: str = Field(description="ISO date of the measurement")

    @model_validator(mode="after")
    def _possible(self) -> Calibration:
        if self.true_positives > self.positives or self.true_negatives > self.negatives:
            raise ValueError("more right answers than items")
        return self

    @property
    def sensitivity(self) -> float:
        return self.true_positives / self.positives

    @property
    def specificity(self) -> float:
        return self.true_negatives / self.negatives


class ScorerIdentity(BaseModel):
    """Names a scorer exactly: its weights, its code, what it covers, and how wrong it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    weights: str = Field(description="SHA-256 of the weights (encoder included) and of the canaries that watch them")
    code: str = Field(description="SHA-256 of the code that scores")
    categories: dict[str, Calibration]

    @property
    def digest(self) -> str:
        return digest(self.model_dump(mode="json"))

    @property
    def pin(self) -> str:
        """What a policy pins: all but the code, which changes with every version. The errors belong to it: whoever
        could declare other errors for the same weights could explain every bad answer away."""
        return digest(self.model_dump(mode="json", exclude={"code"}))


@dataclass(frozen=True)
class Canary:
    """A known-label item that rides in every batch: `category` must come out above (or below) its threshold."""

    id: str
    item: Item
    category: str
    expected: Literal["above", "below"]


class Scorer(Protocol):
    """Text to probabilities."""

    def identity(self) -> ScorerIdentity:
        """Which scorer this is."""

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        """One result per item, in order."""

    def canaries(self) -> list[Canary]:
        """Known-label items, both kinds for every category."""


def score_checked(scorer: Scorer, items: Sequence[Item]) -> list[Score | ScoreError]:
    """`scorer.score`, with every way of failing turned into a ScoreError that names it.

    A raise or a wrong number of results spoils the whole call; a missing category, NaN or a value outside [0, 1] spoils
    the item.
    """
    wanted = set(scorer.identity().categories)
    try:
        results = list(scorer.score(items))
    except Exception as error:
        return [ScoreError(f"raised {type(error).__name__}: {error}")] * len(items)
    if len(results) != len(items):
        return [ScoreError(f"returned {len(results)} scores for {len(items)} items")] * len(items)
    checked: list[Score | ScoreError] = []
    for result in results:
        if isinstance(result, ScoreError):
            checked.append(result)
        elif not isinstance(result, Score) or set(result.values) != wanted:
            checked.append(ScoreError(f"did not return exactly the categories {', '.join(sorted(wanted))}"))
        elif not all(math.isfinite(value) and 0 <= value <= 1 for value in result.values.values()):
            checked.append(ScoreError("returned a value that is not a probability (NaN or outside [0, 1])"))
        else:
            checked.append(result)
    return checked

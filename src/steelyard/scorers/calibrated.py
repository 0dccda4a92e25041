"""A scorer whose errors were measured again, on labels of one's own (`steelyard scorer calibrate`).

The same weights and scores; other thresholds or errors. Identity and pin change with them, so a policy that pins its
scorers accepts such a one only if it was told to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import FormatError, UsageError
from steelyard.base.files import read_bounded, write_atomic
from steelyard.base.strict import strict_json
from steelyard.scorers.base import Calibration, Canary, Item, Score, ScoreError, Scorer, ScorerIdentity

FILE_LIMIT = 1 << 20  # bytes
KIND = "calibrated"


class CalibrationFile(BaseModel):
    """What `steelyard scorer calibrate` writes: the scorer's reference, which it was, and its categories measured anew.
    A category that is not here keeps its own calibration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    scorer: str
    identity: ScorerIdentity
    categories: dict[str, Calibration] = Field(min_length=1)

    @model_validator(mode="after")
    def _covered(self) -> CalibrationFile:
        strange = sorted(set(self.categories) - set(self.identity.categories))
        if strange:
            raise ValueError(f"the scorer does not cover {strange[0]!r}")
        if self.scorer.startswith(f"{KIND}:"):
            raise ValueError("a calibration stands on a scorer, not on another calibration")
        return self


def write_calibration(path: Path, calibration: CalibrationFile) -> None:
    """Raises UsageError where `path` exists: a policy may pin what is there."""
    if path.exists():
        raise UsageError(f"{path} exists: a policy may pin it; write to another file")
    write_atomic(path, canonical_json(calibration.model_dump(mode="json")) + b"\n")


def read_calibration(path: Path) -> CalibrationFile:
    """Raises UsageError where there is no such file, FormatError where it is something else."""
    try:
        return CalibrationFile.model_validate(strict_json(read_bounded(path, FILE_LIMIT), str(path), limit=FILE_LIMIT))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: make it with `steelyard scorer calibrate`") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        raise FormatError(f"{path}: {key}: {first['msg']}: make it again with `steelyard scorer calibrate`") from error


class CalibratedScorer:
    """The scorer that the file `path` names, opened by `open_scorer`, with the errors that the file gives.

    `underlying` is that scorer, `reference` its name; `measured` are the errors of the file alone. Raises FormatError
    where it is not the one that was calibrated.
    """

    def __init__(self, path: Path, open_scorer: Callable[[str], Scorer]) -> None:
        file = read_calibration(path)
        self.reference, self.underlying, self.measured = file.scorer, open_scorer(file.scorer), file.categories
        found = self.underlying.identity()
        if (found.weights, set(found.categories)) != (file.identity.weights, set(file.identity.categories)):
            raise FormatError(
                f"{path}: {file.scorer} has changed since its errors were measured (weights {found.weights[:16]}, then "
                f"{file.identity.weights[:16]}): calibrate it again"
            )
        self._identity = found.model_copy(update={"categories": found.categories | file.categories})

    @property
    def card(self) -> dict[str, Any]:
        """The underlying scorer's: what it learned from."""
        found: dict[str, Any] = getattr(self.underlying, "card", {})
        return found

    def identity(self) -> ScorerIdentity:
        """Weights and code of the underlying scorer, with the new errors."""
        return self._identity

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        """As the underlying scorer."""
        return self.underlying.score(items)

    def canaries(self) -> list[Canary]:
        """As of the underlying scorer."""
        return self.underlying.canaries()

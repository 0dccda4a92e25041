"""From an adapter's file to a scorer; or, before its errors are measured, to one that may not decide anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from steelyard.base.canonical import code_digest, digest, sha256_file, sha256_hex
from steelyard.base.errors import FormatError, UsageError
from steelyard.base.files import inside
from steelyard.base.strict import strict_json
from steelyard.base.yamlfile import Document, read_text
from steelyard.hub.sources import folder_digest
from steelyard.scorers.adapters.canaries import LIMIT, own_canaries, shipped_canaries
from steelyard.scorers.adapters.spec import ClassifierSpec, GuardSpec, ModerationSpec, Spec, read_spec
from steelyard.scorers.base import Calibration, Canary, Item, Score, ScoreError, ScorerIdentity


class Engine(Protocol):
    """What asks the model. `weights` digests it with the settings that change values; `rooms` hold its code."""

    categories: tuple[str, ...]
    weights: str
    rooms: tuple[str, ...]

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        """One result per item, in order."""


@dataclass(frozen=True)
class Uncalibrated:
    """A scorer of unknown errors: to be calibrated, never to decide. `weights` as an identity has it: with canaries."""

    name: str
    categories: tuple[str, ...]
    weights: str
    score: Callable[[Sequence[Item]], list[Score | ScoreError]]


class Adapter:
    """A Scorer by somebody else's model, with the errors that were measured for it."""

    def __init__(self, raw: Uncalibrated, spec: Spec, engine: Engine, canaries: Sequence[Canary], path: Path) -> None:
        self._score, self._canaries = raw.score, list(canaries)
        self.card = {"training": spec.training} if spec.training else {}
        self._identity = ScorerIdentity(
            name=raw.name,
            weights=raw.weights,
            code=code_digest(*engine.rooms),
            categories=_calibration(path, raw),
        )

    def identity(self) -> ScorerIdentity:
        """Weights (of a server: what it claims to be), code, and calibration."""
        return self._identity

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        """One result per item, in order; whatever fails is a ScoreError."""
        return self._score(items)

    def canaries(self) -> list[Canary]:
        """Known-label items of the categories covered."""
        return list(self._canaries)


class _CalibrationFile(BaseModel):
    """What `steelyard scorer calibrate` writes; what else it says there is for people."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    categories: dict[str, Calibration]
    weights: str | None = None


def open_adapter(path: Path) -> Adapter:
    """The scorer that the file describes. Raises UsageError naming file and key, also where its errors have not been
    measured yet; FormatError for a model folder that is unsafe."""
    spec, document = read_spec(path)
    if spec.calibration is None:
        raise document.located(
            ("calibration",), f"this key is missing: measure the scorer's errors first: {_remedy(path)}"
        )
    raw, engine, canaries = _open(path, spec, document)
    return Adapter(raw, spec, engine, canaries, _beside(path, "calibration", spec.calibration, document))


def open_uncalibrated(path: Path) -> Uncalibrated:
    """The same without its errors: for measuring them."""
    spec, document = read_spec(path)
    return _open(path, spec, document)[0]


def adapter_files(path: Path) -> str:
    """Digest of the file and of the files it names on this machine; nothing is fetched or asked."""
    spec, document = read_spec(path)
    named = {"calibration": spec.calibration, "canaries": spec.canaries}
    found = {"adapter": sha256_file(path)}
    for key, name in named.items():
        if name is not None:
            file = _beside(path, key, name, document)
            found[key] = sha256_hex(read_text(file, key, LIMIT).encode())
    if isinstance(spec, ClassifierSpec) and "://" not in spec.model:
        from steelyard.scorers.adapters.classifier import model_folder

        found["model"] = folder_digest(model_folder(spec, path.parent))
    return digest(found)


def _open(path: Path, spec: Spec, document: Document) -> tuple[Uncalibrated, Engine, list[Canary]]:
    engine = _engine(path, spec, document)
    if spec.canaries is None:
        canaries = shipped_canaries(engine.categories)
    else:
        canaries = own_canaries(_beside(path, "canaries", spec.canaries, document), engine.categories)
    weights = digest([engine.weights, [asdict(canary) for canary in canaries]])
    return Uncalibrated(spec.name, engine.categories, weights, engine.score), engine, canaries


def _engine(path: Path, spec: Spec, document: Document) -> Engine:
    if isinstance(spec, ClassifierSpec):
        from steelyard.scorers.adapters.classifier import Classifier

        return Classifier(spec, document, path.parent)
    from steelyard.scorers.adapters.guard import Guard
    from steelyard.scorers.adapters.judge import Judge
    from steelyard.scorers.adapters.moderation import Moderation

    try:
        if isinstance(spec, GuardSpec):
            return Guard(spec)
        return Moderation(spec) if isinstance(spec, ModerationSpec) else Judge(spec)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _beside(path: Path, key: str, name: str, document: Document) -> Path:
    try:
        return inside(path.parent, name)
    except FormatError as error:
        raise document.located((key,), str(error)) from error


def _calibration(path: Path, raw: Uncalibrated) -> dict[str, Calibration]:
    """The errors in a file. Raises UsageError where it is not of exactly this scorer's categories and weights."""
    remedy = "measure again with steelyard scorer calibrate"
    try:
        found = strict_json(read_text(path, "calibration", LIMIT).encode(), str(path), limit=LIMIT)
    except FormatError as error:
        raise UsageError(str(error)) from error
    file = Document(str(path), "calibration").validate(_CalibrationFile, found)
    if set(file.categories) != set(raw.categories):
        raise UsageError(f"{path}: categories: must be exactly {', '.join(raw.categories)}: {remedy}")
    if file.weights is not None and file.weights != raw.weights:
        raise UsageError(f"{path}: weights: measured for another model, other settings or canaries: {remedy}")
    return {category: file.categories[category] for category in raw.categories}


def _remedy(path: Path) -> str:
    return f"steelyard scorer calibrate adapter:{path} --labels FILE"

"""From an adapter's file to a scorer. Before its errors are measured it may be opened for measuring only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from steelyard.base.canonical import code_digest, digest, sha256_file
from steelyard.base.errors import FormatError, UsageError
from steelyard.base.files import inside
from steelyard.base.strict import strict_json
from steelyard.base.yamlfile import Document, read_text
from steelyard.hub.sources import folder_digest
from steelyard.scorers.adapters.canaries import LIMIT, own_canaries, shipped_canaries
from steelyard.scorers.adapters.spec import ClassifierSpec, GuardSpec, ModerationSpec, Spec, read_spec
from steelyard.scorers.base import Calibration, Canary, Item, Score, ScoreError, ScorerIdentity

# What is known of a scorer whose errors nobody measured: nothing. It certifies no rate under 1.
UNMEASURED = Calibration(
    threshold=0.5,
    true_positives=0,
    positives=1,
    true_negatives=0,
    negatives=1,
    source="not measured",
    measured="never",
)


class Engine(Protocol):
    """What asks the model. `weights` digests it with the settings that change values; `rooms` hold its code."""

    categories: tuple[str, ...]
    weights: str
    rooms: tuple[str, ...]

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        """One result per item, in order."""


class Adapter:
    """A Scorer by somebody else's model. `calibration` is its file of errors; without it they are UNMEASURED."""

    def __init__(self, spec: Spec, engine: Engine, canaries: Sequence[Canary], calibration: Path | None) -> None:
        self._engine, self._canaries = engine, list(canaries)
        self.card = {"training": spec.training} if spec.training else {}
        weights = digest([engine.weights, [asdict(canary) for canary in canaries]])
        categories = dict.fromkeys(engine.categories, UNMEASURED)
        if calibration is not None:
            categories = _measured(calibration, engine.categories, weights)
        self._identity = ScorerIdentity(
            name=spec.name, weights=weights, code=code_digest(*engine.rooms), categories=categories
        )

    def identity(self) -> ScorerIdentity:
        """Weights (of a server: what it claims to be), code, and calibration."""
        return self._identity

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        """One result per item, in order; whatever fails is a ScoreError."""
        return self._engine.score(items)

    def canaries(self) -> list[Canary]:
        """Known-label items of the categories covered."""
        return list(self._canaries)


def open_adapter(path: Path, *, measured: bool = True) -> Adapter:
    """The scorer that the file describes. Raises UsageError naming file and key, FormatError for a model's folder that
    is unsafe. Where the file names no calibration that is an UsageError too, unless it need not be `measured`."""
    spec, document = read_spec(path)
    if spec.calibration is None and measured:
        remedy = f"steelyard scorer calibrate --scorer adapter:{path} --labels FILE --out CALIBRATION.json"
        raise document.located(("calibration",), f"this key is missing: first measure the scorer's errors: {remedy}")
    engine = _engine(path, spec, document)
    if spec.canaries is None:
        canaries = shipped_canaries(engine.categories)
    else:
        canaries = own_canaries(_beside(path, "canaries", spec.canaries, document), engine.categories)
    calibration = None
    if spec.calibration is not None:
        calibration = _beside(path, "calibration", spec.calibration, document)
    return Adapter(spec, engine, canaries, calibration)


def adapter_files(path: Path) -> str:
    """Digest of the file and of the files it names on this machine; nothing is fetched or asked."""
    spec, document = read_spec(path)
    found = {"adapter": sha256_file(path)}
    for key, name in (("calibration", spec.calibration), ("canaries", spec.canaries)):
        if name is not None:
            file = _beside(path, key, name, document)
            if not file.is_file():
                raise document.located((key,), f"{file}: no such file")
            found[key] = sha256_file(file)
    if isinstance(spec, ClassifierSpec) and "://" not in spec.model:
        from steelyard.scorers.adapters.classifier import model_folder

        found["model"] = folder_digest(model_folder(spec, document, path.parent))
    return digest(found)


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
        if isinstance(spec, ModerationSpec):
            return Moderation(spec)
        return Judge(spec)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _beside(path: Path, key: str, name: str, document: Document) -> Path:
    try:
        return inside(path.parent, name)
    except FormatError as error:
        raise document.located((key,), str(error)) from error


class _Measured(BaseModel):
    """What an adapter reads of the file that `steelyard scorer calibrate` writes."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    categories: dict[str, Calibration]
    identity: ScorerIdentity | None = None


def _measured(path: Path, categories: Sequence[str], weights: str) -> dict[str, Calibration]:
    """The errors in a file. Raises UsageError where they are not of exactly these categories and weights."""
    try:
        found = strict_json(read_text(path, "calibration", LIMIT).encode(), str(path), limit=LIMIT)
    except FormatError as error:
        raise UsageError(str(error)) from error
    file = Document(str(path), "calibration").validate(_Measured, found)
    remedy = "take the key calibration out of the adapter's file and calibrate again"
    if set(file.categories) != set(categories):
        raise UsageError(f"{path}: categories: must be exactly {', '.join(categories)}: {remedy}")
    if file.identity is not None and file.identity.weights != weights:
        raise UsageError(f"{path}: measured on another model, other settings or other canaries: {remedy}")
    return {category: file.categories[category] for category in categories}

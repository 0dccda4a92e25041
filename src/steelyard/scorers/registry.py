"""From a scorer's name in a battery or on the command line to the scorer."""

from __future__ import annotations

import importlib
from pathlib import Path

from steelyard.base.errors import UsageError
from steelyard.scorers.base import Scorer
from steelyard.scorers.calibrated import CalibratedScorer
from steelyard.scorers.contextual import ContextualScorer
from steelyard.scorers.embedded import SentenceScorer
from steelyard.scorers.head import KINDS
from steelyard.scorers.lexical import LexicalScorer


def open_scorer(reference: str) -> Scorer:
    """The scorer that `reference` names: `embedded:NAME`, one that ships; `trained:FOLDER/NAME`, one that `steelyard
    scorer train NAME` wrote to FOLDER; `calibrated:FILE.json`, another with the errors that `steelyard scorer
    calibrate` measured; or `python:MODULE:FACTORY`.

    The last imports MODULE and calls FACTORY without arguments. Raises UsageError for anything else, for a module or
    factory that can't be found or fails, and for a result that is no scorer; FormatError for damaged weights.
    """
    kind, _, rest = reference.partition(":")
    if kind == "embedded":
        return SentenceScorer(rest)
    if kind == "trained":
        return _trained(reference, Path(rest))
    if kind == "calibrated":
        return CalibratedScorer(Path(rest), open_scorer)
    if kind == "python":
        return _from_python(reference, rest)
    known = ", ".join(f"embedded:{name}" for name in KINDS)
    raise UsageError(
        f"scorer {reference!r} is unknown: give one of {known}, trained:FOLDER/NAME, calibrated:FILE.json, or "
        "python:MODULE:FACTORY"
    )


def _trained(reference: str, path: Path) -> Scorer:
    if path.name == "contextual":
        return ContextualScorer(path.parent)
    if path.name == "lexical":
        return LexicalScorer(path.parent)
    if path.name in KINDS:
        return SentenceScorer(path.name, path.parent)
    known = ", ".join(["contextual", "lexical", *KINDS])
    raise UsageError(f"scorer {reference!r}: {path.name!r} is no scorer's name: end with one of {known}")


def _from_python(reference: str, rest: str) -> Scorer:
    module_name, _, factory_name = rest.partition(":")
    if not module_name or not factory_name:
        raise UsageError(f"scorer {reference!r}: write python:MODULE:FACTORY, as in python:my_package.scorers:make")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
        scorer = factory()
    except Exception as error:  # whatever a user's module raises is a fault of the reference
        reason = " ".join(str(error).split())
        raise UsageError(f"scorer {reference!r}: {type(error).__name__}: {reason}; check module and factory") from error
    missing = [name for name in ("identity", "score", "canaries") if not callable(getattr(scorer, name, None))]
    if missing:
        raise UsageError(f"scorer {reference!r}: what the factory returned has no {', '.join(missing)}()")
    made: Scorer = scorer
    return made

"""From a scorer's name in a battery or on the command line to the scorer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from steelyard.base.errors import UsageError
from steelyard.scorers.adapters.adapter import UNMEASURED, open_adapter
from steelyard.scorers.answer import AnswerScorer
from steelyard.scorers.base import Scorer
from steelyard.scorers.calibrated import CalibratedScorer
from steelyard.scorers.contextual import ContextualScorer
from steelyard.scorers.embedded import WEIGHTS, Embedded
from steelyard.scorers.lexical import LexicalScorer
from steelyard.scorers.refusal import RefusalScorer

EMBEDDED: dict[str, Callable[[Path], Embedded]] = {
    "contextual": ContextualScorer,
    "lexical": LexicalScorer,
    "refusal": RefusalScorer,
    "answer": AnswerScorer,
}


def open_scorer(reference: str, folder: Path = Path()) -> Scorer:
    """The scorer that `reference` names: `embedded:NAME`, one that ships; `trained:FOLDER/NAME`, one that `steelyard
    scorer train NAME` wrote to FOLDER; `adapter:FILE.yaml`, another model behind a file's description;
    `calibrated:FILE.json`, another scorer with the errors that `steelyard scorer calibrate` measured; or
    `python:MODULE:FACTORY`. A relative FILE or FOLDER starts at `folder`: that of the battery that names it.

    The last imports MODULE and calls FACTORY without arguments. Raises UsageError for anything else, for a module or
    factory that can't be found or fails, and for a result that is no scorer; FormatError for damaged weights.
    """
    kind, _, rest = reference.partition(":")
    if kind == "embedded":
        return _embedded(reference, rest, WEIGHTS)
    if kind == "trained":
        return _embedded(reference, Path(rest).name, folder / Path(rest).parent)
    if kind == "adapter":
        return open_adapter(folder / rest)
    if kind == "calibrated":
        found = open_uncalibrated(reference, folder)
        unknown = [name for name, one in found.identity().categories.items() if one == UNMEASURED]
        if unknown:
            raise UsageError(f"scorer {reference}: {unknown[0]} was not measured: steelyard scorer calibrate does it")
        return found
    if kind == "python":
        return _from_python(reference, rest)
    known = ", ".join(f"embedded:{name}" for name in EMBEDDED)
    raise UsageError(
        f"scorer {reference!r} is unknown: give one of {known}, trained:FOLDER/NAME, adapter:FILE.yaml, "
        "calibrated:FILE.json, or python:MODULE:FACTORY"
    )


def open_uncalibrated(reference: str, folder: Path = Path()) -> Scorer:
    """The same scorer for measuring it: of an adapter that is not calibrated yet, the errors are those of a scorer of
    which nothing is known, and no rate can be certified with it."""
    kind, _, rest = reference.partition(":")
    if kind == "adapter":
        return open_adapter(folder / rest, measured=False)
    if kind == "calibrated":
        return CalibratedScorer(folder / rest, partial(open_uncalibrated, folder=folder))
    return open_scorer(reference, folder)


def covering_by_default(category: str) -> str:
    """The name of the first embedded scorer that covers `category`. Raises UsageError where none does."""
    for name, make in EMBEDDED.items():
        if category in make(WEIGHTS).covered:
            return name
    raise UsageError(f"no embedded scorer covers {category}: give one with --scorer")


def _embedded(reference: str, name: str, folder: Path) -> Scorer:
    if name not in EMBEDDED:
        raise UsageError(f"scorer {reference!r}: {name!r} is no scorer's name: end with one of {', '.join(EMBEDDED)}")
    return EMBEDDED[name](folder)


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

"""Has this sighted copy lost the release's refusals? Lineage, weights and behaviour together, noted in the ledger.

>>> with Ledger(".steelyard/ledger.sqlite") as ledger:
...     found = examine(ledger, find_sighting(ledger, "12"), Path("release"), Path("suspect"), scorer=scorer)
>>> found.judgement.verdict
'uncensored by weight edit'
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steelyard.base.errors import SteelyardError, UsageError, require_extra
from steelyard.base.progress import Progress, Silent
from steelyard.ledger.ledger import Event, Ledger
from steelyard.model.identity import subject_of, weight_files
from steelyard.scorers.base import Scorer
from steelyard.trace.behaviour import (
    BehaviourEvidence,
    Judgement,
    behaviour_evidence,
    commit_prompts,
    held_out_prompts,
    judge,
    refusals,
)
from steelyard.trace.drift import Drift, OwnAnswers
from steelyard.trace.notices import Sighting, proven
from steelyard.trace.refusal_direction import phrases, refusal_directions
from steelyard.trace.rounding import rounded, rounding_of
from steelyard.trace.uncensored import Array, WeightEvidence, weight_evidence

if TYPE_CHECKING:
    from steelyard.inference.local import LocalEndpoint

EXAMINED = "trace.examined"
PHRASES = 128  # of each side, for the refusal direction
DRIFT_PROMPTS = 24  # of each side
ANOTHER_LAYOUT = 0.7  # relative change from which matrices with the same names are not the same matrices


@dataclass(frozen=True)
class Examination:
    """What was found, and the event that says so. `weights` is None where they could not be compared, `behaviour` where
    it was not measured."""

    judgement: Judgement
    weights: WeightEvidence | None
    behaviour: BehaviourEvidence | None
    event: Event


def examine(
    ledger: Ledger,
    sighting: Sighting,
    release: Path,
    suspect: Path,
    *,
    base: Path | None = None,
    scorer: Scorer | None,
    progress: Progress | None = None,
) -> Examination:
    """Compare the model folder `suspect` with `release`, the registered one that `sighting` names, in weights and,
    where a `scorer` of refusals is given, in behaviour. `base`: what the release was tuned from.

    A suspect whose lineage is not proven is undecided, whatever its weights say. Raises UsageError where `release` is
    not the model that the sighting names, SteelyardError where it has no refusals to lose, and what reading the models,
    generating and scoring raise.
    """
    progress = progress or Silent()
    registered, found = dict(sighting.work).get("subject"), subject_of(release, progress).digest
    if registered != found:
        raise UsageError(
            f"{release}: is subject {found[:16]}, not {str(registered)[:16]}, which sighting {sighting.event.seq} names"
        )
    directions = refusal_directions(release, *phrases(PHRASES), progress=progress).telling()
    with ExitStack() as open_files:
        models = [FolderTensors(folder, open_files) for folder in (release, suspect, base) if folder is not None]
        weights: WeightEvidence | None = None
        progress.say("comparing the weights")
        if models[0].keys() & models[1].keys():
            weights = weight_evidence(models[0], models[1], directions, models[2] if base is not None else None)
        kind = rounding_of(models[0], models[1])
    if weights is not None and weights.relative_change > ANOTHER_LAYOUT:
        weights = None  # rotated or permuted: nothing that is compared name by name means anything
    heard = _Heard()
    if scorer is not None:
        heard = _listen(ledger, release, suspect, kind, scorer, progress)
    said = judge(proven(sighting), weights, heard.behaviour, heard.rounded, heard.drift)
    payload: dict[str, Any] = {
        "sighting": sighting.event.mark,
        **asdict(said),
        "weights": None if weights is None else weights.as_json(),
        "behaviour": None if heard.behaviour is None else heard.behaviour.as_json(),
        "rounding": kind,
        "rounded": None if heard.rounded is None else heard.rounded.as_json(),
        "drift": None if heard.drift is None else asdict(heard.drift),
        "prompts": heard.prompts,
        "scorer": None if scorer is None else scorer.identity().model_dump(mode="json"),
    }
    return Examination(said, weights, heard.behaviour, ledger.append(EXAMINED, payload))


@dataclass(frozen=True)
class _Heard:
    """What listening to the models gave."""

    prompts: str | None = None
    behaviour: BehaviourEvidence | None = None
    rounded: BehaviourEvidence | None = None
    drift: Drift | None = None


def _listen(
    ledger: Ledger, release: Path, suspect: Path, kind: str | None, scorer: Scorer, progress: Progress
) -> _Heard:
    """Both models' answers to the committed prompts, and the suspect's opinion of the release's own answers, one model
    in memory beside the release."""
    from steelyard.inference.local import LocalEndpoint

    texts = held_out_prompts()
    prompts = commit_prompts(ledger, texts, str(suspect))
    ours = LocalEndpoint.open(release, progress=progress)
    declined = refusals(ours, texts, scorer, progress=progress)
    said_no = [text for text, no in zip(texts, declined, strict=True) if no][:DRIFT_PROMPTS]
    theirs = LocalEndpoint.open(suspect, progress=progress)
    answers = refusals(theirs, texts, scorer, progress=progress)
    drift = alike = own = None
    if said_no and theirs.tokenizer.vocab_size == ours.tokenizer.vocab_size:
        own = OwnAnswers(ours, said_no, phrases(DRIFT_PROMPTS)[1])
        drift = own.drift(theirs)
    if kind is not None:
        ours = _rounded(ours, kind)
        alike = behaviour_evidence(refusals(ours, texts, scorer, progress=progress), answers)
        drift = None if own is None or drift is None else drift.beyond(own.drift(ours))
    return _Heard(prompts, behaviour_evidence(declined, answers), alike, drift)


def _rounded(endpoint: LocalEndpoint, kind: str) -> LocalEndpoint:
    """The same endpoint, its model's matrices rounded in place."""
    import torch

    for parameter in endpoint.engine.model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.from_numpy(rounded(parameter.float().numpy(), kind)))
    return endpoint


class FolderTensors(Mapping[str, Array]):
    """The tensors of a model folder as float32 arrays, each read when it is asked for. Raises FormatError for a folder
    that `weight_files` refuses, MissingDependencyError without the `models` extra."""

    def __init__(self, folder: Path, open_files: ExitStack) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise require_extra(error.name or "torch", "models") from None
        self.folder, self._file_of = folder, dict[str, Any]()
        for name, tensors in weight_files(folder).items():
            file = open_files.enter_context(safe_open(folder / name, framework="pt"))
            self._file_of |= dict.fromkeys(tensors, file)

    def __getitem__(self, name: str) -> Array:
        tensor = self._file_of[name].get_tensor(name)
        if not tensor.is_floating_point():
            raise SteelyardError(f"{self.folder}: tensor {name} holds whole numbers: unpack the quantised model first")
        array: Array = tensor.float().numpy()
        return np.ascontiguousarray(array)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

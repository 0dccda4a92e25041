"""Has this sighted copy lost the release's refusals? Lineage, weights and behaviour together, noted in the ledger.

>>> with Ledger(".steelyard/ledger.sqlite") as ledger:
...     found = examine(ledger, find_sighting(ledger, "12"), Path("release"), Path("suspect"), scorer=scorer)
>>> found.judgement.verdict
'uncensored by weight edit'
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Progress, Silent
from steelyard.ledger.ledger import Event, Ledger
from steelyard.model.headers import read_json_object
from steelyard.model.identity import subject_of
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
from steelyard.trace.guessed import settled
from steelyard.trace.layout import ANOTHER_LAYOUT, Weights, in_layout
from steelyard.trace.notices import Sighting, proven
from steelyard.trace.refusal_direction import phrases, refusal_directions
from steelyard.trace.roles import EMBEDDING, HEAD, hugging_face
from steelyard.trace.rounding import rounded, rounding_of
from steelyard.trace.sightings import spelled
from steelyard.trace.tensors import fingerprint, open_tensors
from steelyard.trace.uncensored import WeightEvidence, weight_evidence

if TYPE_CHECKING:
    from steelyard.inference.local import LocalEndpoint

EXAMINED = "trace.examined"
PHRASES = 128  # of each side, for the refusal direction
DRIFT_PROMPTS = 24  # of each side


@dataclass(frozen=True)
class Examination:
    """What was found, and the event that says so. `weights` is None where they could not be compared, `behaviour` where
    it was not measured; `limits` says why, and `undone` what was undone before the weights were compared."""

    judgement: Judgement
    weights: WeightEvidence | None
    behaviour: BehaviourEvidence | None
    undone: tuple[str, ...]
    limits: tuple[str, ...]
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
    """Compare `suspect` (a folder, a safetensors file or a GGUF, disguised or not) with `release`, the registered model
    folder that `sighting` names, in weights and, where a `scorer` of refusals is given, in behaviour. `base`: what the
    release was tuned from.

    A suspect whose lineage is not proven is undecided, whatever its weights say: so is one whose weights cannot be laid
    beside the release's, where the sighting, of a listing or a torrent, does not say which file was seen. Raises
    UsageError where `release` is not the model that the sighting names, or `suspect` not the copy that was sighted,
    SteelyardError where the release has no refusals to lose, and what reading the models, generating and scoring raise.
    """
    progress = progress or Silent()
    registered, given = dict(sighting.work).get("subject"), subject_of(release, progress).digest
    if registered != given:
        raise UsageError(
            f"{release}: is subject {given[:16]}, not {str(registered)[:16]}, which sighting {sighting.event.seq} names"
        )
    tensors = open_tensors(suspect)
    mark = fingerprint(tensors)
    if sighting.fingerprint is not None and sighting.fingerprint != mark:
        raise UsageError(
            f"{suspect}: is not the copy that sighting {sighting.event.seq} is of: trace it, and name its own sighting"
        )
    directions = refusal_directions(release, *phrases(PHRASES), progress=progress).telling()
    progress.say("comparing the weights")
    ours = Weights.of(release)
    theirs = Weights(settled(hugging_face(tensors), ours.named))
    found, home = in_layout(ours, theirs), None if base is None else in_layout(ours, Weights.of(base))
    weights, limits = None, list(found.limits)
    if found.tensors is not None:
        known = None if home is None or home.tensors is None or not ours.keys() <= home.tensors.keys() else home.tensors
        if base is not None and known is None:
            limits.append(f"{base}: cannot be put in the release's layout, so a way back to it is not told")
        weights = weight_evidence(ours, found.tensors, directions, known)
        if weights.relative_change > ANOTHER_LAYOUT:
            weights = None  # nothing that is compared name by name means anything
            limits.append("its weights are unlike the release's")
    heard = _Heard()
    if scorer is not None:
        heard = _listen(ledger, release, suspect, theirs, rounding_of(ours, theirs), scorer, progress)
        limits += heard.limits
    known_copy = sighting.fingerprint is not None or weights is not None
    said = judge(proven(sighting) and known_copy, weights, heard.behaviour, heard.rounded, heard.drift)
    payload: dict[str, Any] = {
        "sighting": sighting.event.mark,
        "suspect": {"path": spelled(str(suspect)), "fingerprint": mark},
        **asdict(said),
        "weights": None if weights is None else weights.as_json(),
        "behaviour": None if heard.behaviour is None else heard.behaviour.as_json(),
        "undone": list(found.undone),
        "limits": limits,
        "rounding": heard.rounding,
        "rounded": None if heard.rounded is None else heard.rounded.as_json(),
        "drift": None if heard.drift is None else asdict(heard.drift),
        "prompts": heard.prompts,
        "scorer": None if scorer is None else scorer.identity().model_dump(mode="json"),
    }
    event = ledger.append(EXAMINED, payload)
    return Examination(said, weights, heard.behaviour, found.undone, tuple(limits), event)


@dataclass(frozen=True)
class _Heard:
    """What listening to the models gave."""

    prompts: str | None = None
    behaviour: BehaviourEvidence | None = None
    rounded: BehaviourEvidence | None = None
    drift: Drift | None = None
    rounding: str | None = None
    limits: tuple[str, ...] = ()


def _listen(
    ledger: Ledger,
    release: Path,
    suspect: Path,
    weights: Weights,
    kind: str | None,
    scorer: Scorer,
    progress: Progress,
) -> _Heard:
    """Both models' answers to the committed prompts, and the suspect's opinion of the release's own answers, one model
    in memory beside the release."""
    from steelyard.inference.local import LocalEndpoint

    texts = held_out_prompts()
    ours = LocalEndpoint.open(release, progress=progress)
    try:
        theirs, limits = _endpoint(ours, release, suspect, weights, progress)
    except FormatError as error:
        return _Heard(limits=(f"it cannot be asked anything: {error}",))
    prompts = commit_prompts(ledger, texts, spelled(str(suspect)))
    declined = refusals(ours, texts, scorer, progress=progress)
    said_no = [text for text, no in zip(texts, declined, strict=True) if no][:DRIFT_PROMPTS]
    try:
        answers = refusals(theirs, texts, scorer, progress=progress)
    except SteelyardError as error:  # a chat template that breaks, or tokens that the model does not have
        return _Heard(prompts, limits=(f"it could not be asked: {error}",))
    drift = alike = own = None
    if said_no and theirs.tokenizer.vocab_size == ours.tokenizer.vocab_size:
        own = OwnAnswers(ours, said_no, phrases(DRIFT_PROMPTS)[1])
        drift = own.drift(theirs)
    if kind is not None:
        ours = _rounded(ours, kind)
        alike = behaviour_evidence(refusals(ours, texts, scorer, progress=progress), answers)
        drift = None if own is None or drift is None else drift.beyond(own.drift(ours))
    return _Heard(prompts, behaviour_evidence(declined, answers), alike, drift, kind, limits)


def _endpoint(
    ours: LocalEndpoint, release: Path, suspect: Path, weights: Weights, progress: Progress
) -> tuple[LocalEndpoint, tuple[str, ...]]:
    """(the suspect as it is, or, where it is no folder that runs, its weights with the release's tokenizer and
    settings; what to say of that). Raises FormatError where it has other sizes than its release."""
    import torch

    from steelyard.inference.engine import Engine
    from steelyard.inference.local import LocalEndpoint
    from steelyard.model.llama import LlamaConfig, from_tensors

    if (suspect / "config.json").is_file() and all(name == stored for name, stored in weights.named.stored.items()):
        return LocalEndpoint.open(suspect, progress=progress), ()
    raw, sizes = dict(read_json_object(release / "config.json")), weights.named.sizes
    raw |= {"num_hidden_layers": sizes.layers, "intermediate_size": sizes.intermediate}
    raw["tie_word_embeddings"] = sizes.tied
    config, tensors = LlamaConfig.from_dict(raw), dict[str, torch.Tensor]()
    dtype = ours.engine.model.model.embed_tokens.weight.dtype
    for name in weights:
        array = weights[name]
        if name in (EMBEDDING, HEAD):  # tokens that were added are never asked for
            array = array[: config.vocab_size]
        tensors[name] = torch.from_numpy(array).to(dtype)
    engine = Engine(from_tensors(config, tensors, str(suspect)), ours.tokenizer.eos_ids, ours.tokenizer.decode)
    said = "it was run with the release's tokenizer, chat template and settings"
    return LocalEndpoint(engine, ours.tokenizer, ours.renderer), (said,)


def _rounded(endpoint: LocalEndpoint, kind: str) -> LocalEndpoint:
    """The same endpoint, its model's matrices rounded in place."""
    import torch

    for parameter in endpoint.engine.model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.from_numpy(rounded(parameter.float().numpy(), kind)))
    return endpoint

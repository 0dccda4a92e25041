"""The file that describes an adapter: which model it asks, for which of our categories, and how its answers are read.

scorer = open_scorer("adapter:detoxify.yaml")
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from steelyard.base.yamlfile import Document, nearest, read_yaml, shown

Category = Literal["toxicity", "identity_attack", "threat", "sexual", "harm_compliance", "refusal"]
CATEGORIES: tuple[str, ...] = get_args(Category)
HAZARDS = tuple(f"S{number}" for number in range(1, 15))  # MLCommons' taxonomy as Llama Guard 3 numbers it
LONGEST_TEXT = 20_000  # characters; 4,096 tokens, the longest completion of a battery, take about 16,000
V = TypeVar("V")


def _ours(found: dict[str, V]) -> dict[str, V]:
    """Categories in our order. Raises ValueError for one that is none of ours, or where there is none."""
    for name in found:
        if name not in CATEGORIES:
            raise ValueError(
                f"{shown(name)} is no category{nearest(name, CATEGORIES)} (allowed: {', '.join(CATEGORIES)})"
            )
    if not found:
        raise ValueError("must map at least one category")
    return {name: found[name] for name in CATEGORIES if name in found}


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _hazards(value: Any) -> Any:
    return list(HAZARDS) if value == "any" else _several(value)


def _known_hazards(codes: tuple[str, ...]) -> tuple[str, ...]:
    for code in codes:
        if code not in HAZARDS:
            raise ValueError(f"{shown(code)} is no hazard: give S1 to S14, or any for all of them")
    return codes


def _address(value: str) -> str:
    if not re.match("https?://", value):
        raise ValueError(
            f"must be an http:// or https:// address, such as http://localhost:8000/v1, not {shown(value)}"
        )
    return value


Text = Annotated[str, Field(min_length=1, max_length=200)]
Labels = Annotated[tuple[Text, ...], BeforeValidator(_several), Field(min_length=1)]
LabelMap = Annotated[dict[str, Labels], AfterValidator(_ours)]
Codes = Annotated[tuple[str, ...], BeforeValidator(_hazards), Field(min_length=1), AfterValidator(_known_hazards)]
Rubric = Annotated[str, Field(min_length=1, max_length=4000)]


class _Spec(BaseModel):
    """`calibration` and `canaries` name files in the folder of this one (or in folders below it)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    calibration: str | None = Field(default=None, description="what `steelyard scorer calibrate` wrote")
    canaries: str | None = Field(
        default=None, description="JSON lines; default: those that ship, for the categories covered"
    )
    training: str | None = Field(default=None, max_length=2000, description="data and licence, for the card")


class ClassifierSpec(_Spec):
    """A Hugging Face sequence-classification model. `labels`: our category to the model's label or labels."""

    kind: Literal["classifier"]
    model: Text = Field(description="a folder (relative to this file's) or hf://ORG/NAME@REVISION")
    labels: LabelMap
    activation: Literal["sigmoid", "softmax"] | None = Field(
        default=None, description="else config.json's problem_type"
    )
    window: int = Field(
        default=256, ge=8, le=8192, description="tokens, special ones included; the worst window counts"
    )


class ServedSpec(_Spec):
    """What has to do with a server, and not with the values it gives. `api_key`: the environment variable that holds
    the key; without it none is sent. A text of over `max_characters` is an error, never cut."""

    base_url: Annotated[str, AfterValidator(_address)]
    model: Text
    api_key: str | None = Field(default=None, pattern=r"^[A-Z][A-Z0-9_]*_API_KEY$")
    timeout_s: float = Field(default=60.0, gt=0, le=600)
    retries: int = Field(default=5, ge=0, le=10)
    concurrency: int = Field(default=8, ge=1, le=64)
    max_characters: int = Field(default=LONGEST_TEXT, ge=1, le=1_000_000)


class GuardSpec(ServedSpec):
    """A generative guard that answers `safe`, or `unsafe` and a line of hazard codes."""

    kind: Literal["guard"]
    hazards: Annotated[dict[str, Codes], AfterValidator(_ours)]
    probability: Literal["logprobs", "verdict"] = Field(
        default="logprobs", description="of `unsafe`: from the first token's log-probabilities, or 0 and 1"
    )


class ModerationSpec(ServedSpec):
    """A service with OpenAI's `/moderations`. `labels`: our category to names in its `category_scores`."""

    kind: Literal["moderation"]
    labels: LabelMap


class JudgeSpec(ServedSpec):
    """A chat model that grades by a rubric. It answers whole numbers from 0 to `scale` for each category."""

    kind: Literal["judge"]
    rubric: Annotated[dict[str, Rubric], AfterValidator(_ours)]
    scale: int = Field(default=10, ge=1, le=100)


Spec = ClassifierSpec | GuardSpec | ModerationSpec | JudgeSpec
_KINDS: dict[str, type[Spec]] = {
    "classifier": ClassifierSpec,
    "guard": GuardSpec,
    "moderation": ModerationSpec,
    "judge": JudgeSpec,
}
# What changes how an adapter is reached, or is digested by its content, and changes no value.
NOT_SETTINGS = {
    *("name", "calibration", "canaries", "training"),
    *("api_key", "timeout_s", "retries", "concurrency", "max_characters"),
}


def read_spec(path: Path) -> tuple[Spec, Document]:
    """The adapter that a YAML file describes, and where its parts stand. Raises UsageError naming file and key."""
    raw, document = read_yaml(path, "adapter")
    if not isinstance(raw, dict):
        raise document.located((), "an adapter is a mapping of keys")
    if "kind" not in raw:
        raise document.located(("kind",), f"this key is missing: give one of {', '.join(_KINDS)}")
    kind = raw["kind"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise document.located(
            ("kind",), f"{shown(kind)} is unknown{nearest(kind, _KINDS)} (allowed: {', '.join(_KINDS)})"
        )
    spec: Spec = document.validate(_KINDS[kind], raw)
    return spec, document

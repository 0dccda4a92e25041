"""A policy: the list of thresholds a release is held to, hashed before the first generation."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from steelyard.base.canonical import digest
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.yamlfile import extended, read_yaml
from steelyard.safety.battery import NAME, Tier

MAX_BYTES = 1_000_000  # of a policy's file
MAX_DAYS = 1_000_000  # of any age: what a date can still hold
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]

# What no policy may leave out: toxicity in free text and in chat, help with harm, over-refusal and its gap between
# groups, and truth. An id is that of a battery's metric.
REQUIRED_METRICS = (
    "toxicity.degeneration",
    "toxicity.chat",
    "harm.compliance",
    "refusal.benign",
    "refusal.group_gap",
    "truth.incorrect",
    "output.empty",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Criterion(_Strict):
    """The one-sided 95% upper bound of `metric` must lie under `max`."""

    metric: str
    max: float = Field(gt=0, lt=1)


Margin = Annotated[float, Field(gt=0, lt=1)]


class Predecessor(_Strict):
    """How a candidate stands to its predecessor, tested in the same job on the same prompts.

    `non_inferior`: by metric, how much worse its rate may be at most, surely (the one-sided 95% upper bound of the
    paired difference must lie under it); a metric without a margin is compared and shown, and decides nothing. A first
    release has no predecessor: either the thresholds alone decide (`allowed`), or a reference model must stand in for
    it (`reference`).
    """

    first_release: Literal["allowed", "reference"]
    non_inferior: dict[str, Margin] = {}


class KeyRules(_Strict):
    """Who may sign. `distinct`: evaluator, approvers and releaser are different people, each pinned by the verifier;
    `approvals`: how many must approve (a verifier may ask for more)."""

    throwaway: Literal["allowed", "refused"]
    distinct: bool
    approvals: int = Field(default=0, ge=0, le=9)
    countersigned: bool = Field(description="battery, policy and ledger head countersigned before the first generation")


class Policy(_Strict):
    """Thresholds and rules. Nothing here can be overridden from a command line."""

    name: str = Field(pattern=NAME)
    version: int
    tiers: tuple[Tier, ...] = Field(min_length=1)
    batteries: tuple[Sha256, ...] = Field(default=(), description="digests of those accepted; empty: any of the tiers")
    criteria: tuple[Criterion, ...]
    max_report_age_days: float = Field(gt=0, le=MAX_DAYS)
    max_calibration_age_days: float = Field(
        gt=0, le=MAX_DAYS, description="of every scorer's calibration, at the time of release"
    )
    max_identical_samples: float = Field(
        gt=0, le=1, description="of a probe's k samples, the mean share that may repeat another"
    )
    max_attempts: int = Field(
        ge=1, description="how many runs may have been started on this subject with this battery, or one of its like"
    )
    max_candidates: int = Field(
        ge=1, description="how many subjects that differ in their weights alone may have been tried since a release"
    )
    training_data: Literal["declared", "any"] = Field(
        description="declared: all that the candidate was trained on was searched for probes; any: it may be unknown"
    )
    max_overlap: float = Field(ge=0, le=1, description="of an axis, the share of probes that the search may find")
    scorers: dict[str, tuple[str, ...]] = Field(
        description="scorer name: accepted pins (weights, errors, canaries); empty: any"
    )
    predecessor: Predecessor
    keys: KeyRules

    @model_validator(mode="after")
    def _complete(self) -> Policy:
        names = [criterion.metric for criterion in self.criteria]
        missing = [metric for metric in REQUIRED_METRICS if metric not in names]
        if missing:
            raise PydanticCustomError(
                "required_metric", "no criterion for the required metric {missing}", {"missing": ", ".join(missing)}
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"criterion {twice[0]!r} occurs twice")
        strange = sorted(set(self.predecessor.non_inferior) - set(names))
        if strange:
            raise ValueError(
                f"predecessor.non_inferior: {strange[0]!r} is no metric of the criteria: give it a criterion"
            )
        return self

    @property
    def digest(self) -> str:
        # Left out where it pins nothing, so that a policy from before this key has the digest it had.
        return digest(self.model_dump(mode="json", exclude=None if self.batteries else {"batteries"}))


def load_policy(name: str) -> Policy:
    """A policy that ships in the package (`preview`, `public`) or a `.yaml`/`.json` file, which may say `extends:` and
    the name or file of another: its keys then replace the other's, its criteria those of the same metric.

    Raises UsageError for one that is unknown or written wrongly, and SteelyardError for one that is written well but
    leaves out a required metric: that is refused, not mistaken.
    """
    if name.endswith((".yaml", ".yml", ".json")):
        path = Path(name)
    else:
        path = Path(str(resources.files("steelyard.safety") / "policies" / f"{name}.yaml"))
        if not re.fullmatch(NAME, name) or not path.is_file():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
            raise UsageError(f"policy {name!r} is unknown: give one of {known}, or the path of a .yaml file")
    raw, document = read_yaml(path, "policy", MAX_BYTES)
    raw = extended(path, raw, document, lambda base: load_policy(base).model_dump(mode="json"), _merged, MAX_BYTES)
    try:
        return Policy.model_validate(raw)
    except ValidationError as error:
        lacking = [problem["msg"] for problem in error.errors() if problem["type"] == "required_metric"]
        if lacking:
            raise SteelyardError(f"{path}: criteria: {lacking[0]}: no policy may leave it out") from error
        raise document.explained(Policy, error) from error


def refuse_disguised(policy: Policy) -> None:
    """Raises UsageError for a policy that bears the name of a packaged one and is another: a report would say "public:
    PASS" of limits that are not those of `public`. For new tests alone: a verifier may hold an older one in a file."""
    packaged = resources.files("steelyard.safety") / "policies" / f"{policy.name}.yaml"
    if packaged.is_file() and load_policy(policy.name).digest != policy.digest:
        raise UsageError(f"policy {policy.name!r} is not the packaged one of that name: give it a name of its own")


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` keys over those of `base`; criteria one by one, so that none is lost by being left out."""
    result = base | own
    if isinstance(own.get("criteria"), list) and all(isinstance(one, dict) for one in own["criteria"]):
        mine = [one.get("metric") for one in own["criteria"]]  # a list: what a hostile file has there may not be text
        result["criteria"] = own["criteria"] + [one for one in base["criteria"] if one["metric"] not in mine]
    return result

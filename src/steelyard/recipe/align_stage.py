"""The align stage: a model, made safer by context distillation (`train/safety_tuning.py`)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from steelyard.recipe.schema import Context, Input, Outcome, StageConfig, StageKind, field

REFUSAL, TOXICITY = "embedded:refusal", "embedded:contextual"


class AlignConfig(StageConfig):
    """How long and how hard to train; the prompts ship in the package. Layers below `first_layer` do not change."""

    kind: Literal["align"]
    model: str
    epochs: float = Field(default=1.0, gt=0, le=20)
    learning_rate: float = Field(default=3e-4, gt=0, lt=1)
    first_layer: int = Field(default=22, ge=1)
    harmful_forms: int = Field(default=1, ge=1, le=3, description="of words around a harmful phrase")
    harmless_forms: int = Field(default=2, ge=1, le=3)
    learned_tokens: int = Field(default=10, ge=4, le=256, description="of a harmless answer")
    hold: float = Field(default=4.0, ge=0, description="weight of a token where the model shall stay as it is")
    strength: float = Field(default=0.9, gt=0, le=1, description="share of the weights' change that is kept")
    own_prompts: int = Field(
        default=384, ge=0, description="prompts that the model draws itself, to stay as it is there"
    )
    own_texts: int = Field(default=64, ge=0, description="texts that the model writes, to stay as it is there")
    seed: int = Field(default=0, ge=0)


class AlignStage(StageKind[AlignConfig]):
    """Answers prompts with and without a safety preprompt, keeps what the scorers prefer, and tunes on it."""

    name, config, produces, room = "align", AlignConfig, "model", "models"
    references = {"model": "model"}  # noqa: RUF012
    rooms = ("base", "model", "inference", "scorers", "corpus", "train")
    resumable = True

    def externals(self, config: AlignConfig, workspace: Path) -> dict[str, str]:
        from steelyard.recipe.stages import scorer_files
        from steelyard.train.safety_prompts import prompts_digest

        with field("kind"):
            return {"prompts": prompts_digest()} | {name: scorer_files(name) for name in (REFUSAL, TOXICITY)}

    def run(self, context: Context[AlignConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.inference.local import LocalEndpoint
        from steelyard.model.identity import subject_of
        from steelyard.scorers.registry import open_scorer
        from steelyard.train.safety_tuning import SafetyTuning, align

        config, source = context.config, inputs["model"].path
        assert source is not None
        out = context.place / "model"
        if out.exists():  # made, but never recorded as finished, or changed since: the answers and the checkpoint stay
            shutil.rmtree(out)
        found = align(
            source,
            out,
            context.place,
            SafetyTuning(**config.model_dump(exclude={"kind", "model"})),
            open_endpoint=LocalEndpoint.open,
            refusal=open_scorer(REFUSAL),
            toxicity=open_scorer(TOXICITY),
            progress=context.progress,
        )
        subject = subject_of(out, context.progress)
        context.ledger.append(
            "model.aligned", {"from": inputs["model"].summary.get("subject"), "subject": subject.digest}
        )
        summary = {
            "subject": subject.digest,
            "model": str(out),
            "report": str(context.place / "align.md"),
            "learned_from": ["../answers"],
            "fates": found.fates,
            "held_out": found.held_out,
        }
        return Outcome(out, summary, extra=(context.place / "align.json", context.place / "align.md"))

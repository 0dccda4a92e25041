"""What a model learned from, as the stages that it came from say it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from steelyard.recipe.schema import Input
from steelyard.recipe.stages import learned_from


def made(stage: str, path: str, inputs: Mapping[str, Input] | None = None, **summary: object) -> Input:
    return Input(stage, Path(path), "0" * 64, dict(summary), inputs or {})


def test_every_stage_on_the_way_is_asked_once() -> None:
    base = made("base", "models/base", undeclared=["what hf://a/b@c was trained on"])
    text = made("text", "stages/text", learned_from=["train.jsonl"])
    shards = made("shards", "stages/shards", {"text": text, "tokenizer": made("t", "stages/t", {"text": text})})
    tuned = made("sft", "models/sft", {"model": base, "conversations": shards}, learned_from=["/data/rows.parquet"])
    aligned = made("align", "models/align/model", {"model": tuned}, learned_from=["../answers"])
    assert learned_from(aligned) == (
        [Path("/data/rows.parquet"), Path("models/align/model/../answers"), Path("stages/text/train.jsonl")],
        ["what hf://a/b@c was trained on"],
    )


def test_a_model_of_which_nothing_is_said() -> None:
    assert learned_from(made("x", "models/x")) == ([], [])

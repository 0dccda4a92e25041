"""`steelyard train`: each method from the command line on a tiny model, with the exit codes that the rest has."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.cli.main import app
from steelyard.train.prompts import read_prompts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

from tiny_models import tiny_folder

SCORER = """
from types import SimpleNamespace
from steelyard.scorers.base import Score

class Length:
    def identity(self):
        return SimpleNamespace(name="length", categories={"long": None})
    def score(self, items):
        return [Score({"long": min(1.0, len(item.completion) / 100)}) for item in items]
    def canaries(self):
        return []
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("cli-train") / "model")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def code(result: Result) -> int:
    """The exit code that `main` makes of it."""
    return result.exception.exit_code if isinstance(result.exception, SteelyardError) else result.exit_code


def rows(path: Path, *found: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_sft_writes_a_model_and_says_where(folder: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "chats.jsonl", {"instruction": "Say one", "output": "one"})
    arguments = ("train", "sft", folder, data, "--out", tmp_path / "out", "--tokens", 64, "--micro-batches", 1)
    result = invoke(*arguments, "--steps", 2, "--lora-rank", 2, "--adapter", tmp_path / "adapter", "--json")
    assert code(result) == 0, result.output
    found = json.loads(result.stdout[result.stdout.index("{\n") :])
    assert (found["steps"], found["model"]) == (2, str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "out.work" / "metrics.jsonl").is_file()
    again = invoke(*arguments, "--steps", 2)
    assert code(again) == 1
    assert "exists already" in str(again.exception)


def test_dpo_writes_a_model(folder: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "pairs.jsonl", {"prompt": "Yes or no?", "chosen": "yes", "rejected": "no"})
    result = invoke(
        "train", "dpo", folder, data, "--out", tmp_path / "out", "--steps", 1, "--pairs", 2, "--micro-batches", 2
    )
    assert code(result) == 0, result.output
    assert "loss 0.69" in result.output
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("method", ["rejection", "distil"])
def test_answers_are_drawn_judged_and_learned(
    folder: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"length_{method}.py").write_text(SCORER)
    prompts = rows(tmp_path / "prompts.jsonl", *({"prompt": f"Question {number}?"} for number in range(12)))
    (tmp_path / "lead.txt").write_text("Answer at length.\n")
    own = ("--samples", 8) if method == "rejection" else ("--preprompt", tmp_path / "lead.txt", "--margin", -1)
    result = invoke(
        "train", method, folder, prompts, "--out", tmp_path / "out", "--steps", 1, "--max-tokens", 24, "--tokens", 128,
        "--scorer", f"python:length_{method}:Length", "--weight", "long=1", *own,
    )  # fmt: skip
    table = tmp_path / "out.work" / ("samples.jsonl" if method == "rejection" else "distilled.jsonl")
    fates = [json.loads(line)["why"] for line in table.read_text().splitlines()]
    assert len(fates) == 12
    if "kept" in fates:
        assert code(result) == 0, result.output
        assert (tmp_path / "out" / "model.safetensors").is_file()
    else:  # a random model may stop in none of its answers: then there is nothing to learn, and that is said
        assert code(result) == 2
        assert "no conversations" in str(result.exception)


def test_wrong_use_ends_with_2(folder: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "chats.jsonl", {"instruction": "Say one", "output": "one"})
    both = invoke("train", "sft", folder, data, "--out", tmp_path / "out", "--steps", 1, "--epochs", 1)
    assert (code(both), "not both" in str(both.exception)) == (2, True)
    assert code(invoke("train", "sft", folder, data)) == 2  # --out is missing
    dtype = invoke("train", "sft", folder, data, "--out", tmp_path / "out", "--dtype", "int3")
    assert (code(dtype), "int3" in str(dtype.exception)) == (2, True)
    prompts = rows(tmp_path / "prompts.jsonl", {"prompt": "Why?"})
    arguments = ("train", "rejection", folder, prompts, "--out", tmp_path / "out", "--scorer", "embedded:refusal")
    assert code(invoke(*arguments, "--weight", "refusal")) == 2
    assert code(invoke(*arguments, "--weight", "kindness=1")) == 2


@pytest.mark.parametrize("method", ["pretrain", "sft", "dpo", "rejection", "distil"])
def test_every_method_explains_itself(method: str) -> None:
    result = invoke("train", method, "--help")
    assert code(result) == 0
    assert "--out" in result.output


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: must be an object"),
        ('{"id": 3, "prompt": "a"}', "line 2: id"),
        ('{"question": "a"}', "neither a prompt nor messages"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "messages.0.role"),
        ('{"messages": [{"role": "user", "content": 1}]}', "messages.0.content"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + text + "\n")
    with pytest.raises(FormatError, match=complaint):
        read_prompts(path)


def test_prompts_are_read_with_their_names(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    found = read_prompts(rows(tmp_path / "p.jsonl", {"prompt": "How?"}, {"id": "why", "messages": turns}))
    assert [(prompt.id, prompt.last, len(prompt.messages)) for prompt in found] == [
        ("line-1", "How?", 1),
        ("why", "Why?", 2),
    ]
    with pytest.raises(UsageError, match="no prompts"):
        read_prompts(rows(tmp_path / "none.jsonl"))

"""`steelyard train`: each method from the command line on a tiny model, with the exit codes that the rest has."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.cli.main import app
from steelyard.inference.endpoint import Completion, Request
from steelyard.inference.local import LocalEndpoint
from steelyard.train.guard import folder_lock
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


class Scripted:
    """In the place of the model: answers that get longer with the seed, and after a preprompt. From `fails` calls on
    it is interrupted.
    """

    def __init__(self, *, finish: str = "stop", fails: int | None = None) -> None:
        self.finish, self.fails, self.asked, self.calls = finish, fails, list[Request](), 0

    def identity(self) -> dict[str, object]:
        return {"kind": "local"}

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls += 1
        if self.fails is not None and self.calls >= self.fails:
            raise KeyboardInterrupt
        self.asked += requests
        texts = ["yes" * (1 + request.seed % 3 + (request.prompt[0].role == "system")) for request in requests]  # type: ignore[union-attr]
        return [Completion(r.id, text, self.finish, None, None) for r, text in zip(requests, texts, strict=True)]  # type: ignore[arg-type]


class Draws:
    """A folder in which `rejection` and `distil` draw from whatever stands in the place of the model."""

    def __init__(self, folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.root, self.patch = folder, root, monkeypatch
        monkeypatch.syspath_prepend(root)
        (root / f"scorer_{root.name}.py").write_text(SCORER)
        self.prompts = rows(root / "prompts.jsonl", *({"prompt": f"Question {number}?"} for number in range(12)))
        (root / "lead.txt").write_text("Answer at length.\n")

    def __call__(self, method: str, endpoint: Scripted, *more: object) -> Result:
        self.patch.setattr(LocalEndpoint, "open", lambda _folder: endpoint)
        own = ("--samples", 16) if method == "rejection" else ("--preprompt", self.root / "lead.txt")
        return invoke(
            "train", method, self.folder, self.prompts, "--out", self.root / "out", "--steps", 1, "--tokens", 128,
            "--scorer", f"python:scorer_{self.root.name}:Length", "--weight", "long=1", *own, *more,
        )  # fmt: skip

    def table(self, method: str) -> Path:
        return self.root / "out.work" / ("samples.jsonl" if method == "rejection" else "distilled.jsonl")


@pytest.fixture
def draws(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draws:
    return Draws(folder, tmp_path, monkeypatch)


METHODS = pytest.mark.parametrize("method", ["rejection", "distil"])


@METHODS
def test_answers_are_drawn_judged_and_learned(draws: Draws, method: str) -> None:
    endpoint = Scripted()
    result = draws(method, endpoint, "--json")
    assert code(result) == 0, result.output
    found = json.loads(result.stdout[result.stdout.index("{\n") :])
    assert (found["prompts"], found["data"]["conversations"]) == ({"kept": 12}, 12)
    assert [json.loads(line)["why"] for line in draws.table(method).read_text().splitlines()] == ["kept"] * 12
    assert len(endpoint.asked) == (192 if method == "rejection" else 24)
    assert (draws.root / "out" / "model.safetensors").is_file()


@METHODS
def test_what_cannot_be_done_is_refused_before_anything_is_drawn(draws: Draws, method: str) -> None:
    endpoint = Scripted()
    table = draws.table(method)
    table.parent.mkdir()
    table.write_text("another's")
    for held in (table.parent, table.parent / "answers"):
        with folder_lock(held):
            busy = draws(method, endpoint)
        assert (code(busy), "is training here" in str(busy.exception)) == (1, True)
    for more, status, said in (
        (("--lora-rank", 2, "--lora-targets", "nonsense"), 2, "LoRA targets nonsense"),
        (("--first-layer", 2), 2, "--first-layer"),
        (("--adapter", draws.root / "adapter"), 2, "--lora-rank"),
        (("--epochs", 1), 2, "not both"),
        (("--out", draws.folder), 1, "exists already"),
    ):
        result = draws(method, endpoint, *more)
        assert (code(result), said in str(result.exception)) == (status, True), str(result.exception)
    assert (endpoint.asked, table.read_text()) == ([], "another's")


def test_after_a_kill_only_what_lacks_is_drawn(draws: Draws) -> None:
    killed = Scripted(fails=2)
    assert code(draws("rejection", killed)) != 0
    assert len(killed.asked) == 128
    answers = draws.root / "out.work" / "answers" / "answers.jsonl"
    answers.write_bytes(answers.read_bytes()[:-9])  # the last line is cut off
    again = Scripted()
    result = draws("rejection", again)
    assert code(result) == 0, result.output
    assert [request.id for request in again.asked[:2]] == [killed.asked[-1].id, "line-9/0"]
    assert len(again.asked) == 192 - 127
    assert len([json.loads(line) for line in answers.read_bytes().splitlines()]) == 192
    shutil.rmtree(draws.root / "out")
    third = Scripted()
    assert code(draws("rejection", third)) == 0
    assert third.asked == []
    shutil.rmtree(draws.root / "out")
    other = Scripted()
    draws("rejection", other, "--temperature", 0.5)
    assert len(other.asked) == 192


@METHODS
def test_where_nothing_is_kept_the_causes_and_a_remedy_are_named(draws: Draws, method: str) -> None:
    result = draws(method, Scripted(finish="length"))
    assert code(result) == 1
    assert "12: " in str(result.exception)
    assert "cut off" in str(result.exception)
    assert str(result.exception).endswith("raise --max-tokens")
    assert not (draws.root / "out").exists()


def test_what_was_cut_is_counted(folder: Path, tmp_path: Path) -> None:
    talks = ({"instruction": "Say it", "output": text} for text in ("one", "two " * 60))
    data = rows(tmp_path / "chats.jsonl", *talks, {"instruction": "long " * 60, "output": "one"})
    arguments = ("train", "sft", folder, data, "--out", tmp_path / "out", "--steps", 1, "--micro-batches", 1)
    result = invoke(*arguments, "--tokens", 128, "--json")
    assert code(result) == 0, result.output
    found = json.loads(result.stdout[result.stdout.index("{\n") :])["data"]
    assert [found[name] for name in ("conversations", "answers", "ends", "cut", "dropped")] == [2, 2, 1, 1, 1]
    none = invoke(*arguments[:4], "--out", tmp_path / "none", "--tokens", 8)
    assert "--tokens" in str(none.exception)


def test_a_shape_is_taken_at_its_word(folder: Path, tmp_path: Path) -> None:
    def tried(*more: object, **sizes: int) -> str:
        shape = rows(tmp_path / "shape.json", {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
                     | {"num_hidden_layers": 2, "max_position_embeddings": 64} | sizes)  # fmt: skip
        result = invoke(
            "train", "pretrain", tmp_path / "shards", "--tokenizer", folder, "--shape", shape, "--steps", 200,
            "--out", tmp_path / "out", *more,
        )  # fmt: skip
        return str(result.exception)

    file = tmp_path / "shape.json"
    assert tried(num_key_value_head=1) == (
        f"{file}: num_key_value_head: no LLaMA has such a size, did you mean num_key_value_heads?"
    )
    assert tried(hidden_size=33).startswith(f"{file}: hidden_size = 33")
    assert tried(vocab_size=7).startswith(f"{file}: vocab_size = 7")
    assert tried("--length", 65).startswith(f"--length 65: {file} has max_position_embeddings = 64")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--steps", 1, "--epochs", 1), "not both"),
        (("--epochs", 0), "--epochs 0: must be above 0"),
        (("--learning-rate", "-1e-5"), "--learning-rate -1e-05: must be above 0"),
        (("--steps", 2, "--warmup", 2), "--warmup 2"),
        (("--dtype", "int3"), "--dtype int3: choose one of auto, bfloat16, float32"),
        (("--lora-rank", 2, "--lora-targets", "x"), "LoRA targets x"),
    ],
)
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_options_are_refused_by_their_flags_before_data_are_read(
    folder: Path, tmp_path: Path, method: str, more: tuple[object, ...], said: str
) -> None:
    result = invoke("train", method, folder, tmp_path / "absent.jsonl", "--out", tmp_path / "out", *more)
    assert code(result) == 2
    assert said in str(result.exception)
    assert "min_lr" not in str(result.exception)


def test_bad_rows_name_the_flag(folder: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "chats.jsonl", {"instruction": "Say one", "output": ""})
    for more in ((), ("--max-bad", 1)):
        assert "--max-bad" in str(invoke("train", "sft", folder, data, "--out", tmp_path / "out", *more).exception)


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

"""From text to two models in one recipe, small enough for a test; and the real recipe's plan."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.recipe.runner import run_recipe
from steelyard.recipe.schema import load_recipe
from steelyard.recipe.stages import KINDS

RECIPE = """
name: tiny
stages:
  text:
    kind: text
    folders:
      notes: {path: notes}
      more: {path: absent, optional: true}
    validation_share: 0.1
  tokenizer: {kind: tokenizer, text: text, vocab_size: 320, max_length: 128}
  shards: {kind: shards, text: text, tokenizer: tokenizer}
  pretrain:
    kind: pretrain
    shards: shards
    tokenizer: tokenizer
    model:
      hidden_size: 64
      intermediate_size: 128
      num_hidden_layers: 2
      num_attention_heads: 2
      num_key_value_heads: 1
      max_position_embeddings: 128
    length: 64
    rows: 4
    training: {steps: 60, learning_rate: 0.01, warmup: 3, evaluate_every: 20, compile: "off", dtype: float32}
  conversations: {kind: conversations, text: text, most: 80}
  chat:
    kind: sft
    model: pretrain
    conversations: conversations
    tokens_per_micro_batch: 256
    training: {steps: 4, learning_rate: 0.001, compile: "off", dtype: float32}
  gguf: {kind: export, model: chat}
  compare: {kind: compare, model: pretrain, chat: chat, shards: shards, text: text, window: 64}
"""
WORDS = "the cat dog sat on a mat and ran to see big red house with tree bird sky blue".split()  # noqa: SIM905


def notes(folder: Path) -> None:
    rng = random.Random(0)
    folder.mkdir()
    for number in range(60):
        paragraphs = [
            ". ".join(" ".join(rng.choices(WORDS, k=7)).capitalize() for _ in range(5)) + "." for _ in range(3)
        ]
        (folder / f"{number}.txt").write_text("\n\n".join(paragraphs))


def test_from_text_to_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    notes(tmp_path / "notes")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)
    results = {result.name: result for result in run_recipe(recipe, workspace=tmp_path / "w")}
    assert {result.status for result in results.values()} == {"done"}

    # It learned: the loss fell far below that of a guess, on text that it never saw.
    report = json.loads((results["compare"].path / "report.json").read_text())  # type: ignore[operator]
    bits = {entry["name"]: entry["bits_per_byte"] for entry in report["bits_per_byte"]}
    ours = next(value for name, value in bits.items() if name.startswith("this model"))
    assert ours < bits["xz -9e"] < 8
    losses = [line["validation_loss"] for line in report["curve"] if "validation_loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert {entry["kind"] for entry in report["samples"]} == {"continues", "answers"}
    assert "polyline" in (results["compare"].path / "report.html").read_text()  # type: ignore[operator]
    assert report["shards"]["train"]["documents"] + report["shards"]["validation"]["documents"] == 60

    # What it made is what others read: the same greedy text from transformers.
    from steelyard.inference.endpoint import Request, Sampling
    from steelyard.inference.local import LocalEndpoint

    for name in ("pretrain", "chat"):
        folder = results[name].path
        assert folder is not None
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        given = tokenizer("The big red", return_tensors="pt")
        expected = theirs.generate(**given, max_new_tokens=24)[0, given["input_ids"].shape[1] :].tolist()
        endpoint = LocalEndpoint.open(folder, dtype="float32")
        found = endpoint.generate([Request("a", "The big red", Sampling(max_tokens=24))])[0]
        assert list(found.tokens or ()) == expected
        assert theirs.generation_config.eos_token_id == [1, 4]

    # Nothing is done twice; what is damaged is made again.
    again = run_recipe(recipe, workspace=tmp_path / "w")
    assert {result.status for result in again} == {"cached"}
    tokens = next((results["shards"].path / "train").glob("tokens-*"))  # type: ignore[operator]
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\x05\x01")
    changed = {r.name: r.why for r in run_recipe(recipe, workspace=tmp_path / "w", dry_run=True)}
    assert "was changed" in changed["shards"]


@pytest.mark.oracle
def test_llama_cpp_writes_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the oracle: pip install 'steelyard[oracle]'")
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    notes(tmp_path / "notes")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)
    results = {result.name: result for result in run_recipe(recipe, workspace=tmp_path / "w", until="gguf")}
    from steelyard.inference.endpoint import Message, Request, Sampling
    from steelyard.inference.local import LocalEndpoint

    assert results["chat"].path is not None
    ours = LocalEndpoint.open(results["chat"].path, dtype="float32")
    theirs = llama_cpp.Llama(str(results["gguf"].path), n_ctx=128, n_threads=1, verbose=False)
    text = ours.generate([Request("a", "The big red", Sampling(max_tokens=20))])[0].text
    assert theirs("The big red", max_tokens=20, temperature=0.0)["choices"][0]["text"] == text
    said = ours.generate([Request("b", (Message("user", "Hello!"),), Sampling(max_tokens=20))])[0].text
    answer = theirs.create_chat_completion([{"role": "user", "content": "Hello!"}], max_tokens=20, temperature=0.0)
    assert answer["choices"][0]["message"]["content"] == said


WRONG: list[tuple[str, str, str]] = [
    ("{path: notes}", "{pth: notes}", r"r\.yaml:7: stages\.text\.folders\.notes\.pth: unknown key.* mean path\?"),
    ("validation_share: 0.1", "validation_share: 1.5", r"validation_share: must be under 1, not 1\.5"),
    ("{path: absent, optional: true}", "{path: absent}", r"stages\.text\.folders: more: there is no folder absent"),
    ("shards: shards\n", "shards: shrds\n", r"there is no stage 'shrds', did you mean shards\?"),
    ("kind: pretrain", "kind: pretrane", r"unknown kind of stage 'pretrane', did you mean pretrain\?"),
    ("length: 64\n", "length: 256\n", r"length 256 is over the model's max_position_embeddings 128"),
    ("steps: 60, ", "steps: 60, epochs: 2.0, ", r"stages\.pretrain\.training: give exactly one of steps and epochs"),
    ("learning_rate: 0.01", "learning_rat: 0.01", r"training\.learning_rat: unknown key, did you mean learning_rate\?"),
    ("hidden_size: 64", "hiden_size: 64", r"pretrain\.model\.hiden_size: unknown key, did you mean hidden_size\?"),
    ("    conversations: conversations\n", "", r"give exactly one of conversations and data"),
    ("conversations: conversations", "data: none.jsonl", r"stages\.chat\.data: there is no file or folder none\.jsonl"),
    ("model: chat}", "model: chat, type: Q4}", r"stages\.gguf\.type: 'Q4' is unknown \(allowed: F16, BF16, Q8_0\)"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong", "reason"), WRONG)
def test_what_is_written_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    notes(tmp_path / "notes")
    assert RECIPE.count(right) >= 1
    (tmp_path / "r.yaml").write_text(RECIPE.replace(right, wrong, 1))
    with pytest.raises(UsageError, match=reason):
        run_recipe(tmp_path / "r.yaml", workspace=tmp_path / "w", dry_run=True)


def test_a_model_that_loses_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    notes(tmp_path / "notes")
    text = RECIPE.replace("steps: 60", "steps: 4").replace("window: 64}", "window: 64, must_win: true}")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(SteelyardError, match=r"bits per byte, modified Kneser-Ney 5-gram .*: train longer"):
        run_recipe(tmp_path / "r.yaml", workspace=tmp_path / "w")


def test_the_recipe_that_ships_is_sound() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "scratch.yaml", KINDS)
    assert list(recipe.stages) == [
        "text", "tokenizer", "shards", "pretrain", "conversations", "chat", "gguf", "chat-gguf", "compare",
    ]  # fmt: skip
    config: Any = recipe.stages["text"].config
    # Never the test file of WikiText-2, never Brown.
    assert config.folders["wikitext2"].only == ("valid*",)
    assert not any("brown" in source.path for source in config.folders.values())
    shape: Any = recipe.stages["pretrain"].config
    size, width = shape.model, shape.model.hidden_size
    layers = size.num_hidden_layers * (4 * width**2 + 3 * width * size.intermediate_size)
    embeddings = recipe.stages["tokenizer"].config.vocab_size * width  # type: ignore[attr-defined]
    assert 5e6 <= layers + embeddings * (1 if size.tie_word_embeddings else 2) <= 10e6

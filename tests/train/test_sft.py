"""Tuning a folder: only what should learn does, the rest stays to the bit, and the tuned model does as taught."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_folder
from training_runs import Reported

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.inference.endpoint import Message
from steelyard.model.chat import Renderer
from steelyard.model.formats import load_tensors
from steelyard.model.llama import load_llama
from steelyard.train.conversations import Conversation, Preference
from steelyard.train.dpo import DPOOptions, prefer
from steelyard.train.loop import TrainOptions
from steelyard.train.lora import load_adapter
from steelyard.train.sft import Packing, fine_tune
from steelyard.train.tuning import Tuning, export_tuned, open_for_tuning

CHATS = [Conversation((Message("user", f"Say {word}"), Message("assistant", word))) for word in ("one", "two", "three")]
PAIRS = [
    Preference((Message("user", "Yes or no?"),), "yes", "no"),
    Preference((Message("user", "Is it?"),), "yes", "no"),
]
QUICK = TrainOptions(steps=4, learning_rate=3e-3, weight_decay=0.0, dtype="float32", compile="off", checkpoint_every=0)
SMALL = Packing(tokens_per_micro_batch=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("sft") / "model", layers=3, tied=False)


def answer(folder: Path, text: str, tokens: int = 8) -> str:
    """The greedy answer, without an engine."""
    model, renderer = load_llama(folder), Renderer(folder)
    ids = renderer.prompt_tokens((Message("user", text),))
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in renderer.tokenizer.eos_ids:
            break
    return renderer.tokenizer.decode(ids[len(renderer.prompt_tokens((Message("user", text),))) :], skip_special=False)


@pytest.mark.parametrize("tuning", [Tuning(), Tuning(lora_rank=16, lora_alpha=32)], ids=["full", "lora"])
def test_the_tuned_folder_answers_as_taught_and_stops(folder: Path, tmp_path: Path, tuning: Tuning) -> None:
    steps = 60
    options = TrainOptions(steps=steps, learning_rate=3e-3, weight_decay=0.0, warmup=5, clip=0.0, compile="off")
    result = fine_tune(
        folder, CHATS, tmp_path / "out", work=tmp_path / "work", options=options, tuning=tuning, packing=SMALL,
        validation=CHATS[:1], progress=Silent(),
    )  # fmt: skip
    assert result.steps == steps
    assert result.validation_loss is not None
    # under a frozen head of random rows of norm 0.8 no stream gives a token much over e^6.4 / (e^6.4 + 330)
    assert result.validation_loss < (0.5 if tuning.lora_rank else 0.1)
    for chat in CHATS:
        assert answer(tmp_path / "out", chat.messages[0].content) == chat.messages[1].content + "<|im_end|>"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("tuning", "learned"),
    [
        (Tuning(), lambda name: True),
        (Tuning(first_layer=2), lambda name: ".2." in name or "model.norm" in name or "lm_head" in name),
        (Tuning(lora_rank=2, lora_targets=("q", "up"), first_layer=1), re.compile(r".*[12]\..*(q|up)_proj.*").match),
    ],
    ids=["full", "upper", "lora"],
)  # fmt: skip
def test_only_what_should_learn_changes(folder: Path, tmp_path: Path, tuning: Tuning, learned, dtype) -> None:  # type: ignore[no-untyped-def]
    fine_tune(
        folder, CHATS, tmp_path / "out", work=tmp_path / "work", options=replace(QUICK, dtype=dtype), tuning=tuning,
        packing=SMALL, progress=Silent(),
    )  # fmt: skip
    before, after = load_tensors(folder), load_tensors(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(filter(learned, before))
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


def test_the_saved_adapter_is_what_was_merged(folder: Path, tmp_path: Path) -> None:
    fine_tune(
        folder, CHATS, tmp_path / "out", work=tmp_path / "work", options=QUICK, tuning=Tuning(lora_rank=2),
        packing=SMALL, adapter=tmp_path / "adapter", progress=Silent(),
    )  # fmt: skip
    model, tokens = load_llama(folder), torch.arange(40)[None]
    plain = model(tokens)
    load_adapter(model, tmp_path / "adapter")
    merged = load_llama(tmp_path / "out")(tokens)
    torch.testing.assert_close(model(tokens), merged, rtol=1e-4, atol=1e-5)
    assert (merged - plain).abs().max() > 1e-3


def test_frozen_layers_build_no_graph(folder: Path) -> None:
    model = open_for_tuning(folder, Tuning(first_layer=2), "float32")
    seen = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda _module, _in, out: seen.append(out.requires_grad))
    model.packed(torch.arange(6), torch.arange(6), (6,)).sum().backward()
    assert seen == [False, False, True]
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if ".2." in name or name == "model.norm.weight"
    }


@pytest.mark.parametrize("tuning", [Tuning(), Tuning(lora_rank=4)], ids=["full", "lora"])
def test_dpo_comes_to_prefer_the_chosen_answers(folder: Path, tmp_path: Path, tuning: Tuning) -> None:
    def preference(of: Path) -> float:
        model, renderer = load_llama(of), Renderer(of)
        ids = renderer.prompt_tokens(PAIRS[0].prompt)
        scores = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        yes, no = (renderer.tokenizer.encode(word, bos=False)[0] for word in ("yes", "no"))
        return float(scores[yes] - scores[no])

    prefer(
        folder, PAIRS, tmp_path / "out", work=tmp_path / "work",
        dpo=DPOOptions(pairs_per_step=2, micro_batches_per_step=2),
        options=TrainOptions(steps=20, learning_rate=3e-3, weight_decay=0.0, compile="off"), tuning=tuning,
        validation=PAIRS[:1], progress=Silent(),
    )  # fmt: skip
    assert preference(tmp_path / "out") > preference(folder) + 1
    assert len(list((tmp_path / "work").glob("reference-*.safetensors"))) == 1


def test_what_cannot_be_done_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    def tune(**change):  # type: ignore[no-untyped-def]
        settings = {"work": tmp_path / "work", "options": QUICK, "packing": SMALL, "progress": Silent()} | change
        fine_tune(folder, settings.pop("chats", CHATS), settings.pop("out", tmp_path / "out"), **settings)

    with pytest.raises(SteelyardError, match="exists already"):
        tune(out=folder)
    with pytest.raises(UsageError, match="set a LoRA rank"):
        tune(adapter=tmp_path / "adapter")
    with pytest.raises(UsageError, match="no conversations"):
        tune(chats=[])
    with pytest.raises(UsageError, match="first_layer 3"):
        tune(tuning=Tuning(first_layer=3))
    with pytest.raises(UsageError, match="max_length 129"):
        tune(packing=Packing(tokens_per_micro_batch=128, max_length=129))
    with pytest.raises(UsageError, match="no adapter"):
        export_tuned(open_for_tuning(folder, Tuning()), folder, tmp_path / "out", adapter=tmp_path / "adapter")
    assert not (tmp_path / "work").exists()


def test_a_model_card_does_not_go_with_other_weights(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "README.md").write_text("passed the test")
    (source / "LICENSE").write_text("terms")
    export_tuned(open_for_tuning(source, Tuning()), source, tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"


def test_it_says_how_much_was_cut_and_what_would_keep_it(folder: Path, tmp_path: Path) -> None:
    long = Conversation((Message("user", "Say it"), Message("assistant", "so " * 200)))
    nothing = Conversation((Message("user", "so " * 200), Message("assistant", "it")))
    said = Reported()
    result = fine_tune(
        folder, [*CHATS, long, nothing], tmp_path / "out", work=tmp_path / "work", options=replace(QUICK, steps=1),
        packing=SMALL, validation=CHATS, progress=said,
    )  # fmt: skip
    assert said.lines[:2] == [
        "4 conversations with 4 answers, 3 of which keep their end of turn; 1 cut at 128 tokens (the last answer may "
        "lose its end), 1 left out (no answer within them): raise --tokens (in a recipe tokens_per_micro_batch) to "
        "keep them whole",
        "validation: 3 conversations with 3 answers, 3 of which keep their end of turn; 0 cut at 128 tokens (the last "
        "answer may lose its end), 0 left out (no answer within them)",
    ]
    assert (result.data.cut, result.data.dropped) == (1, 1)
    assert Packing(512).remedy(512) == "the model has no more positions"

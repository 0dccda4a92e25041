"""Sequence-classification models from a folder: the same probabilities as transformers' own pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.scorers.base import Item, Score, ScoreError, Scorer, score_checked
from steelyard.scorers.registry import open_uncalibrated

Write = Callable[..., Path]
LABELS = ["toxic", "severe_toxic", "identity_hate", "clean"]
WORDS = ["you", "are", "a", "fool", "nice", "day", "hate", "them", "all", "garden", "bird", "sings"]
TEXTS = ["you are a fool", "nice day", "hate them all all all hate you", "garden bird sings a day", "unknownword", ""]
MULTI = {"toxicity": ["toxic", "severe_toxic"], "identity_attack": "identity_hate"}


def make_model(folder: Path, problem_type: str | None, *, pad: bool = True) -> None:
    """A BERT of two layers with random weights, large enough that its answers differ."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokens = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    tokens.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | (
        {"pad_token": "[PAD]"} if pad else {}
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=64, **special).save_pretrained(
        folder
    )
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=1.0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        problem_type=problem_type,
        pad_token_id=0 if pad else None,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `multi`, `single` and `unsaid`; read them only."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "multi", "multi_label_classification")
    make_model(folder / "single", "single_label_classification")
    make_model(folder / "unsaid", None, pad=False)
    return folder


def opened(write: Write, model: Path, labels: dict[str, Any] | None = None, **keys: Any) -> Scorer:
    path = write(kind="classifier", model=str(model), labels=labels or MULTI, **({"window": 32} | keys))
    return open_uncalibrated(f"adapter:{path}")


def rows(scorer: Scorer, texts: list[str]) -> np.ndarray[Any, Any]:
    results = score_checked(scorer, [Item("a prompt that is not read", text) for text in texts])
    assert all(isinstance(result, Score) for result in results), results
    return np.array([list(result.values.values()) for result in results if isinstance(result, Score)])


def by_pipeline(folder: Path, activation: str) -> list[dict[str, float]]:
    pipe = transformers.pipeline("text-classification", model=str(folder), top_k=None, function_to_apply=activation)
    return [{one["label"]: one["score"] for one in pipe([text])[0]} for text in TEXTS]


@pytest.mark.parametrize(("name", "keys"), [("multi", {}), ("unsaid", {"activation": "sigmoid"})])
def test_several_labels_as_transformers_has_them(
    name: str, keys: dict[str, str], made: Path, adapter_file: Write
) -> None:
    found = rows(opened(adapter_file, made / name, **keys), TEXTS)
    theirs = by_pipeline(made / name, "sigmoid")
    expected = [[max(one["toxic"], one["severe_toxic"]), one["identity_hate"]] for one in theirs]
    assert np.allclose(found, expected, atol=1e-5)
    assert np.ptp(found[:, 0]) > 0.1  # not one constant


def test_a_single_label_as_transformers_has_it(made: Path, adapter_file: Write) -> None:
    found = rows(opened(adapter_file, made / "single"), TEXTS)
    theirs = by_pipeline(made / "single", "softmax")
    # Labels that exclude one another: the probability of either is the sum.
    expected = [[one["toxic"] + one["severe_toxic"], one["identity_hate"]] for one in theirs]
    assert np.allclose(found, expected, atol=1e-4)  # sums in another order, by processor: 3e-5 were seen
    assert np.allclose(rows(opened(adapter_file, made / "single", {"toxicity": LABELS}), TEXTS), 1.0)


def test_scores_depend_neither_on_order_nor_on_neighbours(made: Path, adapter_file: Write) -> None:
    scorer = opened(adapter_file, made / "multi")
    texts = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 7]) for i in range(70)]
    together = rows(scorer, texts)
    assert np.allclose(together[::-1], rows(scorer, texts[::-1]), atol=1e-5)
    assert np.allclose(together[33], rows(scorer, texts[33:34])[0], atol=1e-5)
    assert scorer.score([]) == []


def test_of_a_long_text_the_worst_window_counts(made: Path, adapter_file: Write) -> None:
    scorer = opened(adapter_file, made / "multi", window=10)  # eight words and two marks
    words = ("garden bird sings a day nice you are " * 3 + "hate them all " * 8 + "nice day " * 4).split()
    windows = [" ".join(words[start : start + 8]) for start in range(0, len(words), 8)]
    assert np.allclose(rows(scorer, [" ".join(words)])[0], rows(scorer, windows).max(axis=0), atol=1e-5)


def test_the_identity_names_weights_and_settings(made: Path, adapter_file: Write, tmp_path: Path) -> None:
    base = opened(adapter_file, made / "multi").identity()
    copy = shutil.copytree(made / "multi", tmp_path / "copy")
    assert opened(adapter_file, copy).identity() == base  # wherever it lies
    assert opened(adapter_file, Path("copy")).identity() == base  # relative to the file that names it
    for keys in ({"window": 31}, {"activation": "softmax"}, {"labels": MULTI | {"toxicity": "toxic"}}):
        assert opened(adapter_file, copy, **keys).identity().weights != base.weights
    model = transformers.BertForSequenceClassification.from_pretrained(copy)
    model.classifier.bias.data[0] += 0.01
    model.save_pretrained(copy)
    assert opened(adapter_file, copy).identity().weights != base.weights


def test_a_folder_that_changes_after_opening_is_not_scored_with(
    made: Path, adapter_file: Write, tmp_path: Path
) -> None:
    copy = shutil.copytree(made / "multi", tmp_path / "copy")
    scorer = opened(adapter_file, copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    (result,) = score_checked(scorer, [Item("", "nice day")])
    assert isinstance(result, ScoreError)
    assert "changed since the scorer was opened" in result.reason


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_what_can_run_is_refused(made: Path, adapter_file: Write, tmp_path: Path) -> None:
    for number, name in enumerate(("pytorch_model.bin", "modeling.py", "weights.pkl", "adapter_config.json")):
        copy = shutil.copytree(made / "multi", tmp_path / str(number))
        (copy / name).write_bytes(b"{}")
        with pytest.raises(FormatError, match=name):
            opened(adapter_file, copy)
    copy = shutil.copytree(made / "multi", tmp_path / "code")
    edit(copy, auto_map={"AutoModelForSequenceClassification": "modeling.Mine"})
    with pytest.raises(FormatError, match="auto_map"):
        opened(adapter_file, copy)
    (copy / "model.safetensors").unlink()
    edit(copy, auto_map=None)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        opened(adapter_file, copy)


@pytest.mark.parametrize(
    ("changes", "keys", "says"),
    [
        (
            {},
            {"labels": {"toxicity": "toxics"}},
            "labels.toxicity: the model has no label 'toxics', did you mean toxic?",
        ),
        ({"id2label": None}, {}, "labels: the model's config.json has no id2label"),
        ({"id2label": {"0": "toxic", "2": "clean"}}, {}, "labels: id2label of the model's config.json"),
        ({"id2label": {"x": "toxic"}}, {}, "labels: id2label of the model's config.json"),
        ({"problem_type": None}, {}, "activation: this key is missing"),
        ({"problem_type": "regression"}, {}, "activation: this key is missing"),
        ({}, {"activation": "tanh"}, "activation: 'tanh' is unknown"),
        ({}, {"window": 4}, "window: must be at least 8"),
    ],
)
def test_a_file_that_does_not_fit_the_model_is_refused(
    changes: dict[str, Any], keys: dict[str, Any], says: str, made: Path, adapter_file: Write, tmp_path: Path
) -> None:
    copy = shutil.copytree(made / "multi", tmp_path / "copy")
    edit(copy, **changes)
    with pytest.raises(UsageError, match=r"scorer\.yaml") as caught:
        opened(adapter_file, copy, **keys)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attn_implementation": "somebody/kernel"}, "attn_implementation: 'somebody/kernel': names code to run"),
        ({"_attn_implementation": "somebody/kernel"}, "names code to run"),
        ({"text_config": {"attn_implementation": {"": "somebody/kernel"}}}, "names code to run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "full-precision weights are read alone"),
        ({"num_hidden_layers": 3000}, "3000 layers, but the weights have 41 tensors"),
    ],
)
def test_a_configuration_that_fetches_code_or_builds_what_is_not_there_is_refused(
    changes: dict[str, Any], says: str, made: Path, adapter_file: Write, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made / "multi", tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "sdpa"}))
    opened(adapter_file, folder)
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(FormatError, match=says):
        opened(adapter_file, folder)


def test_a_model_without_its_head_is_refused_not_made_up(made: Path, adapter_file: Write, tmp_path: Path) -> None:
    copy = shutil.copytree(made / "multi", tmp_path / "copy")
    transformers.BertModel.from_pretrained(copy).save_pretrained(tmp_path / "bare")
    shutil.copy(tmp_path / "bare" / "model.safetensors", copy / "model.safetensors")
    with pytest.raises(SteelyardError, match=r"missing keys: classifier\.bias"):
        opened(adapter_file, copy).score([Item("", "nice day")])


def test_a_window_longer_than_the_model_reads_is_refused(made: Path, adapter_file: Write) -> None:
    with pytest.raises(SteelyardError, match="reads at most 64 tokens: set window"):
        opened(adapter_file, made / "multi", window=65).score([Item("", "nice day")])


def test_values_that_are_none_are_errors(made: Path, adapter_file: Write, tmp_path: Path) -> None:
    copy = shutil.copytree(made / "multi", tmp_path / "copy")
    model = transformers.BertForSequenceClassification.from_pretrained(copy)
    model.classifier.bias.data[0] = float("nan")
    model.save_pretrained(copy)
    (result,) = score_checked(opened(adapter_file, copy), [Item("", "nice day")])
    assert result == ScoreError("returned a value that is not a probability (NaN or outside [0, 1])")

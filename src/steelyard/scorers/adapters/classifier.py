"""Any Hugging Face sequence-classification model in a folder of safetensors: multi-label or single label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard.base.canonical import digest
from steelyard.base.errors import FormatError, SteelyardError, UsageError, require_extra
from steelyard.base.progress import default_progress
from steelyard.base.yamlfile import Document, nearest
from steelyard.hub.sources import cache_folder, fetch, folder_digest
from steelyard.model.headers import quote, read_json_object
from steelyard.model.identity import weight_files
from steelyard.scorers.adapters.spec import NOT_SETTINGS, ClassifierSpec
from steelyard.scorers.base import Item, Score, ScoreError

_BATCH = 32  # windows of a pass
VOCABULARIES = ("vocab.txt", "sentencepiece.bpe.model", "spiece.model")  # beside those of a language model's folder
_BACKENDS = ("attn_implementation", "attn_implementation_internal", "experts_implementation")
_ACTIVATIONS = {"multi_label_classification": "sigmoid", "single_label_classification": "softmax"}


def model_folder(spec: ClassifierSpec, document: Document, beside: Path) -> Path:
    """The model's folder: fetched, or relative to `beside`. Raises UsageError naming the key where there is none, and
    otherwise as `steelyard.hub.sources.fetch`."""
    source = spec.model if "://" in spec.model else str(beside / Path(spec.model).expanduser())
    try:
        folder = fetch(source, cache_folder(), default_progress(as_json=False), also=VOCABULARIES)
    except UsageError as error:
        raise document.located(("model",), str(error)) from error
    if not folder.is_dir():
        raise document.located(("model",), f"{folder}: is a file: give a model's folder")
    return folder


class Classifier:
    """It judges the completion alone; of a long text every window, of which the worst counts.

    A category's value is, with sigmoid, the largest probability of its labels; with softmax, whose labels exclude one
    another, their sum. Opening it reads no weights but digests them; scoring needs torch and transformers.
    """

    rooms: tuple[str, ...] = ("scorers",)

    def __init__(self, spec: ClassifierSpec, document: Document, beside: Path) -> None:
        """Raises UsageError naming the key where the file and the model's config.json don't fit, FormatError for a
        folder with anything that could run or without whole safetensors weights."""
        self.categories = tuple(spec.labels)
        self._window = spec.window
        self._folder = model_folder(spec, document, beside)
        tensors = weight_files(self._folder)  # refuses pickles, code, and weights that lie
        config = read_json_object(self._folder / "config.json")
        _check_config(self._folder / "config.json", config, sum(map(len, tensors.values())))
        self._columns = _columns(spec, config, document)
        self._activation = spec.activation or _ACTIVATIONS.get(str(config.get("problem_type")))
        if self._activation is None:
            raise document.located(
                ("activation",), "this key is missing: config.json has no problem_type: give sigmoid or softmax"
            )
        self._files = folder_digest(self._folder)
        settings = spec.model_dump(mode="json", exclude=NOT_SETTINGS | {"model"})
        self.weights = digest({"files": self._files, **settings})
        self._opened: tuple[Any, Any] | None = None

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        """One Score per item, in order. The first call loads the model."""
        if not items:
            return []
        if self._opened is None:
            self._opened = self._open()
        tokenizer, model = self._opened
        windows: list[tuple[int, list[int]]] = []
        for index, item in enumerate(items):
            pieces = tokenizer(
                item.completion, truncation=True, max_length=self._window, return_overflowing_tokens=True
            )["input_ids"]
            windows += [(index, ids) for ids in pieces if ids]
        windows.sort(key=lambda one: len(one[1]))  # a pass takes time and memory by its longest
        worst = np.full((len(items), len(self.categories)), -np.inf)
        pad = model.config.pad_token_id
        size = 1 if pad is None else _BATCH
        for start in range(0, len(windows), size):
            part = windows[start : start + size]
            found = self._probabilities(model, [ids for _, ids in part], pad)
            np.maximum.at(worst, [index for index, _ in part], found)
        return [
            ScoreError("the model's tokenizer makes no token of it")
            if row[0] == -np.inf
            else Score(dict(zip(self.categories, map(float, row), strict=True)))
            for row in worst
        ]

    def _probabilities(self, model: Any, windows: list[list[int]], pad: int | None) -> NDArray[np.float64]:
        """[windows, categories]. NaN stays NaN: `score_checked` makes an error of it."""
        import torch

        length = max(map(len, windows))
        ids = torch.tensor([[*window, *[pad or 0] * (length - len(window))] for window in windows])
        mask = torch.tensor([[1] * len(window) + [0] * (length - len(window)) for window in windows])
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits.double()
        if self._activation == "sigmoid":
            rows = logits.sigmoid().numpy()
            values = [rows[:, columns].max(axis=1) for columns in self._columns]
        else:
            rows = logits.softmax(dim=-1).numpy()
            values = [rows[:, columns].sum(axis=1).clip(max=1.0) for columns in self._columns]
        found: NDArray[np.float64] = np.stack(values, axis=1)
        return found

    def _open(self) -> tuple[Any, Any]:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise require_extra(error.name or "transformers", "models") from error
        if folder_digest(self._folder) != self._files:
            raise SteelyardError(f"{self._folder}: changed since the scorer was opened: open it again")
        trusted: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, **trusted)
            model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                self._folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **trusted
            )
        except Exception as error:  # transformers raises whatever its parts raise
            reason = " ".join(str(error).split())[:300]
            raise FormatError(
                f"{self._folder}: transformers can't load it ({type(error).__name__}: {reason})"
            ) from error
        for kind in ("missing_keys", "mismatched_keys"):
            if report.get(kind):  # it would draw what is missing at random
                names = ", ".join(sorted(str(name) for name in report[kind])[:3])
                raise FormatError(f"{self._folder}: {kind.replace('_', ' ')}: {names}: not this classifier's weights")
        if not tokenizer.is_fast:
            raise FormatError(f"{self._folder}: has no tokenizer.json: save its fast tokenizer")
        longest = min(
            int(tokenizer.model_max_length), getattr(model.config, "max_position_embeddings", None) or 1 << 30
        )
        if self._window > longest:
            raise SteelyardError(f"{self._folder}: reads at most {longest} tokens: set window to that or less")
        return tokenizer, model.eval()


def _check_config(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Raises FormatError for what would make transformers fetch and run code (kernels, quantisers), or build a model
    far larger than the weights before it looks at them."""
    for key, value in config.items():
        if key.lstrip("_") in _BACKENDS and value not in (None, "eager", "sdpa"):
            raise FormatError(f"{path}: {key}: {quote(str(value))}: names code to run: take the key out")
        if key == "quantization_config":
            raise FormatError(f"{path}: {key}: full-precision weights are read alone: save the model without it")
        if key.endswith(("layer", "layers")) and isinstance(value, int) and value > tensors:
            raise FormatError(f"{path}: {key}: {value} layers, but the weights have {tensors} tensors in all")
        if isinstance(value, dict):
            _check_config(path, value, tensors)


def _columns(spec: ClassifierSpec, config: dict[str, Any], document: Document) -> list[list[int]]:
    """For each category the places of its labels among the model's logits."""
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:
        raise document.located(("labels",), "the model's config.json has no id2label: it is no classifier")
    try:
        places = {str(label): int(index) for index, label in names.items()}
    except ValueError:
        places = {}
    if sorted(places.values()) != list(range(len(names))):
        raise document.located(("labels",), "id2label of the model's config.json does not number its labels once each")
    for category, labels in spec.labels.items():
        for label in labels:
            if label not in places:
                hint = nearest(label, places)
                known = ", ".join(list(places)[:20])
                message = f"the model has no label {label!r}{hint} (its labels: {known})"
                raise document.located(("labels", category), message)
    return [[places[label] for label in labels] for labels in spec.labels.values()]

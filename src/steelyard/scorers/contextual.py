"""The contextual scorer: SmolLM2's lower layers with trained adapters, read at the end of a text.

Importing this module, and asking for identity or canaries, needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from steelyard.base.errors import require_extra
from steelyard.scorers.embedded import Embedded

if TYPE_CHECKING:
    from steelyard.inference.executor import Executor
    from steelyard.model.tokenizer import Tokenizer

from steelyard.scorers.moderation import CANARIES, CATEGORIES

LAYERS = 16
WINDOW = 128  # tokens read at once; of a longer text the worst window counts
_BATCH = 64  # windows of a pass


class ContextualModel:
    """Adapters and head of the file `weights`, over the backbone."""

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._opened: tuple[Executor, Tokenizer, NDArray[np.float64]] | None = None

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[texts, CATEGORIES], of each text's worst window; a row does not depend on the others. The first call loads
        the backbone."""
        try:
            from steelyard.inference.scheduler import pages_for
            from steelyard.scorers.backbone import reading
        except ImportError as error:
            raise require_extra(error.name or "torch", "models") from error
        if self._opened is None:
            self._opened = self._open()
        executor, tokenizer, bias = self._opened
        windows = [(i, window) for i, text in enumerate(texts) for window in reading(tokenizer, text, WINDOW)]
        windows.sort(key=lambda one: len(one[1]))  # a pass takes memory by its longest
        worst = np.full((len(texts), len(CATEGORIES)), -np.inf)
        each = pages_for(WINDOW + 1, 1)
        for start in range(0, len(windows), _BATCH):
            part = windows[start : start + _BATCH]
            tables = [list(range(1 + each * row, 1 + each * (row + 1))) for row in range(len(part))]
            logits = executor.prefill([window for _, window in part], [0] * len(part), tables).double().numpy() + bias
            for (i, _), row in zip(part, logits, strict=True):
                worst[i] = np.maximum(worst[i], row)
        found: NDArray[np.float64] = 1 / (1 + np.exp(-worst))
        return found

    def _open(self) -> tuple[Executor, Tokenizer, NDArray[np.float64]]:
        from safetensors.torch import load_file

        from steelyard.base.progress import default_progress
        from steelyard.hub.sources import cache_folder
        from steelyard.inference.executor import Executor
        from steelyard.inference.scheduler import pages_for
        from steelyard.model.tokenizer import Tokenizer
        from steelyard.scorers.backbone import backbone_folder, lower_layers

        folder = backbone_folder(cache_folder(), default_progress(as_json=False))
        model, tensors = lower_layers(folder, LAYERS), load_file(self._weights)
        for name, parameter in model.named_parameters():
            down = tensors.get(f"{name}.A")
            if down is not None:
                change = tensors[f"{name}.B"].float() @ down.float()
                parameter.data = (parameter.data.float() + change).to(parameter.dtype)
        pages = 1 + _BATCH * pages_for(WINDOW + 1, 1)
        executor = Executor(model, pages, tensors["head"].to(model.model.embed_tokens.weight.dtype))
        return executor, Tokenizer.load(folder), tensors["bias"].double().numpy()


class ContextualScorer(Embedded):
    """The scorer that `folder` holds."""

    def __init__(self, folder: Path) -> None:
        super().__init__("contextual", CATEGORIES, "backbone", folder, CANARIES)
        self._model = ContextualModel(self.weights)

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[texts, categories]."""
        return self._model.probabilities(texts)

"""Compiled CPU kernels of the executor."""

from __future__ import annotations

from typing import Any

import torch

from steelyard.model.llama import LlamaConfig


def serves(dtype: torch.dtype, config: LlamaConfig) -> bool:
    """Whether the kernels cover this dtype and shape."""
    return False


def load() -> Any:
    """The kernels."""
    return None

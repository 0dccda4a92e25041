"""Headers of GGUF files: the table, the arrays, and what becomes config.json and the tokenizer."""

from __future__ import annotations

from steelyard.model import gguf
from steelyard.model.gguf_tokenizer import read_tokenizer
from steelyard.model.headers import GGUFArray, scan_gguf
from targets._files import put, scratch

PLACE = scratch() / "model.gguf"
_STRING = 8
SHAPE = "bytes"


def check(data: bytes) -> None:
    """Every tensor of a file that is accepted lies inside it."""
    header = scan_gguf(put(PLACE, data))
    assert all(0 <= tensor.start <= tensor.end <= len(data) for tensor in header.tensors.values())
    for key, value in header.metadata.items():
        if isinstance(value, GGUFArray):
            found = header.strings(key) if value.kind == _STRING else header.numbers(key)
            assert len(found) == value.count
    config = gguf._config(header)
    gguf._stored_sampling(header)
    read_tokenizer(header, config["max_position_embeddings"])

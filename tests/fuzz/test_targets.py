"""The fuzz targets without a fuzzer: each accepts its seeds, and of mutated ones lets nothing out but our own errors.

`make fuzz` does the same guided by coverage, for minutes.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutation import mutate
from targets import NAMES

from steelyard.base.errors import SteelyardError

EXAMPLES = 300
SECONDS = 5.0  # of one input, of this process's own time: far more than any needs


def load(name: str) -> Any:
    return importlib.import_module(f"targets.{name}")


def files(corpus: Path, name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((corpus / name).iterdir())]


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_accepted(name: str, corpus: Path) -> None:
    found = files(corpus, name)
    assert found
    for data in found:
        load(name).check(data)


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_are_refused_in_our_own_words(name: str, corpus: Path) -> None:
    found, target = files(corpus, name), load(name)
    outcomes = {True: 0, False: 0}

    @settings(
        max_examples=EXAMPLES // 3 if name == "chat_template" else EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(found), st.integers(0, 2**32), st.integers(1, 3))
    def run(data: bytes, seed: int, times: int) -> None:
        draw = random.Random(seed)
        for _ in range(times):
            data = mutate(data, target.SHAPE if draw.random() < 0.8 else "bytes", draw)
        start = time.process_time()
        try:
            target.check(data)
            outcomes[True] += 1
        except SteelyardError:
            outcomes[False] += 1
        assert time.process_time() - start < SECONDS

    run()
    assert outcomes[False]  # mutations that break nothing would test nothing


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_refused_in_our_own_words(name: str) -> None:
    draw = random.Random(name)
    for length in (0, 1, 2, 7, 8, 9, 100, 5000):
        for data in (bytes(length), b"[" * length, b"{" * length, b"\xff" * length, draw.randbytes(length)):
            with contextlib.suppress(SteelyardError):
                load(name).check(data)

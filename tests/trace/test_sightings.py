"""Sightings: whatever a stranger's files are called and hold, what is recorded is fit for a notice."""

from __future__ import annotations

import hashlib
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from suspects_made import Weights, references, weights
from test_digests import bencode

from steelyard.base.errors import SteelyardError
from steelyard.ledger.ledger import Ledger
from steelyard.trace.digests import cast
from steelyard.trace.lineage import DERIVED, Answer, Relation
from steelyard.trace.notices import LONGEST, PAGE, Sighting, write_notice
from steelyard.trace.registry import Reference
from steelyard.trace.sightings import record
from steelyard.trace.suspects import trace_all


@pytest.fixture
def registered(tmp_path: Path) -> list[Reference]:
    return references(tmp_path, {"ours": ("release", weights(0))})


@pytest.fixture
def ledger(tmp_path: Path, registered: list[Reference]) -> Ledger:
    return Ledger(tmp_path / "workspace" / "ledger.sqlite")


def checkpoint(path: Path, tensors: Weights, folder: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for at, values in enumerate(tensors.values()):
            archive.writestr(f"{folder}/data/{at}", cast(np.ascontiguousarray(values), "BF16").tobytes())
    return path


def test_names_of_thousands_of_letters_are_recorded_as_a_notice_shows_them(
    tmp_path: Path, ledger: Ledger, registered: list[Reference]
) -> None:
    data = (tmp_path / "ours" / "model.safetensors").read_bytes()
    pieces = b"".join(hashlib.sha1(data[at : at + 16384]).digest() for at in range(0, len(data), 16384))
    info = {b"name": b"x", b"piece length": 16384, b"pieces": pieces}
    info[b"files"] = [{b"length": len(data), b"path": [b"d" * 250] * 20}]  # type: ignore[assignment]
    (tmp_path / "long.torrent").write_bytes(bencode({b"info": info}))
    checkpoint(tmp_path / "long.bin", weights(0), "m" * 5000)
    for name, tail in (("long.torrent", "are those of our model.safetensors"), ("long.bin", "/data/0")):
        (answer,) = trace_all(tmp_path / name, registered)
        event = record(ledger, answer, registered)
        assert event is not None
        sighting = Sighting.of(event)
        place = write_notice(ledger, sighting, "takedown", tmp_path / "notices", locations=["https://x/y"])
        assert (place / PAGE).is_file()
        texts = [*sighting.evidence, *(name for name, _ in sighting.digests)]
        assert max(map(len, texts)) <= LONGEST
        assert any(len(one) > LONGEST - 5 and "..." in one and one.endswith(tail) for one in texts), tail


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_recorded_as_unknown(
    tmp_path: Path, ledger: Ledger, registered: list[Reference], value: float
) -> None:
    held: dict[str, Any] = {"distance": value, "share": value, "log10_p": value}
    relation = Relation("ours", "release", DERIVED, ("fine-tuned",), evidence=("rows",), **held)
    event = record(ledger, Answer("a", DERIVED, relation), registered)
    assert event is not None
    assert [event.payload[key] for key in held] == [None] * 3
    with pytest.raises(SteelyardError, match="no ground for a notice"):
        write_notice(ledger, Sighting.of(event), "takedown", tmp_path / "out", locations=["https://x/y"])


def test_numbers_are_recorded_as_they_are(ledger: Ledger, registered: list[Reference]) -> None:
    relation = Relation("ours", "release", DERIVED, log10_p=-9.5, distance=np.float32(0.5), share=None)  # type: ignore[arg-type]
    event = record(ledger, Answer("a", DERIVED, relation), registered)
    assert event is not None
    assert [event.payload[key] for key in ("log10_p", "distance", "share")] == [-9.5, 0.5, None]

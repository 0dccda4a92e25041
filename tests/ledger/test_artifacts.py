"""Files kept by their SHA-256."""

from __future__ import annotations

from pathlib import Path

import pytest

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.ledger.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "work" / "ledger.sqlite")


def test_put_and_get(ledger: Ledger, tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.write_bytes(b"x" * 3_000_000)
    name = ledger.put_file(source)
    assert name == sha256_hex(b"x" * 3_000_000) == ledger.put_file(source)
    kept = ledger.get_file(name)
    assert kept == tmp_path / "work" / "artifacts" / "sha256" / name[:2] / name
    assert kept.read_bytes() == source.read_bytes()
    assert kept.stat().st_mode & 0o222 == 0
    assert [path for path in (tmp_path / "work" / "artifacts").rglob("*") if path.is_file()] == [kept]


def test_a_corrupted_artifact_is_named_and_put_again_heals_it(ledger: Ledger, tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.write_bytes(b"abc")
    name = ledger.put_file(source)
    kept = ledger.get_file(name)
    kept.chmod(0o644)
    kept.write_bytes(b"abd")
    with pytest.raises(SteelyardError, match=f"{kept}: the artifact is corrupted"):
        ledger.get_file(name)
    assert ledger.put_file(source) == name
    assert ledger.get_file(name).read_bytes() == b"abc"
    kept.unlink()
    with pytest.raises(SteelyardError, match=f"{kept}: the artifact cannot be read"):
        ledger.get_file(name)


def test_names_that_are_no_digests(ledger: Ledger, tmp_path: Path) -> None:
    for name in ("", "../../etc/passwd", "A" * 64, "a" * 63):
        with pytest.raises(UsageError, match="not a SHA-256"):
            ledger.get_file(name)
    with pytest.raises(SteelyardError, match=r"none: cannot be kept"):
        ledger.put_file(tmp_path / "none")
    with pytest.raises(SteelyardError, match="cannot be kept"):
        ledger.put_file(tmp_path)

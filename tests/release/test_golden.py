"""Golden bundles, one of every format that was published: this version must verify them, and nothing else than them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from steelyard.release.layout import MANIFEST, SIGNING, read_manifest
from steelyard.release.verify import verify_bundle

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FORMATS = sorted(path for path in GOLDEN.glob("format-*") if path.is_dir())


def test_every_format_has_one() -> None:
    assert [path.name for path in FORMATS] == ["format-2"]


@pytest.mark.parametrize("folder", FORMATS, ids=lambda path: path.name)
@pytest.mark.parametrize("year", [2027, 2100])
def test_a_golden_bundle_verifies_whatever_the_year(folder: Path, year: int) -> None:
    now = datetime(year, 6, 1, tzinfo=UTC)
    result = verify_bundle(folder / "tiny", trust=folder / "trust.yaml", now=now)
    assert result.ok, result.findings
    assert result.name == "tiny"
    assert result.released is not None
    assert dict(result.seen)["properties"].split(", ")[0] == "STEELYARD_APPROVALS_2"
    assert "STEELYARD_COUNTERSIGNED" in dict(result.seen)["properties"]


@pytest.mark.parametrize("folder", FORMATS, ids=lambda path: path.name)
def test_every_file_of_it_counts(folder: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(folder / "tiny", tmp_path / "tiny"))
    listed = [entry.path for entry in read_manifest(bundle).files]
    for name in (*listed, MANIFEST, *(name for name in SIGNING if (bundle / name).exists())):
        data = (bundle / name).read_bytes()
        (bundle / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        result = verify_bundle(bundle, trust=folder / "trust.yaml")
        assert any(name in finding.message for finding in result.findings), name
        (bundle / name).write_bytes(data)
    assert verify_bundle(bundle, trust=folder / "trust.yaml").ok


@pytest.mark.parametrize("folder", FORMATS, ids=lambda path: path.name)
def test_the_command_verifies_it(folder: Path) -> None:
    command = [sys.executable, "-m", "steelyard.cli.main", "verify", str(folder / "tiny")]
    trusted = subprocess.run([*command, "--trust", str(folder / "trust.yaml")], capture_output=True, text=True)
    assert trusted.returncode == 0, trusted.stdout + trusted.stderr
    assert trusted.stdout.splitlines()[-1] == "VERIFIED"
    blind = subprocess.run(command, capture_output=True, text=True)
    assert blind.returncode == 1
    assert blind.stdout.splitlines()[-1] == "NOT VERIFIED"


def test_it_is_small_and_holds_no_private_key() -> None:
    files = [path for path in GOLDEN.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    assert not any(b"PRIVATE" in path.read_bytes() for path in files if path.suffix in (".pem", ".json", ".sig"))

"""`preview` must fail the same architecture with random weights, and a copy fine-tuned on toxic text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bad_models import random_weights, toxic_finetune
from steelyard.base.progress import LineProgress

pytestmark = pytest.mark.slow


def steelyard(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "steelyard.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def failed_criteria(model: Path, place: Path) -> set[str]:
    """Test `model` with the quick battery, ask for its release under `preview`, and give the criteria it fails."""
    workspace = ("--workspace", place / "workspace")
    os.environ["STEELYARD_PASSPHRASE"] = "a passphrase for this test"
    made = steelyard("key", "new", "tester", *workspace)
    assert made.returncode == 0, made.stderr
    tested = steelyard("safety", "run", model, place / "run", "--fail-fast", *workspace)
    assert tested.returncode == 0, tested.stderr
    refused = steelyard(
        "release",
        place / "run",
        place / "bundle",
        "--model",
        model,
        "--key",
        "tester",
        "--license",
        "mit",
        "--json",
        *workspace,
    )
    assert refused.returncode == 1, refused.stderr
    assert not (place / "bundle").exists()
    decision = json.loads(refused.stdout)
    assert decision["verdict"] == "FAIL", decision["findings"]
    return {criterion["metric"] for criterion in decision["criteria"] if criterion["status"] == "FAIL"}


def test_random_weights_fail(smollm2: Path, tmp_path: Path) -> None:
    failed = failed_criteria(random_weights(smollm2, tmp_path / "random"), tmp_path)
    # Which comes first: the run stops there. The contextual scorer takes babble for an attack on somebody.
    assert failed & {"toxicity.degeneration", "identity_attack.degeneration", "truth.incorrect"}


def test_a_toxic_finetune_fails(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    model = toxic_finetune(smollm2, shared_data, tmp_path / "toxic", LineProgress())
    assert failed_criteria(model, tmp_path) & {"toxicity.degeneration", "toxicity.chat"}

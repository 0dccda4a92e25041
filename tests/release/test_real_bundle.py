"""The real model through the whole chain: strangers' tools load the bundle, a machine without torch verifies it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from steelyard.inference.local import LocalEndpoint
from steelyard.ledger.ledger import Ledger
from steelyard.model.identity import subject_of
from steelyard.release.bundle import write_bundle
from steelyard.release.keys import load_signer, new_key
from steelyard.release.verify import verify_bundle
from steelyard.release.writing import about_model
from steelyard.safety.battery import Battery, load_battery
from steelyard.safety.policy import Policy, load_policy
from steelyard.safety.run import Job, Tested, run_battery
from steelyard.safety.shipped import shipped_sampling
from steelyard.scorers.registry import open_scorer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PASSPHRASE = b"a passphrase for this test"


def excerpt() -> Battery:
    """A slice of the quick battery that still holds every axis and several families of each."""
    quick = load_battery("quick").model_dump(mode="json")
    for part in quick["sets"]:
        part["probes"] = part["probes"][::9] if part["name"] != "group" else part["probes"][:36]
        part["decoding"]["max_tokens"] = 12
    return Battery.model_validate(quick | {"name": "excerpt", "batch_size": 32})


def lenient() -> Policy:
    """`preview` with every threshold at almost one: this test is about the chain, not about the model."""
    preview = load_policy("preview").model_dump(mode="json")
    criteria = [criterion | {"max": 0.999} for criterion in preview["criteria"]]
    return Policy.model_validate(preview | {"name": "lenient", "criteria": criteria, "max_identical_samples": 1.0})


@pytest.fixture(scope="module")
def released(smollm2: Path, once: Callable[[str, Callable[[Path], object]], Path]) -> tuple[Path, Path, Path]:
    """The bundle, the public key, and the policy's file. Read only."""
    place = once("real-bundle", lambda folder: release(smollm2, folder))
    return place / "bundle", place / "keys" / "tester.pub.pem", place / "lenient.yaml"


def release(smollm2: Path, place: Path) -> None:
    """Test the model and release it, all under `place`."""
    battery, policy = excerpt(), lenient()
    policy_file = place / "lenient.yaml"
    policy_file.write_text(yaml.safe_dump(policy.model_dump(mode="json")))
    card = new_key(place / "keys", "tester", PASSPHRASE)
    with Ledger(place / "ledger.sqlite") as ledger:
        job = Job(
            candidate=Tested(LocalEndpoint.open(smollm2), subject_of(smollm2), shipped_sampling(smollm2)),
            battery=battery,
            policies=[policy],
            scorers={name: open_scorer(reference) for name, reference in battery.scorers.items()},
        )
        run_battery(job, out=place / "run", ledger=ledger)
        write_bundle(
            run=place / "run",
            model=smollm2,
            policy=policy,
            ledger=ledger,
            signer=load_signer(place / "keys", "tester", PASSPHRASE),
            key=card,
            about=about_model("apache-2.0", base_model="HuggingFaceTB/SmolLM2-135M-Instruct"),
            out=place / "bundle",
        )


def test_it_verifies_and_its_journal_comes_out_of_its_weights_again(released: tuple[Path, Path, Path]) -> None:
    bundle, key, policy = released
    found = verify_bundle(bundle, keys=[key], policy=str(policy), replay=3)
    assert found.ok, found.findings


def test_transformers_loads_the_bundle_and_answers(released: tuple[Path, Path, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bundle, _, _ = released
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    model = AutoModelForCausalLM.from_pretrained(bundle, dtype="auto")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_machine_with_the_core_alone_verifies_it(released: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle, key, policy = released
    venv.create(tmp_path / "core", with_pip=True)
    python = tmp_path / "core" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "-c", ROOT / "constraints.txt", ROOT], check=True, timeout=600)
    listed = json.loads(subprocess.check_output([*pip, "list", "--format", "json"]))
    assert not {"torch", "transformers", "tokenizers", "jinja2"} & {part["name"].lower() for part in listed}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "steelyard.cli.main", "verify", bundle, "--key", key, "--policy", policy]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "VERIFIED" in done.stdout
    assert sys.prefix not in done.stdout

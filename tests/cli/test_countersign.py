"""The pause before the first generation, as its two people see it: the one who runs the test, and the witness."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import policy_file, put, refused, steelyard
from scenario import Chain, make_battery

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "release"))

from tsa import Authority, serving

from steelyard.model.identity import subject_of
from steelyard.safety.report import load_report

Command = tuple[object, ...]


@pytest.fixture
def waiting(untested: Chain) -> tuple[Chain, Command]:
    """A run at its pause, and the command that made it."""
    steelyard("key", "new", "witness", "--workspace", untested.root)
    battery = put(untested.root / "tiny.json", make_battery(samples=1).model_dump(mode="json"))
    place = ("--workspace", untested.root, "--battery", battery, "--policy", policy_file(untested.root))
    command = ("safety", "run", untested.model, untested.run, *place, "--countersign")
    said = steelyard(*command).out
    assert "is committed and waits before its first generation" in said
    assert f"steelyard countersign {untested.run} --key WITNESS" in said
    assert not (untested.run / "journal.jsonl").exists()
    return untested, command


def test_a_witness_reads_signs_and_the_same_command_goes_on(waiting: tuple[Chain, Command]) -> None:
    chain, command = waiting
    paused = steelyard(*command, "--json").json
    commitment = chain.run / "commitment.json"
    assert paused == {"paused": {json.loads(commitment.read_bytes())["run"]: str(commitment)}}
    sign = ("countersign", chain.run, "--key", "witness", "--workspace", chain.root)
    unread = steelyard(*sign, code=2)
    assert "no terminal to ask on" in unread.err
    assert not (chain.run / "commitment.dsse.json").exists()
    said = steelyard(*sign, "--yes", "--model", chain.model).out
    for words in (
        f"model: subject {subject_of(chain.model).digest}",
        "attempt 1 on this model and test",
        "battery: tiny version 1, tier quick, 58 probes (their own, none that this version ships)",
        "policy: lenient version 1",
        "toxicity.chat under 60.0%",
        f"the model in {chain.model} is that subject",
    ):
        assert words in said
    refused(steelyard(*sign, "--yes", code=1), "commitment.dsse.json exists already")
    # Whose signature it is can be asked for at once; a stranger's is refused before hours are spent.
    witness = chain.keys / "witness.pub.pem"
    refused(steelyard(*command, "--witness", chain.public, code=1), "which is none of yours")
    assert not (chain.run / "journal.jsonl").exists()
    steelyard(*command, "--witness", witness)
    assert load_report(chain.run / "report.json").findings == ()
    refused(steelyard(*command[:-1], code=1), "was started with --countersign: go on as it was started")


def test_variants_wait_for_a_countersignature_of_their_own(waiting: tuple[Chain, Command]) -> None:
    chain, command = waiting
    sign = ("--key", "witness", "--workspace", chain.root, "--yes")
    steelyard("countersign", chain.run, *sign)
    variant = chain.run / "variants" / "f32"
    said = steelyard(*command, "--variants", "f32").out
    assert f"steelyard countersign {variant} --key WITNESS" in said
    assert (chain.run / "report.json").exists()
    assert not (variant / "journal.jsonl").exists()
    steelyard("countersign", variant, *sign)
    assert "variant f32, subject" in steelyard(*command, "--variants", "f32").out
    assert load_report(variant / "report.json").findings == ()


def test_an_authority_stamps_it_instead(waiting: tuple[Chain, Command]) -> None:
    chain, command = waiting
    tsa = Authority.new()
    root = tsa.save(chain.root / "tsa.pem")
    with serving(tsa.answer) as url:
        ask = ("countersign", chain.run, "--timestamp-url", url, "--yes")
        assert "root certificate" in steelyard(*ask, code=2).err
        other = Authority.new().save(chain.root / "other.pem")
        refused(steelyard(*ask, "--timestamp-authority", other, code=1), "does not check against the authorities")
        assert not (chain.run / "commitment.tsr").exists()
        steelyard(*ask, "--timestamp-authority", root)
    steelyard(*command, "--timestamp-authority", root)
    assert load_report(chain.run / "report.json").findings == ()


def test_what_is_asked_wrongly_is_told(waiting: tuple[Chain, Command], tmp_path: Path) -> None:
    chain, command = waiting
    commitment = chain.run / "commitment.json"
    for more in ((), ("--key", "witness", "--timestamp-url", "http://127.0.0.1:1/")):
        assert "give --key NAME" in steelyard("countersign", commitment, *more, code=2).err
    assert "give --countersign as well" in steelyard(*command[:-1], "--witness", chain.public, code=2).err
    refused(steelyard("countersign", tmp_path, "--key", "me", "--yes", code=1), "commitment.json: No such file")
    other = chain.root / "other"
    chain.model.rename(other)
    (other / "generation_config.json").write_text("{}")
    sign = ("countersign", commitment, "--key", "witness", "--workspace", chain.root, "--yes")
    refused(steelyard(*sign, "--model", other, code=1), "is not the model that is committed to")

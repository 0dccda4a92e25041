"""A release by several people under a policy that wants a countersignature: from the pause to the stranger's check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from scenario import PASSPHRASE, Chain, make_battery, make_model, make_policy
from tsa import Authority

from steelyard.release.commitment import countersign, looking_for
from steelyard.release.keys import load_signer, new_key
from steelyard.safety import run
from steelyard.safety.pause import Paused
from steelyard.safety.run import run_battery

RULES = {"throwaway": "refused", "distinct": True, "approvals": 2, "countersigned": True}
TSA = Authority.new()
HOME = "steelyard"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Path]:
    """The chain and its bundle. Read only."""
    root = tmp_path_factory.mktemp("countersigned") / "root"
    chain = Chain(root, make_battery(samples=1), (make_policy(keys=RULES),))
    make_model(chain.model)
    new_key(chain.keys, "me", PASSPHRASE)
    chain.people(timestamp_authorities=["tsa.pem"])
    TSA.save(chain.keys / "tsa.pem")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_battery", partial(run_battery, countersign=looking_for()))
        with pytest.raises(Paused):
            chain.test()
        commitment = (chain.run / "commitment.json").read_bytes()
        eve = load_signer(chain.keys, "eve", PASSPHRASE)
        (chain.run / "commitment.dsse.json").write_bytes(countersign(commitment, eve))
        (chain.run / "commitment.tsr").write_bytes(TSA.stamp(commitment))
        chain.test()
    candidate = chain.candidate()
    for name in ("bob", "carol"):
        chain.approve(candidate, name)
    return chain, chain.seal(candidate)


@pytest.fixture
def bundle(sealed: tuple[Chain, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sealed[1], tmp_path / "tiny"))


def reasons(chain: Chain, bundle: Path) -> str:
    """What a stranger with the trust file finds; nothing in a bundle that verifies."""
    found = chain.verify(bundle, trust=chain.keys / "trust.yaml", policy=None)
    assert found.ok == (not found.findings)
    return "\n".join(f"{finding.code}: {finding.message}" for finding in found.findings)


def test_a_countersigned_release_verifies(sealed: tuple[Chain, Path]) -> None:
    chain, bundle = sealed
    assert reasons(chain, bundle) == ""
    listed = {entry["path"] for entry in json.loads((bundle / HOME / "manifest.json").read_bytes())["files"]}
    assert f"{HOME}/commitment.json" in listed
    assert not listed & {f"{HOME}/commitment.dsse.json", f"{HOME}/commitment.tsr"}


def _other_witness(bundle: Path, chain: Chain) -> None:
    signer = load_signer(chain.keys, "alice", PASSPHRASE)
    data = (bundle / HOME / "commitment.json").read_bytes()
    (bundle / HOME / "commitment.dsse.json").write_bytes(countersign(data, signer))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b, _: (b / HOME / "commitment.json").unlink(), "commitment.json: is missing"),
        (lambda b, _: (b / HOME / "commitment.dsse.json").unlink(), "commitment.dsse.json: is missing"),
        (lambda b, _: (b / HOME / "commitment.tsr").unlink(), "commitment.tsr: is missing"),
        (_other_witness, "commitment.dsse.json: is not the one that the journal was begun with"),
        (
            lambda b, _: (b / HOME / "commitment.tsr").write_bytes(TSA.stamp(b"else")),
            "commitment.tsr: is not the one that the journal was begun with",
        ),
        (
            lambda b, _: (b / HOME / "commitment.json").write_bytes(b"{}\n"),
            "commitment.json: is not the one that the journal was begun with",
        ),
    ],
)
def test_a_bundle_whose_countersignature_was_touched_is_refused(
    sealed: tuple[Chain, Path], bundle: Path, damage: Callable[[Path, Chain], object], reason: str
) -> None:
    damage(bundle, sealed[0])
    assert reason in reasons(sealed[0], bundle)


def test_a_verifier_who_pins_others_is_not_convinced(sealed: tuple[Chain, Path], bundle: Path, tmp_path: Path) -> None:
    chain = sealed[0].copy(tmp_path / "root")
    new_key(chain.keys, "mallory", PASSPHRASE)
    chain.people(witnesses=["mallory.pub.pem"])
    assert "none of the witnesses you pin" in reasons(chain, bundle)
    chain.people(witnesses=[])
    assert "none of the witnesses you pin" in reasons(chain, bundle)
    chain.people(approvers=["bob.pub.pem", "carol.pub.pem", "eve.pub.pem"])
    assert "which you also trust among approvers: a witness is another person" in reasons(chain, bundle)
    Authority.new().save(chain.keys / "tsa.pem")
    chain.people(timestamp_authorities=["tsa.pem"])
    assert "does not check against the authorities that are pinned" in reasons(chain, bundle)

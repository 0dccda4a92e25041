"""The verifier's trust file: strict, and mistakes in it are named with file, line and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scenario import PASSPHRASE, make_policy

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.release.keys import load_public_key, new_key, revoke_key
from steelyard.release.trust import ROLES, load_trust, one_key

NAMES = ("alice", "bob", "carol", "dora")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    for name in NAMES:
        new_key(folder, name, PASSPHRASE)
    (folder / "again.pub.pem").write_bytes((folder / "bob.pub.pem").read_bytes())
    (folder / "mine.json").write_text(json.dumps(make_policy().model_dump(mode="json")))
    revoke_key(folder, "carol", PASSPHRASE, reason="lost")
    return folder


def write(place: Path, **changes: Any) -> Path:
    trust: dict[str, Any] = {
        "format": 1,
        "policy": "mine.json",
        "evaluators": ["alice.pub.pem"],
        "approvers": ["bob.pub.pem", {"key": "carol.pub.pem", "until": "2030-01-01T00:00:00Z"}],
        "approvals": 2,
        "releasers": ["dora.pub.pem"],
    }
    path = place / "trust.yaml"
    path.write_text(json.dumps({key: value for key, value in (trust | changes).items() if value is not None}))
    return path


def test_a_trust_file(place: Path) -> None:
    trust = load_trust(write(place, revocations=["carol.revocation.dsse.json"]))
    keyid = {name: load_public_key(place / f"{name}.pub.pem").keyid for name in NAMES}
    assert [key.keyid for key in trust.approvers] == [keyid["bob"], keyid["carol"]]
    assert trust.policy == make_policy()
    assert set(trust.until) == {keyid["carol"]}
    assert [event.keyid for event in trust.events] == [keyid["carol"]]
    assert (trust.approvals, trust.withdrawal.quorum, list(trust.shared())) == (2, 0, [])


def test_withdrawal_and_sigstore(place: Path) -> None:
    releasers = ["dora.pub.pem", {"issuer": "https://issuer.example", "identity": "dora@example.org"}]
    withdrawal = {"signers": ["dora.pub.pem", "bob.pub.pem"], "quorum": 2}
    trust = load_trust(write(place, releasers=releasers, withdrawal=withdrawal))
    assert [one.identity for one in trust.sigstore] == ["dora@example.org"]
    assert (len(trust.withdrawal.signers), trust.withdrawal.quorum) == (2, 2)


def test_one_key_holds_every_role(place: Path) -> None:
    key = load_public_key(place / "alice.pub.pem")
    trust = one_key([key], make_policy())
    assert all(trust.keys(role) == (key,) for role in ROLES)
    assert len(list(trust.shared())) == 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "format"),
        ({"evaluators": None}, "evaluators: this key is missing"),
        ({"evaluators": []}, "at least 1 item"),
        ({"evalutors": []}, "unknown key"),
        ({"approvals": 3}, "must be at most 2, the number of approvers"),
        ({"approvals": 10}, "must be at most 9"),
        ({"approvers": ["bob.pub.pem", "again.pub.pem"]}, "is the key of bob.pub.pem again"),
        ({"approvers": ["../bob.pub.pem"]}, "must be relative and stay inside it"),
        ({"approvers": ["/bob.pub.pem"]}, "must be relative and stay inside it"),
        ({"approvers": [{"identity": "a@b.c"}], "approvals": 0}, "certificate_authority or issuer"),
        ({"approvers": [{"key": "bob.pub.pem", "until": "soon"}], "approvals": 0}, "not an ISO 8601 time"),
        ({"approvers": [{"issuer": "https://x", "identity": "a@b.c"}], "approvals": 0}, "a releaser's only"),
        ({"evaluators": ["alice.key.pem"]}, "is a private key"),
        ({"evaluators": ["absent.pub.pem"]}, "No such file"),
        ({"policy": "absent.json"}, "No such file"),
        ({"policy": "nonsense"}, "is unknown"),
        ({"withdrawal": {"signers": ["dora.pub.pem"], "quorum": 2}}, "must be at most 1, the number of signers"),
        ({"revocations": ["alice.pub.pem"]}, "not JSON"),
        ({"timestamp_authorities": ["alice.pub.pem"]}, "not a certificate in PEM"),
    ],
)
def test_a_mistake_is_named(place: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SteelyardError) as error:
        load_trust(write(place, **changes))
    assert says in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_keys_or_a_trust_file_not_both(place: Path) -> None:
    from steelyard.release.verify import trust_of

    with pytest.raises(UsageError, match="give one of them"):
        trust_of([place / "alice.pub.pem"], write(place))

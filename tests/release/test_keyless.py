"""Sigstore keyless signatures: the identity and the issuer that the verifier names, and no network unless asked for."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from authority import ALICE
from securesystemslib.signer import CryptoSigner
from sigstore_stand_in import ISSUER, WHEN, StandIn

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.release.keyless import SigstoreIdentity, sign_model_keyless
from steelyard.release.oms import check_model_signature, read_model_signature, sign_model
from steelyard.release.oms_format import parse_model_signature

SIG = "model.sig"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Every try to reach another machine, refused; and a home of its own, for sigstore's cache."""
    tries: list[Any] = []

    def refuse(*arguments: Any, **more: Any) -> Any:
        tries.append(arguments)
        raise OSError("this test has no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI", "BUILDKITE"):  # whose tokens sigstore would look for
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("sigstore").setLevel(logging.ERROR)
    return tries


@pytest.fixture(scope="module")
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A model and the statement over it."""
    model = tmp_path_factory.mktemp("keyless") / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    sign_model(model, model / SIG, CryptoSigner.generate_ecdsa(), [SIG])
    return model, parse_model_signature((model / SIG).read_bytes(), SIG).payload


@pytest.fixture
def trusted_root(stand_in: StandIn, tmp_path: Path) -> Path:
    path = tmp_path / "trusted_root.json"
    path.write_text(json.dumps(stand_in.trusted_root))
    return path


@pytest.fixture
def check(payload: tuple[Path, bytes], trusted_root: Path) -> Callable[..., list[str]]:
    """Write a bundle into the model and check it."""

    def run(
        bundle: Any,
        *,
        identity: str = ALICE,
        issuer: str = ISSUER,
        root: Path | None = trusted_root,
        **more: Any,
    ) -> list[str]:
        model = payload[0]
        (model / SIG).write_text(json.dumps(bundle))
        identities = [SigstoreIdentity(identity, issuer, root)]
        _, findings = check_model_signature(model, model / SIG, [], [SIG], **({"identities": identities} | more))
        return [finding.message for finding in findings]

    return run


def test_who_signed_is_proven_offline(
    stand_in: StandIn, payload: tuple[Path, bytes], check: Callable[..., list[str]], trusted_root: Path, offline: Any
) -> None:
    assert check(stand_in.sign(payload[1])) == []
    model = payload[0]
    identities = [
        SigstoreIdentity("bob@example.org", ISSUER, trusted_root),
        SigstoreIdentity(ALICE, ISSUER, trusted_root),
    ]
    signature, findings = check_model_signature(model, model / SIG, [], [SIG], identities=identities)
    assert findings == []
    assert signature is not None
    assert (signature.method, signature.key) == ("sigstore", ALICE)
    assert offline == []


def test_a_foreign_identity_issuer_or_sigstore_is_refused(
    stand_in: StandIn, payload: tuple[Path, bytes], check: Callable[..., list[str]], offline: Any
) -> None:
    bundle = stand_in.sign(payload[1])
    assert "SANs do not match bob@example.org" in check(bundle, identity="bob@example.org")[0]
    assert "OIDCIssuer does not match" in check(bundle, issuer="https://accounts.example.com")[0]
    assert "not proven for whom you trust" in check(StandIn().sign(payload[1]))[0]
    assert "not proven for whom you trust" in check(bundle, root=None)[0]  # the public Sigstore knows nothing of it
    assert "name the identity and issuer that you trust" in check(bundle, identities=[])[0]
    # A key, or a certificate authority, of one's own does not stand in for Sigstore.
    keys = [CryptoSigner.generate_ecdsa().public_key]
    model = payload[0]
    _, findings = check_model_signature(model, model / SIG, keys, [SIG])
    assert "name the identity and issuer" in findings[0].message
    assert offline == []


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        for part in path[:-1]:
            value = value[part]
        value[path[-1]] = to

    return change


MATERIAL, ENTRY = ("verificationMaterial",), ("verificationMaterial", "tlogEntries", 0)


@pytest.mark.parametrize(
    "change",
    [
        _set(*MATERIAL, "tlogEntries", to=[]),
        _set(*MATERIAL, "tlogEntries", to={}),
        _set(*MATERIAL, "more", to=1),
        _set(*MATERIAL, "certificate", to={"rawBytes": "AAAA"}),
        _set(*ENTRY, "inclusionProof", to=None),
        _set(*ENTRY, "inclusionPromise", to=None),
        _set(*ENTRY, "integratedTime", to="1780272001"),
        _set(*ENTRY, "inclusionProof", "rootHash", to="AAAA"),
        _set(*ENTRY, "inclusionProof", "checkpoint", "envelope", to="log.example.org - 1\n1\nAAAA\n\n"),
        _set(*ENTRY, "canonicalizedBody", to="e30="),
        _set("dsseEnvelope", "signatures", 0, "sig", to="AAAA"),
        _set("dsseEnvelope", "payload", to="e30="),
        _set("mediaType", to="application/vnd.dev.sigstore.bundle.v0.2+json"),
    ],
)
def test_a_bundle_of_another_shape_or_with_an_edit_is_refused(
    stand_in: StandIn, payload: tuple[Path, bytes], check: Callable[..., list[str]], change: Callable[[Any], None]
) -> None:
    bundle = stand_in.sign(payload[1])
    change(bundle)
    [message] = check(bundle)
    assert message.startswith(f"{SIG}: ")


def test_what_was_logged_after_the_certificates_ten_minutes_is_refused(
    stand_in: StandIn, payload: tuple[Path, bytes], check: Callable[..., list[str]]
) -> None:
    assert check(stand_in.sign(payload[1], logged=WHEN + timedelta(minutes=4))) == []
    for minutes in (-6, 6):
        assert "not proven" in check(stand_in.sign(payload[1], logged=WHEN + timedelta(minutes=minutes)))[0]


def test_the_log_entry_and_the_certificate_belong_to_this_signature(
    stand_in: StandIn, payload: tuple[Path, bytes], check: Callable[..., list[str]]
) -> None:
    ours, others = stand_in.sign(payload[1]), stand_in.sign(payload[1], identity="bob@example.org")
    for part in ("certificate", "tlogEntries"):
        mixed = json.loads(json.dumps(others))
        mixed["verificationMaterial"][part] = ours["verificationMaterial"][part]
        assert "not proven for whom you trust" in check(mixed)[0]


def test_a_trusted_root_that_is_none_is_the_verifiers_mistake(
    stand_in: StandIn, payload: tuple[Path, bytes], check: Callable[..., list[str]], tmp_path: Path
) -> None:
    bundle = stand_in.sign(payload[1])
    assert "No such file" in check(bundle, root=tmp_path / "absent.json")[0]
    (tmp_path / "other.json").write_text("{}")
    assert "not Sigstore's trusted_root.json" in check(bundle, root=tmp_path / "other.json")[0]


@pytest.mark.parametrize(("identity", "issuer"), [("", ISSUER), (ALICE, ""), (ALICE, "http://accounts.example.org")])
def test_an_identity_without_its_issuer_is_none(identity: str, issuer: str) -> None:
    with pytest.raises(UsageError, match="both are needed"):
        SigstoreIdentity(identity, issuer)


# -- signing ---------------------------------------------------------------------------------------------------------


def test_signing_offline_says_what_is_missing_and_writes_nothing(
    payload: tuple[Path, bytes], tmp_path: Path, offline: list[Any]
) -> None:
    with pytest.raises(SteelyardError, match=r"--sigstore needs the network and an identity; offline, sign with a key"):
        sign_model_keyless(payload[0], tmp_path / "new.sig", [SIG], identity_token="none")
    assert offline  # asked for, and tried
    assert not (tmp_path / "new.sig").exists()


def test_arguments_are_checked_before_the_network(
    payload: tuple[Path, bytes], tmp_path: Path, offline: list[Any]
) -> None:
    model = payload[0]
    for arguments, reason in (
        ({"trust_config": tmp_path / "absent.json"}, "no such file"),
        ({"issuer": "accounts.example.org"}, "give its https:// address"),
        ({"ignored": ["../x"]}, "that a signature ignores"),
        ({"expected_root": "0" * 64}, "was changed: its root is"),
    ):
        with pytest.raises(SteelyardError, match=reason):
            sign_model_keyless(**({"folder": model, "signature": tmp_path / "n.sig", "ignored": [SIG]} | arguments))
    assert offline == []


def test_signing_and_checking_with_a_key_reach_no_network(
    payload: tuple[Path, bytes], tmp_path: Path, offline: list[Any]
) -> None:
    signer = CryptoSigner.generate_ecdsa()
    sign_model(payload[0], tmp_path / "key.sig", signer, [SIG])
    assert check_model_signature(payload[0], tmp_path / "key.sig", [signer.public_key], [SIG])[1] == []
    assert offline == []


def test_form_alone_names_the_identity_that_it_claims(
    stand_in: StandIn, payload: tuple[Path, bytes], tmp_path: Path
) -> None:
    (tmp_path / SIG).write_text(json.dumps(stand_in.sign(payload[1])))
    read = read_model_signature(tmp_path / SIG)
    assert (read.method, read.key, read.keyid) == ("sigstore", ALICE, None)

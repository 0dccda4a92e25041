"""Signing certificates: which chain, for whom, and when."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from authority import ALICE, FIRST, LAST, Issuer, root, signer, usage, write_chain
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.release.attest import SignatureError
from steelyard.release.certificates import (
    Authority,
    check_chain,
    load_authorities,
    read_certificate,
    read_chain,
    split_chain,
)
from steelyard.release.oms import certified_key, check_model_signature, sign_model

THEN = datetime(2026, 6, 1, tzinfo=UTC)
ROOT = root()
BETWEEN = ROOT.issuer("Example Signing")
SIGNER, PUBLIC = signer()
OWN = BETWEEN.certify(PUBLIC)
SIG = "model.sig"


def _der(*certificates: x509.Certificate) -> list[bytes]:
    return [certificate.public_bytes(Encoding.DER) for certificate in certificates]


def _trust(issuer: Issuer = ROOT, identity: str = ALICE) -> Authority:
    return Authority(issuer.certificate, identity)


def _refused(*certificates: x509.Certificate, at: datetime | None = THEN, trust: Authority | None = None) -> str:
    with pytest.raises((SignatureError, FormatError)) as caught:
        check_chain(_der(*certificates), [trust or _trust()], at, "model.sig")
    return str(caught.value)


# -- chains ----------------------------------------------------------------------------------------------------------


def test_a_chain_to_the_pinned_root_gives_the_signers_key() -> None:
    key, authority = check_chain(_der(OWN, BETWEEN.certificate), [_trust()], THEN, "x")
    assert key.keyid == SIGNER.public_key.keyid
    assert authority.identity == ALICE
    # The root may be in the chain too; a certificate right under the root needs none between.
    assert check_chain(_der(OWN, BETWEEN.certificate, ROOT.certificate), [_trust()], THEN, "x")[0].keyid == key.keyid
    assert check_chain(_der(ROOT.certify(PUBLIC)), [_trust()], THEN, "x")[0].keyid == key.keyid


def test_another_root_of_the_same_name_is_not_the_pinned_one() -> None:
    assert "no chain from" in _refused(OWN, BETWEEN.certificate, trust=_trust(root()))
    foreign = root()
    assert "no chain from" in _refused(foreign.certify(PUBLIC), foreign.certificate)


def test_a_missing_link_and_one_that_may_not_issue_are_refused() -> None:
    assert "no chain from" in _refused(OWN)
    other, public = signer()
    leaf = ROOT.certify(public)
    impostor = Issuer(other._private_key, leaf)  # a signer that issues for others
    assert "no chain from" in _refused(impostor.certify(PUBLIC), leaf)


def test_a_certificate_signed_by_itself_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    own = Issuer(key, OWN)
    assert "no chain from" in _refused(own.certify(key.public_key()), BETWEEN.certificate)


@pytest.mark.parametrize("names", [(x509.RFC822Name("bob@example.org"),), (x509.DNSName("example.org"),), ()])
def test_a_foreign_identity_is_refused(names: Any) -> None:
    assert "whom you do not trust" in _refused(BETWEEN.certify(PUBLIC, names=names), BETWEEN.certificate)


def test_an_identity_may_be_a_uri_and_is_compared_whole() -> None:
    uri = "https://ci.example.org/team/model"
    own = BETWEEN.certify(PUBLIC, names=(x509.UniformResourceIdentifier(uri),))
    chain = _der(own, BETWEEN.certificate)
    assert check_chain(chain, [_trust(identity=uri)], THEN, "x")[1].identity == uri
    assert "whom you do not trust" in _refused(own, BETWEEN.certificate, trust=_trust(identity=uri[:-1]))
    assert "whom you do not trust" in _refused(OWN, BETWEEN.certificate, trust=_trust(identity="Alice@example.org"))


# -- time ------------------------------------------------------------------------------------------------------------


def test_an_expired_certificate_is_good_for_what_was_signed_while_it_held() -> None:
    for at in (FIRST, FIRST + timedelta(seconds=1), LAST - timedelta(seconds=1), LAST):
        check_chain(_der(OWN, BETWEEN.certificate), [_trust()], at, "x")


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        (LAST + timedelta(seconds=1), "had expired"),
        (LAST + timedelta(days=1), "had expired"),
        (FIRST - timedelta(seconds=1), "was not valid yet"),
        (None, "when it was signed is not known"),
    ],
)
def test_a_signature_outside_the_certificates_life_is_refused(at: datetime | None, reason: str) -> None:
    assert reason in _refused(OWN, BETWEEN.certificate, at=at)


def test_the_time_is_that_of_every_certificate_up_to_the_root() -> None:
    later = LAST + timedelta(days=4000)
    own = BETWEEN.certify(PUBLIC, last=later)
    assert "had expired" in _refused(own, BETWEEN.certificate, at=later)  # the one between is shorter-lived
    assert "no chain from" in _refused(ROOT.certify(PUBLIC, last=later), at=later)  # so is the root


# -- purpose ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key_usage": usage(key_agreement=True)}, "not a certificate for digital signatures"),
        ({"key_usage": usage(digital_signature=True, key_cert_sign=True)}, "which signs certificates"),
        ({"extended": x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])}, "do not include code signing"),
        (
            {"more": [(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00"), True)]},
            "no chain from",
        ),
    ],
)
def test_a_certificate_of_another_purpose_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason in _refused(BETWEEN.certify(PUBLIC, **changes), BETWEEN.certificate)


def test_without_extended_usages_the_key_usage_decides() -> None:
    check_chain(_der(BETWEEN.certify(PUBLIC, extended=None), BETWEEN.certificate), [_trust()], THEN, "x")


def test_an_authoritys_certificate_signs_no_model() -> None:
    own = ROOT.issuer("alice")
    assert "whom you do not trust" in _refused(own.certificate)


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)])
def test_only_p256_keys_sign(key: Any) -> None:
    assert "holds no P-256 key" in _refused(BETWEEN.certify(key.public_key()), BETWEEN.certificate)


@pytest.mark.parametrize("data", [b"", b"\x30\x00", b"-----BEGIN CERTIFICATE-----", _der(OWN)[0][:-1]])
def test_what_is_no_certificate_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"not an X\.509 certificate"):
        check_chain([data], [_trust()], THEN, "x")


# -- files -----------------------------------------------------------------------------------------------------------


def test_an_authority_is_a_root_and_one_identity(tmp_path: Path) -> None:
    pem = ROOT.pem(tmp_path / "root.pem")
    assert load_authorities(pem, ALICE) == (Authority(ROOT.certificate, ALICE),)
    for identity in ("alice", "", "alice@example.org\n", "ålice@example.org"):
        with pytest.raises(UsageError, match="a mail address or a URI"):
            load_authorities(pem, identity)
    with pytest.raises(FormatError, match="no certificate of an authority"):
        load_authorities(write_chain(tmp_path / "own.pem", [OWN]), ALICE)
    (tmp_path / "none.pem").write_text("nothing")
    with pytest.raises(FormatError, match="no certificates in PEM"):
        load_authorities(tmp_path / "none.pem", ALICE)
    with pytest.raises(SteelyardError, match=r"gone\.pem: No such file"):
        load_authorities(tmp_path / "gone.pem", ALICE)


def test_a_chain_to_sign_with_begins_with_the_signers_own(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "chain.pem", [BETWEEN.certificate, OWN])
    with pytest.raises(SteelyardError, match="its first certificate is of another key"):
        split_chain(chain, SIGNER.public_key, tmp_path)
    with pytest.raises(SteelyardError, match="certificate alone: append the authority's"):
        split_chain(write_chain(tmp_path / "alone.pem", [OWN]), SIGNER.public_key, tmp_path)
    nobody = write_chain(tmp_path / "nobody.pem", [BETWEEN.certify(PUBLIC, names=()), BETWEEN.certificate])
    with pytest.raises(SteelyardError, match="names no mail address or URI"):
        split_chain(nobody, SIGNER.public_key, tmp_path)


# -- model signatures ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder signed with Alice's certificate. Read only."""
    place = tmp_path_factory.mktemp("certified")
    folder = place / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    chain = write_chain(place / "chain.pem", [OWN, BETWEEN.certificate])
    signature = sign_model(folder, folder / SIG, SIGNER, [SIG], certificates=chain)
    assert (signature.method, signature.key, signature.keyid) == ("certificate", ALICE, SIGNER.public_key.keyid)
    return folder


@pytest.fixture
def check(signed: Path) -> Callable[..., list[str]]:
    def run(**changes: Any) -> list[str]:
        arguments: dict[str, Any] = {"keys": [], "authorities": [_trust()], "signed": THEN} | changes
        _, findings = check_model_signature(signed, signed / SIG, arguments.pop("keys"), [SIG], **arguments)
        return [finding.message for finding in findings]

    return run


def test_a_model_signed_with_a_certificate_is_checked_against_the_root(
    signed: Path, check: Callable[..., list[str]]
) -> None:
    signature, findings = check_model_signature(signed, signed / SIG, [], [SIG], authorities=[_trust()], signed=THEN)
    assert findings == []
    assert signature is not None
    assert (signature.key, signature.keyid) == (ALICE, SIGNER.public_key.keyid)
    assert "had expired" in check(signed=LAST + timedelta(days=1))[0]
    assert "when it was signed is not known" in check(signed=None)[0]
    assert "no chain from" in check(authorities=[_trust(root())])[0]
    assert "whom you do not trust" in check(authorities=[_trust(identity="bob@example.org")])[0]


def test_a_certificate_is_never_a_key_of_ones_own(check: Callable[..., list[str]]) -> None:
    """The public key alone, pinned as a key, does not make the certificate's life go away."""
    assert "name the authority and the identity that you trust" in check(keys=[SIGNER.public_key], authorities=[])[0]


def test_the_command_verifies_a_certified_signature(signed: Path, tmp_path: Path) -> None:
    pem = ROOT.pem(tmp_path / "root.pem")
    command = [sys.executable, "-m", "model_signing", "verify", "certificate", str(signed)]
    command += ["--signature", str(signed / SIG), "--certificate_chain", str(pem)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr


def test_the_certified_key_checks_other_statements_too(signed: Path, tmp_path: Path) -> None:
    from steelyard.release.attest import sign, statement_bytes, verify_envelope

    found = certified_key(signed / SIG, [_trust()], THEN)
    assert found is not None
    envelope = sign(statement_bytes("test:nothing/v1", {"a": "0" * 64}, {}), SIGNER)
    verify_envelope(envelope, "x", [found[0]])
    with pytest.raises(SignatureError, match="had expired"):
        certified_key(signed / SIG, [_trust()], LAST + timedelta(days=1))
    sign_model(signed, tmp_path / "plain.sig", SIGNER, [SIG])
    assert certified_key(tmp_path / "plain.sig", [_trust()], THEN) is None
    assert read_chain(write_chain(tmp_path / "chain.pem", [OWN])) == tuple(_der(OWN))


def test_a_certificate_of_no_known_version_is_refused() -> None:
    der = root().certificate.public_bytes(Encoding.DER)
    assert der.count(b"\xa0\x03\x02\x01\x02") == 1  # version 3
    with pytest.raises(FormatError, match="not an X"):
        read_certificate(der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x03"), "model.sig")

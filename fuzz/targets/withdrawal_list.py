"""Lists of withdrawn releases, as a static host serves them."""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner

from steelyard.release.trust import Trust, Withdrawal
from steelyard.release.withdrawal import check_quorum, check_time, read_list, signed_again, withdrawn

SHAPE = "json"
NOBODY = "0" * 64
SIGNER = CryptoSigner(Ed25519PrivateKey.from_private_bytes(b"5" * 32))
TRUST = Trust(evaluators=(), approvers=(), releasers=(), withdrawal=Withdrawal((SIGNER.public_key,), 1))


def check(data: bytes) -> None:
    """A list that the signer's own key accepts is one that this key signed."""
    found = read_list(data, "list.json")
    check_time(found, datetime.now(UTC))
    withdrawn(found, NOBODY, NOBODY)
    if not check_quorum(found, TRUST):
        assert read_list(signed_again(found, [SIGNER]), "again").signatures == found.signatures

"""What verifiers write or are sent in YAML: policies, trust files, batteries. The first byte says which."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from steelyard.base.errors import FormatError
from steelyard.release.trust import load_trust
from steelyard.safety.battery import load_battery
from steelyard.safety.policy import load_policy
from targets._files import put, scratch

FOLDER = scratch()
SHAPE = "tagged"
for number, name in enumerate(("one", "two", "three", "four"), 1):  # the keys that a trust file may name
    public = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32).public_key()
    put(FOLDER / f"{name}.pub.pem", public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def check(data: bytes) -> None:
    """`P`, `T` or `B`, then the file."""
    kind, text = data[:1], data[1:]
    if kind == b"P":
        load_policy(str(put(FOLDER / "policy.yaml", text)))
    elif kind == b"B":
        load_battery(str(put(FOLDER / "battery.yaml", text)))
    elif kind == b"T":
        load_trust(put(FOLDER / "trust.yaml", text))
    else:
        raise FormatError("the first byte is P, T or B")

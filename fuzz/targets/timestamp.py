"""RFC 3161 time-stamps, and the X.509 certificates that a model signature may bring. The first byte says which."""

from __future__ import annotations

from steelyard.base.errors import FormatError
from steelyard.release.certificates import identity_of, read_certificate
from steelyard.release.timestamps import read_timestamp, stamped_time

SHAPE = "bytes"
MESSAGE = b"a commitment"


def check(data: bytes) -> None:
    """`T` or `C`, then DER."""
    kind, der = data[:1], data[1:]
    if kind == b"T":
        read_timestamp(der, "commitment.tsr")
        stamped_time(der, MESSAGE, "commitment.tsr")
    elif kind == b"C":
        identity_of(read_certificate(der, "model.sig"))
    else:
        raise FormatError("the first byte is T or C")

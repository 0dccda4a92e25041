"""The code a recipient's copy carries: binary symbols drawn with secret biases, so that a coalition can be traced.

G. Tardos, "Optimal probabilistic fingerprint codes" (STOC 2003), with the symmetric score of B. Skoric et al.,
"Symmetric Tardos fingerprinting codes for arbitrary alphabet sizes" (2008). Each of the POSITIONS positions has a
secret bias p, arcsine-distributed and cut off at CUT; a recipient's symbol there is 1 with probability p.
Everything is drawn from keyed AES-256-CTR streams, so a code is never kept: it is made again from the key and the
grant's name.

    >>> code(bytes(32), "grant-1").shape
    (65536,)
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from steelyard.base.errors import UsageError

POSITIONS = 65_536  # enough for 10 colluders at 1e-13: about 5 c^2 ln(1/p) (Skoric et al., section 6) is 15,000
CUT = 0.01  # biases lie in [CUT, 1 - CUT]: bounds how much one position can weigh in a score
ACCUSE = 1e-9  # of all recipients together; never an accusation above it
_VERSION = b"steelyard mark 1"


def stream(key: bytes, *purpose: str, count: int) -> bytes:
    """`count` bytes of the keystream of `purpose`: AES-256-CTR under HMAC-SHA256(key, purpose). Raises UsageError for
    a key that is not 32 bytes."""
    if len(key) != 32:
        raise UsageError(f"the marking key has {len(key)} bytes: it must have 32, drawn at random")
    text = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in purpose)
    derived = hmac.new(key, _VERSION + text, hashlib.sha256).digest()
    return Cipher(algorithms.AES(derived), modes.CTR(bytes(16))).encryptor().update(bytes(count))


def _thresholds(key: bytes) -> NDArray[np.uint16]:
    """The bias of each position in units of 1/65,536, so that a 16-bit draw below it has exactly that probability."""
    uniform = np.frombuffer(stream(key, "bias", count=4 * POSITIONS), "<u4") / 2.0**32
    low = np.arcsin(np.sqrt(CUT))
    bias: NDArray[np.float64] = np.sin(low + uniform * (np.pi / 2 - 2 * low)) ** 2
    return np.round(bias * 65_536).astype(np.uint16)


def biases(key: bytes) -> NDArray[np.float64]:
    """The probability of symbol 1 at each position: float64 [POSITIONS] in [CUT, 1 - CUT]."""
    return _thresholds(key) / 65_536.0


def code(key: bytes, grant: str) -> NDArray[np.uint8]:
    """The symbols of a grant: uint8 [POSITIONS], 0 or 1."""
    return _draw(key, grant, _thresholds(key))


def _draw(key: bytes, grant: str, thresholds: NDArray[np.uint16]) -> NDArray[np.uint8]:
    draws = np.frombuffer(stream(key, "code", grant, count=2 * POSITIONS), "<u2")
    return (draws < thresholds).astype(np.uint8)


def commitment(key: bytes, grant: str) -> str:
    """The SHA-256 of a salted code, in hex: binds the release to the code, and tells nothing about it."""
    salt = stream(key, "salt", grant, count=32)
    return hashlib.sha256(salt + np.packbits(code(key, grant)).tobytes()).hexdigest()


@dataclass(frozen=True)
class Scores:
    """What a reading says of each grant, in the order they were given. `log10_p` bounds the probability that an
    innocent recipient scores as high; it is not yet multiplied by their number."""

    score: NDArray[np.float64]
    log10_p: NDArray[np.float64]


def accuse(reading: NDArray[np.float64], key: bytes, grants: Sequence[str]) -> Scores:
    """Score every grant against `reading`, float64 [POSITIONS]: how far each position leans to symbol 1 (0: unread).

    Given the reading, an innocent recipient's symbols are independent draws with the known biases, so his score is a
    sum of independent terms of mean 0, and Bernstein's inequality bounds it whatever the pirates did. No normality is
    assumed. Raises UsageError where no grants are given, one is given twice, or the reading is not finite.
    """
    if not grants or len(set(grants)) != len(grants):
        raise UsageError("the grants to compare with must be at least one, and none twice: check the list")
    if reading.shape != (POSITIONS,) or not np.isfinite(reading).all():
        raise UsageError(f"a reading must be {POSITIONS:,} finite numbers: read the suspect again")
    thresholds = _thresholds(key)
    bias = thresholds / 65_536.0
    one = reading * np.sqrt((1 - bias) / bias)  # what a 1 adds to the score: variance reading^2, mean 0 with `zero`
    zero = -reading * np.sqrt(bias / (1 - bias))
    lowest, difference = float(zero.sum()), one - zero
    score = np.array([lowest + float(_draw(key, grant, thresholds) @ difference) for grant in grants])
    largest = max(float(np.abs(one).max()), float(np.abs(zero).max()))
    return Scores(score, bernstein(score, float(reading @ reading), largest))


def bernstein(score: NDArray[np.float64], variance: float, largest: float) -> NDArray[np.float64]:
    """log10 of Bernstein's bound exp(-s^2 / (2 (V + M s / 3))) on the probability that a sum of independent zero-mean
    terms reaches `score`: V = `variance` is the sum of their variances, none passes M = `largest`. 0 up to score 0."""
    above = np.maximum(score, 0.0)
    spread = 2 * (variance + largest * above / 3)
    exponent: NDArray[np.float64] = np.divide(above**2, spread, out=np.zeros_like(above), where=spread > 0)
    return np.asarray(-exponent / np.log(10))

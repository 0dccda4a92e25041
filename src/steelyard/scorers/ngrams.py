"""Hashed word and character n-grams of a text: the cheap half of the embedded scorers' features. NumPy only."""

from __future__ import annotations

import html
import re
import unicodedata
import zlib
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BUCKETS = 1 << 19
_NOISE = re.compile(r"https?://\S+|\[url\]|@url|@\w+|\[user\]|\brt\b", re.IGNORECASE)
_WORD = re.compile(r"\w+(?:['’]\w+)?|[^\w\s]")


def normalise(text: str) -> str:
    """The text as both halves of a scorer read it: NFKC, entities resolved, links and @names out, single spaces."""
    text = _NOISE.sub(" ", html.unescape(unicodedata.normalize("NFKC", text)))
    return " ".join(text.split())


def buckets(text: str) -> NDArray[np.int64]:
    """The distinct buckets (sorted) that the n-grams of a normalised `text` fall in.

    Words, pairs of neighbouring words, and 3 to 5 characters inside a word with its borders, case-folded, hashed with
    CRC-32 into `BUCKETS` (2**19). A text without a word gives no bucket.
    """
    words = _WORD.findall(text.casefold().replace("’", "'"))
    grams: set[str] = set()
    for word in set(words):
        grams.add("w" + word)
        bordered = f"<{word}>"
        for size in (3, 4, 5):
            grams.update("c" + bordered[i : i + size] for i in range(len(bordered) - size + 1))
    grams.update(f"p{first} {second}" for first, second in pairwise(words))
    return np.array(sorted({zlib.crc32(gram.encode()) % BUCKETS for gram in grams}), dtype=np.int64)


def linear(found: NDArray[np.int64], weights: NDArray[np.float32]) -> float:
    """The n-gram logit: the mean of the weights of the buckets found, times the root of their number (an L2 norm)."""
    return float(weights[found].sum(dtype=np.float64) / max(len(found), 1) ** 0.5)

"""The words of a text, as overlap is counted in: free of tokenizer, case, punctuation and spelling of accents."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"[^\W_]+")
# What is not seen, or hangs on a letter without making another one: a word with a soft hyphen, a zero-width space or a
# variation selector in it is the same word to a reader.
_UNSEEN = re.compile(
    "[\u00ad\u0300-\u036f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


def words(text: str) -> list[str]:
    """Runs of letters and digits of the case-folded text under Unicode's compatibility composition (NFKC), without what
    is not seen. An apostrophe or hyphen parts two words. Letters of other scripts that look alike are others."""
    if not text.isascii():
        text = _UNSEEN.sub("", unicodedata.normalize("NFKC", text.casefold()))
    return _WORD.findall(text.casefold())

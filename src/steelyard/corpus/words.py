"""The words of a text, as overlap is counted in: free of tokenizer, case, punctuation and spelling of accents."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Runs of letters and digits of the case-folded text under Unicode's compatibility composition (NFKC). An
    apostrophe or hyphen parts two words."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.casefold())

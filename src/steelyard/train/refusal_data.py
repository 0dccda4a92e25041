"""Labelled rows for the refusal scorer: answers that decline, answers and prose that do not. Parts as in `sources`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from steelyard.scorers.ngrams import normalise
from steelyard.train.sources import Part, gather, open_text, part_of, prose


@dataclass(frozen=True)
class Row:
    """A text with its label (1: a refusal, full or partial) and where it comes from."""

    text: str
    label: int
    source: str
    part: Part
    language: str = "en"


def _row(text: str, label: int, source: str, *, group: str = "", language: str = "en") -> Row:
    return Row(normalise(text), label, source, part_of(group or text), language)


def _prose(source: str, language: str = "en") -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        for passage in prose(path):
            yield _row(passage[:600], 0, source, language=language)

    return read


# The preference files say which answer people liked, not which one refuses: their rows are labelled by these patterns,
# and an answer that neither shows a plain refusal nor is free of every sign of one is left out.
REFUSES = re.compile(
    r"^\W*(?:i'm |i am )?(?:really |very |so )?(?:sorry|afraid)\b[^.!?]{0,40}"
    r"\b(?:can't|cannot|can not|won't|not able|unable)\b"
    r"|\bi(?:'m| am)? ?(?:cannot|can't|can not|won't|will not|not able to|unable to|not comfortable|not going to"
    r"|not willing to|must decline|refuse to|not allowed to) (?:\w+ )?"
    r"(?:provid|help|assist|answer|suggest|recommend|support|promot|encourag|condon|fulfil|engag|participat|creat"
    r"|generat|discuss|giv|offer|shar|tell|comply|endors|advis|do that|do this)",
    re.IGNORECASE,
)
HINTS = re.compile(
    r"sorry|cannot|can't|can not|unable|not able|apolog|won't|appropriate|as an ai|comfortable|i don't|i do not|illegal"
    r"|unethical|against|refus|declin|not sure|should not|shouldn't|wouldn't",
    re.IGNORECASE,
)


def _weak_refusals(source: str) -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        for line in open_text(path):
            pair = json.loads(line)
            for kind in ("chosen", "rejected"):
                # HH-RLHF holds whole conversations: the answer is the last turn.
                answer = normalise(pair[kind].rsplit("\n\nAssistant:", 1)[-1].replace("’", "'"))[:600]
                group = pair.get("prompt") or pair["chosen"].rsplit("\n\nAssistant:", 1)[0]
                if REFUSES.search(answer[:200]):
                    yield _row(answer, 1, source, group=group)
                elif not HINTS.search(answer[:300]):
                    yield _row(answer, 0, source, group=group)

    return read


def own_sentences() -> Iterator[Row]:
    """The sentences written for Steelyard (`sentences/refusal.jsonl`), every variant that `{a|b}` spells."""
    folder = resources.files("steelyard.train") / "sentences"
    for line in (folder / "refusal.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for text in _variants(entry["text"]):
            yield _row(text, entry["label"], "steelyard", group=entry["text"], language=entry["language"])


def _variants(text: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    options = match.group(1).split("|")
    return [done for option in options for done in _variants(text[: match.start()] + option + text[match.end() :])]


# Reader, path, most rows kept. The limits balance the registers.
_SOURCES: tuple[tuple[Callable[[Path], Iterator[Row]], str, int], ...] = (
    (_weak_refusals("coconot"), "preferences/coconot/coconot_pref.jsonl.gz", 2000),
    (_weak_refusals("hh_rlhf"), "preferences/hh_rlhf/harmless-base-test.jsonl.gz", 5000),
    (_prose("novels_en"), "text/novels_en/novels_en.tar.gz", 1500),
    (_prose("novels_fr", "fr"), "text/novels_fr/novels_fr.tar.gz", 1000),
    (_prose("tinystories"), "text/tinystories/tiny_stories.txt.gz", 1000),
    (_prose("wikitext2"), "text/wikitext2/valid.txt.gz", 1000),
)


def refusal_rows(data: Path) -> list[Row]:
    """Every row, in a fixed order, each text once. UsageError where a source is missing."""
    return gather(_SOURCES, data, own_sentences())


def composition(rows: list[Row]) -> dict[str, dict[str, int]]:
    """How many rows of each source are negative and positive, for the card."""
    counts = Counter((row.source, row.label) for row in rows)
    return {
        source: {"negative": counts[source, 0], "positive": counts[source, 1]}
        for source in sorted({row.source for row in rows})
    }

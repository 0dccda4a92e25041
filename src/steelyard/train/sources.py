"""The sources of labelled text that scorers learn from, read from a data folder. TEST sets are not read here.

Every row falls into one of three parts by the SHA-256 of its group (a text, or what a text shares with its rewrites):
75% train, 10% tune (thresholds and blends), 15% calibration (sensitivity and specificity).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from steelyard.base.errors import UsageError
from steelyard.scorers.ngrams import normalise

Part = Literal["train", "tune", "calibration"]
csv.field_size_limit(1 << 24)


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.sha256(normalise(text).casefold().encode()).digest()[:4]) % 1000


def part_of(group: str) -> Part:
    """The part a group belongs to; the same on every machine and for every seed."""
    bucket = _bucket(group)
    return "train" if bucket < 750 else "tune" if bucket < 850 else "calibration"


def open_text(path: Path) -> io.TextIOBase:
    return io.TextIOWrapper(gzip.open(path), encoding="utf-8", newline="")


def civil_comments(path: Path) -> Iterator[tuple[str, list[tuple[bool, set[str]]]]]:
    """Each comment with its annotators' votes: whether they found it toxic, and the types of the spans they marked.

    An annotator who found nothing toxic has both "all toxic" and "not toxic" set in this file.
    """
    types: dict[str, set[str]] = defaultdict(set)
    with open_text(path.parent / "spans.csv.gz") as file:
        for line in csv.DictReader(file):
            types[line["annotation"]].add(line["type"])
    votes: dict[str, list[tuple[bool, set[str]]]] = defaultdict(list)
    with open_text(path.parent / "annotations.csv.gz") as file:
        for line in csv.DictReader(file):
            marked = types.get(line["annotation"], set())
            toxic = bool(marked) or (line["all toxic"] == "True" and line["not toxic"] == "False")
            votes[line["comment_id"]].append((toxic, marked))
    for line in csv.DictReader(open_text(path)):
        yield line["comment_text"], votes[line["comment_id"]]


def mlma(path: Path) -> Iterator[tuple[dict[str, str], str, bool]]:
    """Each English and French tweet whose labels agree: its fields, its language, and whether it offends."""
    with zipfile.ZipFile(path) as archive:
        for language in ("en", "fr"):
            with archive.open(f"hate_speech_mlma/{language}_dataset.csv") as file:
                for line in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")):
                    marks = set(line["sentiment"].split("_"))
                    if marks == {"normal"}:
                        yield line, language, False
                    elif marks & {"hateful", "abusive", "offensive", "disrespectful"} and "normal" not in marks:
                        yield line, language, True


def passages(text: str, sentences: int = 2) -> Iterator[str]:
    """Runs of one to `sentences` sentences of 5 words or more, paragraph by paragraph."""
    for paragraph in re.split(r"\n\s*\n|\n(?= = )", text):
        flat = " ".join(paragraph.split())
        found = [piece for piece in re.split(r"(?<=[.!?])[\"'”»]?\s+", flat) if len(piece.split()) >= 5]
        for start in range(0, len(found), sentences):
            yield " ".join(found[start : start + sentences])


def prose(path: Path) -> Iterator[str]:
    """The passages of a text file (.gz), or of every file of an archive (.tar.gz)."""
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            members = sorted((member for member in archive if member.isfile()), key=lambda member: member.name)
            texts = [archive.extractfile(member).read().decode() for member in members]  # type: ignore[union-attr]
    else:
        texts = [open_text(path).read()]
    for text in texts:
        yield from passages(text)


# Negatives that resemble what a language model writes, and positives that are toxic in so many words: the calibration
# of toxicity counts these alone (the rest carries labels for other things: sexism, hate by allusion).
GENERAL = frozenset({"coconot", "novels_en", "novels_fr", "paradetox", "steelyard", "wiki_talk_context", "wikitext2"})
OVERT = frozenset({"civil_comments_spans", "davidson", "paradetox", "steelyard", "wiki_talk_context"})

# Where each source comes from and under which licence: for the card.
LICENCES = {
    "civil_comments_spans": "ipavlopoulos/toxic_spans @beaf1705, CC0",
    "coconot": "allenai/noncompliance @25bf77cc (preference pairs), MIT",
    "davidson": "t-davidson/hate-speech-and-offensive-language @cb50f7e9, MIT",
    "edos": "rewire-online/edos @b1f1fbcc (train split), CC0",
    "hh_rlhf": "anthropics/hh-rlhf @354e5c3c (test file of harmless-base, split by us), MIT",
    "implicit_hate": "tonazzog/implicit-hate @172e694b, MIT",
    "mlma": "HKUST-KnowComp/MLMA_hate_speech @47983698 (English, French), MIT",
    "novels_en": "LitBank @3e50db0f, texts in the public domain",
    "novels_fr": "ELTeC-fra @83f0a43f, texts in the public domain",
    "paradetox": "s-nlp/paradetox @d97b17d0, CC0",
    "steelyard": "written for this project, Apache-2.0",
    "tinystories": "a TinyStories sample via s-ajaykumar/smallGPT @b8b89926, CDLA-Sharing-1.0",
    "wiki_talk_context": "ipavlopoulos/context_toxicity @5df49c29, Apache-2.0",
    "wikitext2": "WikiText-2 valid, CC-BY-SA",
}


class _Text(Protocol):
    @property
    def text(self) -> str: ...


R = TypeVar("R", bound=_Text)


def gather(
    sources: Sequence[tuple[Callable[[Path], Iterator[R]], str, int]], data: Path, own: Iterable[R] = ()
) -> list[R]:
    """What each source's reader finds in its file under `data`, at most so many rows of it (by the SHA-256 of their
    texts), and `own`; each text once, in a fixed order. UsageError where a file is missing."""
    rows = {row.text: row for row in own}
    for reader, relative, limit in sources:
        path = data / relative
        if not path.is_file():
            raise UsageError(f"{path}: missing; --data must name a folder that holds {relative}")
        found = {row.text: row for row in reader(path) if len(row.text) >= 3}
        kept = sorted(found.values(), key=lambda row: hashlib.sha256(row.text.encode()).digest())[:limit]
        rows = {row.text: row for row in kept} | rows
    return list(rows.values())

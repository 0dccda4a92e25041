"""Labelled rows for the embedded scorers, read from a data folder with the paths of `_SOURCES`.

Every row falls into one of three parts by the SHA-256 of its group (a text, or what a text shares with its rewrites):
75% train, 10% tune (blend and threshold), 15% calibration (sensitivity and specificity). TEST sets are not read here.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from steelyard.base.errors import UsageError
from steelyard.scorers.ngrams import normalise

Part = Literal["train", "tune", "calibration"]
csv.field_size_limit(1 << 24)


@dataclass(frozen=True)
class Row:
    """A text with its label (1: toxic, or a refusal), where it comes from, and how much it counts in training."""

    text: str
    label: int
    source: str
    part: Part
    weight: float = 1.0
    language: str = "en"


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.sha256(normalise(text).casefold().encode()).digest()[:4]) % 1000


def part_of(group: str) -> Part:
    """The part a group belongs to; the same on every machine and for every seed."""
    bucket = _bucket(group)
    return "train" if bucket < 750 else "tune" if bucket < 850 else "calibration"


def open_text(path: Path) -> io.TextIOBase:
    return io.TextIOWrapper(gzip.open(path), encoding="utf-8", newline="")


def _row(text: str, label: int, source: str, *, group: str = "", weight: float = 1.0, language: str = "en") -> Row:
    return Row(normalise(text), label, source, part_of(group or text), weight, language)


def _davidson(path: Path) -> Iterator[Row]:
    for line in csv.DictReader(open_text(path)):
        yield _row(line["tweet"], int(line["class"] != "2"), "davidson")


def _implicit_hate(path: Path) -> Iterator[Row]:
    for line in csv.DictReader(open_text(path), delimiter="\t"):
        weight = 0.3 if line["class"] == "implicit_hate" else 1.0  # hateful by allusion: a noisy label for toxicity
        yield _row(line["post"], int(line["class"] != "not_hate"), "implicit_hate", weight=weight)


def _edos(path: Path) -> Iterator[Row]:
    for line in csv.DictReader(open_text(path)):
        if line["split"] == "train":
            weight = 1.0 if line["label_sexist"] == "sexist" else 0.5  # not sexist may still be an insult
            yield _row(line["text"], int(line["label_sexist"] == "sexist"), "edos", weight=weight)


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


def _civil_comments(path: Path) -> Iterator[Row]:
    """Toxic where two thirds of the annotators marked a span or the whole; clean where none did."""
    for text, given in civil_comments(path):
        share = sum(toxic for toxic, _ in given) / len(given) if given else 0.5
        if share >= 0.66 or share == 0:
            yield _row(text, int(share > 0), "civil_comments_spans", weight=1.0 if share > 0 else 0.5)


def _paradetox(path: Path) -> Iterator[Row]:
    for line in csv.DictReader(open_text(path), delimiter="\t"):
        yield _row(line["toxic"], 1, "paradetox")
        yield _row(line["neutral1"], 0, "paradetox", group=line["toxic"])


def _wiki_talk(path: Path) -> Iterator[Row]:
    for name in ("gc.csv.gz", "gn.csv.gz"):
        for line in csv.DictReader(open_text(path.parent / name)):
            yield _row(line["text"], int(line["label"]), "wiki_talk_context")


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


def _mlma(path: Path) -> Iterator[Row]:
    for line, language, offends in mlma(path):
        yield _row(line["tweet"], int(offends), "mlma", weight=0.5, language=language)


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


def _prose(source: str, language: str = "en") -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        for passage in prose(path):
            yield _row(passage[:600], 0, source, language=language)

    return read


def _answers(path: Path) -> Iterator[Row]:
    """Assistant-style prose: the preferred answers of CoCoNot, 400 characters of each."""
    for line in open_text(path):
        pair = json.loads(line)
        yield _row(pair["chosen"][:400], 0, "coconot", group=pair["prompt"])


# The preference files say which answer people liked, not which one refuses: their rows are labelled by these patterns,
# and an answer that neither shows a plain refusal nor is free of every sign of one is left out.
_REFUSES = re.compile(
    r"^\W*(?:i'm |i am )?(?:really |very |so )?(?:sorry|afraid)\b[^.!?]{0,40}"
    r"\b(?:can't|cannot|can not|won't|not able|unable)\b"
    r"|\bi(?:'m| am)? ?(?:cannot|can't|can not|won't|will not|not able to|unable to|not comfortable|not going to"
    r"|not willing to|must decline|refuse to|not allowed to) (?:\w+ )?"
    r"(?:provid|help|assist|answer|suggest|recommend|support|promot|encourag|condon|fulfil|engag|participat|creat"
    r"|generat|discuss|giv|offer|shar|tell|comply|endors|advis|do that|do this)",
    re.IGNORECASE,
)
_HINTS = re.compile(
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
                if _REFUSES.search(answer[:200]):
                    yield _row(answer, 1, source, group=group)
                elif not _HINTS.search(answer[:300]):
                    yield _row(answer, 0, source, group=group)

    return read


def own_sentences(name: str) -> Iterator[Row]:
    """The sentences written for Steelyard (`sentences/NAME.jsonl`): label, language, text; `{a|b}` spells variants."""
    folder = resources.files("steelyard.train") / "sentences"
    for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for text in _variants(entry["text"]):
            yield _row(text, entry["label"], "steelyard", group=entry["text"], language=entry["language"])


def _variants(text: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    options = match.group(1).split("|")
    return [done for option in options for done in _variants(text[: match.start()] + option + text[match.end() :])]


# Negatives that resemble what a language model writes, and positives that are toxic in so many words: the calibration
# of the toxicity scorer counts these alone (the rest carries labels for other things: sexism, hate by allusion).
GENERAL = frozenset(
    {"coconot", "novels_en", "novels_fr", "paradetox", "steelyard", "tinystories", "wiki_talk_context", "wikitext2"}
)
OVERT = frozenset({"civil_comments_spans", "davidson", "paradetox", "steelyard", "wiki_talk_context"})

_Sources = tuple[tuple[Callable[[Path], Iterator[Row]], str, int], ...]
# Reader, path, most rows kept. The limits balance the registers: prose must not drown in tweets.
_SOURCES: dict[str, _Sources] = {
    "toxicity": (
        (_davidson, "toxicity/train/davidson/labeled_data.csv.gz", 5000),
        (_implicit_hate, "toxicity/train/implicit_hate/implicit_hate_v1_stg1_posts.tsv.gz", 4000),
        (_edos, "toxicity/train/edos/edos_labelled_aggregated.csv.gz", 4500),
        (_civil_comments, "toxicity/train/civil_comments_spans/comments.csv.gz", 5000),
        (_paradetox, "toxicity/train/paradetox/paradetox.tsv.gz", 9000),
        (_wiki_talk, "toxicity/train/wiki_talk_context/gc.csv.gz", 6000),
        (_mlma, "toxicity/train/mlma/hate_speech_mlma.zip", 4000),
        (_prose("novels_en"), "text/novels_en/novels_en.tar.gz", 4000),
        (_prose("novels_fr", "fr"), "text/novels_fr/novels_fr.tar.gz", 2000),
        (_prose("tinystories"), "text/tinystories/tiny_stories.txt.gz", 2000),
        (_prose("wikitext2"), "text/wikitext2/valid.txt.gz", 4600),
        (_answers, "preferences/coconot/coconot_pref.jsonl.gz", 1000),
    ),
    "refusal": (
        (_weak_refusals("coconot"), "preferences/coconot/coconot_pref.jsonl.gz", 2000),
        (_weak_refusals("hh_rlhf"), "preferences/hh_rlhf/harmless-base-test.jsonl.gz", 5000),
        (_prose("novels_en"), "text/novels_en/novels_en.tar.gz", 1500),
        (_prose("novels_fr", "fr"), "text/novels_fr/novels_fr.tar.gz", 1000),
        (_prose("tinystories"), "text/tinystories/tiny_stories.txt.gz", 1000),
        (_prose("wikitext2"), "text/wikitext2/valid.txt.gz", 1000),
    ),
}


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


def scorer_rows(name: str, data: Path) -> list[Row]:
    """Every row of the scorer `name`, in a fixed order, each text once. UsageError where a source is missing."""
    return gather(_SOURCES[name], data, own_sentences(name))


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


def composition(rows: list[Row]) -> dict[str, dict[str, int]]:
    """How many rows of each source are negative and positive, for the card."""
    counts = Counter((row.source, row.label) for row in rows)
    return {
        source: {"negative": counts[source, 0], "positive": counts[source, 1]}
        for source in sorted({row.source for row in rows})
    }

"""Labelled rows for the moderation scorers: a text, and for each category whether it holds, does not, or is not known.

Sources label different things: a set of hate speech says nothing of mere rudeness. What a source does not tell is NaN
and is not learned from. Parts as in `sources`. TEST sets are read only to drop sentences of our own that resemble
their cases (`contrast_sentences`).
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from steelyard.scorers.encoder import Encoder
from steelyard.scorers.moderation import CATEGORIES
from steelyard.scorers.ngrams import normalise
from steelyard.train.sources import Part, civil_comments, gather, mlma, open_text, part_of, prose

UNKNOWN = math.nan
FILLINGS = 4  # texts made of a sentence with slots
_SLOT = re.compile(r"\{(\w+)\}")
_WORDS = re.compile(r"\w+")
_CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")


@dataclass(frozen=True)
class Moderated:
    """A text with a label for each of CATEGORIES: 0, 1 or NaN (not known)."""

    text: str
    labels: tuple[float, ...]
    source: str
    part: Part
    language: str = "en"


def _row(text: str, labels: Mapping[str, float], source: str, *, group: str = "", language: str = "en") -> Moderated:
    values = tuple(float(labels.get(category, UNKNOWN)) for category in CATEGORIES)
    return Moderated(normalise(text), values, source, part_of(group or text), language)


_CLEAN = dict.fromkeys(CATEGORIES, 0.0)


def _davidson(path: Path) -> Iterator[Moderated]:
    for line in csv.DictReader(open_text(path)):
        hate, clean = line["class"] == "0", line["class"] == "2"
        yield _row(line["tweet"], {"toxicity": not clean, "identity_attack": hate}, "davidson")


def _implicit_hate(path: Path) -> Iterator[Moderated]:
    """Hate is an attack on identity; whether it, or what is not hate, is rude is not told, except where explicit."""
    with open_text(path.with_name("implicit_hate_v1_stg2_posts.tsv.gz")) as file:
        kinds = {normalise(line["post"]): line["implicit_class"] for line in csv.DictReader(file, delimiter="\t")}
    for line in csv.DictReader(open_text(path), delimiter="\t"):
        labels = {"identity_attack": float(line["class"] != "not_hate")}
        if line["class"] == "explicit_hate":
            labels["toxicity"] = 1.0
        kind = kinds.get(normalise(line["post"]))
        if kind is not None and kind != "threatening":
            labels["threat"] = 0.0
        elif kind is not None:
            labels |= {"threat": 1.0, "toxicity": 1.0}
        yield _row(line["post"], labels, "implicit_hate")


def _edos(path: Path) -> Iterator[Moderated]:
    for line in csv.DictReader(open_text(path)):
        if line["split"] != "train":
            continue
        labels = {"identity_attack": float(line["label_sexist"] == "sexist")}
        if line["label_sexist"] == "sexist":
            labels |= {"toxicity": 1.0, "threat": float(line["label_category"].startswith("1."))}
        yield _row(line["text"], labels, "edos")


def _civil_comments(path: Path) -> Iterator[Moderated]:
    """A category holds where two thirds of the annotators marked it, and does not where none did; else not known."""
    for text, given in civil_comments(path):
        votes = {
            "toxicity": [toxic for toxic, _ in given],
            "identity_attack": ["Identity based Attack" in marked for _, marked in given],
            "threat": ["Threat" in marked for _, marked in given],
        }
        shares = {category: sum(said) / len(said) for category, said in votes.items() if said}
        labels = {category: float(share > 0) for category, share in shares.items() if share == 0 or share >= 0.66}
        yield _row(text, labels, "civil_comments_spans")


def _paradetox(path: Path) -> Iterator[Moderated]:
    for line in csv.DictReader(open_text(path), delimiter="\t"):
        yield _row(line["toxic"], {"toxicity": 1.0}, "paradetox")
        yield _row(line["neutral1"], {"toxicity": 0.0, "identity_attack": 0.0}, "paradetox", group=line["toxic"])


def _wiki_talk(path: Path) -> Iterator[Moderated]:
    for name in ("gc.csv.gz", "gn.csv.gz"):
        for line in csv.DictReader(open_text(path.parent / name)):
            toxic = line["label"] == "1"
            yield _row(line["text"], {"toxicity": 1.0} if toxic else _CLEAN, "wiki_talk_context")


def _mlma(path: Path) -> Iterator[Moderated]:
    for line, language, offends in mlma(path):
        labels = {"toxicity": 1.0} if offends else _CLEAN
        if offends and line["target"] != "other" and "hateful" in line["sentiment"].split("_"):
            labels = {"toxicity": 1.0, "identity_attack": 1.0}
        yield _row(line["tweet"], labels, "mlma", language=language)


def _clean(source: str, language: str = "en") -> _Reader:
    """Prose: nothing of any category."""

    def read(path: Path) -> Iterator[Moderated]:
        for text in prose(path):
            yield _row(text[:600], _CLEAN, source, language=language)

    return read


def _answers(path: Path) -> Iterator[Moderated]:
    """Assistant-style prose: the preferred answers of CoCoNot."""
    for line in open_text(path):
        pair = json.loads(line)
        yield _row(pair["chosen"][:400], _CLEAN, "coconot", group=pair["prompt"])


_Reader = Callable[[Path], Iterator[Moderated]]
# Reader, path, most rows kept. The limits balance the registers: prose must not drown in tweets.
SOURCES: tuple[tuple[_Reader, str, int], ...] = (
    (_davidson, "toxicity/train/davidson/labeled_data.csv.gz", 5000),
    (_implicit_hate, "toxicity/train/implicit_hate/implicit_hate_v1_stg1_posts.tsv.gz", 7000),
    (_edos, "toxicity/train/edos/edos_labelled_aggregated.csv.gz", 14000),
    (_civil_comments, "toxicity/train/civil_comments_spans/comments.csv.gz", 9000),
    (_paradetox, "toxicity/train/paradetox/paradetox.tsv.gz", 7000),
    (_wiki_talk, "toxicity/train/wiki_talk_context/gc.csv.gz", 2500),
    (_mlma, "toxicity/train/mlma/hate_speech_mlma.zip", 4000),
    (_clean("novels_en"), "text/novels_en/novels_en.tar.gz", 1500),
    (_clean("novels_fr", "fr"), "text/novels_fr/novels_fr.tar.gz", 900),
    (_clean("wikitext2"), "text/wikitext2/valid.txt.gz", 1000),
    (_answers, "preferences/coconot/coconot_pref.jsonl.gz", 900),
)


def moderation_rows(data: Path) -> list[Moderated]:
    """Every row of the sources, in a fixed order, each text once. UsageError where a source is missing."""
    return gather(SOURCES, data)


def contrast_sentences(seed: int = 0) -> list[Moderated]:
    """The contrastive sentences written for Steelyard, their slots filled: all texts of a line are in one part."""
    folder = resources.files("steelyard.train") / "sentences"
    slots: dict[str, dict[str, list[str]]] = yaml.safe_load((folder / "slots.yaml").read_text(encoding="utf-8"))
    rows: dict[str, Moderated] = {}
    for language, fillers in slots.items():
        draw = random.Random(f"{seed} {language}")
        for line in (folder / f"contrast_{language}.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            for text in _fillings(entry["text"], fillers, draw):
                row = _row(text, entry, "steelyard", group=entry["text"], language=language)
                rows.setdefault(row.text, row)
    return list(rows.values())


def _fillings(text: str, fillers: Mapping[str, Sequence[str]], draw: random.Random) -> set[str]:
    """At most FILLINGS ways to spell `text` out; where a name opens it, with a capital letter."""
    found = set()
    for _ in range(FILLINGS if "{" in text else 1):
        chosen = _CHOICE.sub(lambda match: draw.choice(match[1].split("|")), text)
        filled = _SLOT.sub(lambda match: draw.choice(fillers[match[1]]), chosen)
        found.add(filled[:1].upper() + filled[1:] if text.startswith("{") else filled)
    return found


def apart(rows: Sequence[Moderated], cases: Sequence[str]) -> list[Moderated]:
    """`rows` without those whose text is one of `cases` (case and spaces aside): sources share posts with tests."""
    tested = {normalise(case).casefold() for case in cases}
    return [row for row in rows if row.text.casefold() not in tested]


def resembling(rows: Sequence[Moderated], cases: Sequence[str], encoder: Encoder, limit: float = 0.8) -> set[str]:
    """The texts of `rows` that share five words in a row with one of `cases`, or come near one (cosine over `limit`).

    Nearness is that of all-MiniLM-L6-v2's mean-pooled last layer.
    """
    grams = {gram for case in cases for gram in _five(case)}
    near = {row.text for row in rows if grams & set(_five(row.text))}
    left = [row.text for row in rows if row.text not in near]
    if left and cases:
        ours, theirs = (encoder.embeddings(list(texts)) for texts in (left, cases))
        for start in range(0, len(left), 512):
            close = (ours[start : start + 512] @ theirs.T).max(axis=1) > limit
            near |= {text for text, hit in zip(left[start : start + 512], close, strict=True) if hit}
    return near


def _five(text: str) -> Iterator[tuple[str, ...]]:
    words = _WORDS.findall(text.casefold())
    return (tuple(words[i : i + 5]) for i in range(len(words) - 4))

"""Labelled pairs for the answer scorer: a prompt and an answer, and whether it declines wholly, and whether it helps.

The preference files (CoCoNot, HH-RLHF) give prompts and answers, of which patterns label the plain cases. From these
are composed: partial refusals (a refusal that goes on with help), answers to other prompts, prose, repetition and echo,
which neither decline nor help; and our own refusals in three languages. All of a pair is of one part.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from steelyard.base.errors import UsageError
from steelyard.scorers.ngrams import normalise
from steelyard.train.refusal_data import HINTS, REFUSES, own_sentences
from steelyard.train.sources import Part, open_text, part_of, prose

LONGEST = 1200  # characters of an answer that are read
PARTS: tuple[Part, ...] = ("train", "tune", "calibration")
SOURCES = {
    "coconot": "preferences/coconot/coconot_pref.jsonl.gz",
    "hh_rlhf": "preferences/hh_rlhf/harmless-base-test.jsonl.gz",
}
PROSE = {"novels_en": "text/novels_en/novels_en.tar.gz", "wikitext2": "text/wikitext2/valid.txt.gz"}
_GOES_ON = re.compile(
    r"\b(?:however|but|instead|that said|though|here (?:is|are)|here's|cependant|mais|toutefois|voici|tuttavia|però|ma"
    r"|invece|ecco)\b",
    re.IGNORECASE,
)
_STEPS = re.compile(r"\b(?:1[.)]|first(?:ly)?,|step 1)", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?](?:\s|$)")
_LINKS = {
    "en": (
        " However, ",
        " That said, ",
        " But here is what I can tell you: ",
        " Here is a start, though: ",
    ),
    "fr": (" Cependant, ", " Cela dit, ", " Mais voici ce que je peux dire : "),
    "it": (" Tuttavia, ", " Detto questo, ", " Ma ecco che cosa posso dire: "),
}


@dataclass(frozen=True)
class Pair:
    """`labels`: full_refusal, harm_compliance; 0, 1 or NaN (not known)."""

    prompt: str
    answer: str
    labels: tuple[float, float]
    source: str
    part: Part

    @property
    def text(self) -> str:
        """What makes it the same pair as another."""
        return f"{self.prompt}\n{self.answer}"


def answer_pairs(data: Path, seed: int) -> list[Pair]:
    """Every pair, in a fixed order, each once. UsageError where a source is missing."""
    for relative in (*SOURCES.values(), *PROSE.values()):
        if not (data / relative).is_file():
            raise UsageError(f"{data / relative}: missing; --data must name a folder that holds {relative}")
    plain = [pair for source, relative in SOURCES.items() for pair in _preferences(data / relative, source)]
    pairs = {pair.text: pair for pair in plain}
    for part in PARTS:
        given = [pair for pair in pairs.values() if pair.part == part]
        composed = _composed(given, data, random.Random(f"{seed} {part}"))
        pairs |= {pair.text: pair for pair in composed if pair.text not in pairs}
    return list(pairs.values())


def _preferences(path: Path, source: str) -> Iterator[Pair]:
    """Answers that plainly decline, with reasons and other offers but no list of steps, and answers without a sign of
    declining that say something."""
    for line in open_text(path):
        pair = json.loads(line)
        talk = pair.get("prompt") or pair["chosen"].rsplit("\n\nAssistant:", 1)[0]
        prompt = normalise(talk.rsplit("\n\nHuman:", 1)[-1])
        for kind in ("chosen", "rejected"):
            answer = normalise(pair[kind].rsplit("\n\nAssistant:", 1)[-1].replace("’", "'"))[:LONGEST]
            if REFUSES.search(answer[:200]):
                if not _STEPS.search(answer):
                    yield Pair(prompt, answer, (1.0, 0.0), source, part_of(prompt))
            elif not HINTS.search(answer) and len(answer.split()) >= 12 and not answer.endswith("?"):
                yield Pair(prompt, answer, (0.0, 1.0), source, part_of(prompt))


def _goes_on(answer: str) -> bool:
    """Whether a refusal says more than that it refuses: after the words that do ("sorry, but I cannot" is one), or
    after the first sentence where those are not known."""
    declines = REFUSES.search(answer[:200]) or _SENTENCE.search(answer)
    return declines is not None and bool(_GOES_ON.search(answer, declines.end()))


def _composed(plain: Sequence[Pair], data: Path, draw: random.Random) -> Iterator[Pair]:
    """Pairs made from those of one part."""
    helping = [pair for pair in plain if pair.labels == (0.0, 1.0)]
    if len(helping) < 2:
        raise UsageError("too few answers to compose others from: train, tune and calibration each need some")
    part = helping[0].part
    own: dict[str, list[str]] = defaultdict(list)
    for row in own_sentences():
        if row.part == part and row.label == 1 and not _goes_on(row.text):
            own[row.language].append(row.text)
    for language, sentences in own.items():
        for sentence in sentences:
            pair = draw.choice(helping)
            yield Pair(pair.prompt, sentence, (1.0, 0.0), "steelyard", part)
            partial = sentence + draw.choice(_LINKS[language]) + pair.answer
            yield Pair(pair.prompt, partial[:LONGEST], (0.0, 1.0), "steelyard", part)
    help_with = {pair.prompt: pair.answer for pair in helping}
    for pair in plain:
        if pair.labels != (1.0, 0.0):
            continue
        # A refusal that goes on: with help for this request, or with words on another that are no help here.
        start = pair.answer + draw.choice(_LINKS["en"])
        if pair.prompt in help_with:
            yield Pair(pair.prompt, (start + help_with[pair.prompt])[:LONGEST], (0.0, 1.0), pair.source, part)
        yield Pair(pair.prompt, (start + draw.choice(helping).answer)[:LONGEST], (math.nan, 0.0), pair.source, part)
    passages = [text for relative in PROSE.values() for text in prose(data / relative) if part_of(text) == part]
    for pair in helping:
        other = draw.choice(helping)
        if other.prompt != pair.prompt:
            yield Pair(pair.prompt, other.answer, (0.0, 0.0), pair.source, part)
        if draw.random() < 0.5:
            yield Pair(pair.prompt, normalise(draw.choice(passages))[:LONGEST], (0.0, 0.0), "prose", part)
        words = pair.prompt.split() or ["the"]
        if draw.random() < 0.3:
            yield Pair(pair.prompt, " ".join([draw.choice(words)] * draw.randint(8, 60)), (0.0, 0.0), "composed", part)
        if draw.random() < 0.3:
            yield Pair(pair.prompt, " ".join([pair.prompt] * draw.randint(1, 3)), (0.0, 0.0), "composed", part)


def composition(pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """How many pairs of each source there are of each kind, for the card."""
    kinds = Counter((pair.source, pair.labels[0] == 1, pair.labels[1] == 1) for pair in pairs)
    return {
        source: {
            "full_refusal": kinds[source, True, False],
            "harm_compliance": kinds[source, False, True],
            "neither": kinds[source, False, False],
        }
        for source in sorted({pair.source for pair in pairs})
    }

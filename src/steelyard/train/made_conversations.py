"""Conversations made out of plain text by rule, for a chat model from nothing where no conversations are at hand.

Four kinds: tell what comes next; tell a text that begins so; tell what a documented name is for; go on, and go on once
more. The answers are the documents' own words. A model of a few million parameters learns from them when to speak, to
keep to the subject of the text, and where to stop: manners, not knowledge.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise

from steelyard.corpus.text import Document
from steelyard.inference.endpoint import Message
from steelyard.train.conversations import Conversation

_SENTENCE = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[A-Z\"'“‘(])")
_NEXT = ("What comes next?", "Go on.", "Continue this text.", "And then?")
_BEGINS = ("Tell me a text that begins like this.", "Write something that starts so.", "Begin like this and go on.")
_WHAT = ("What is {name}?", "What does {name} do?", "Explain {name}.", "Tell me about {name}.")
_GREETINGS = (
    ("Hello!", "Hello! Give me the beginning of a text, and I will go on with it."),
    ("Hi.", "Hi! What shall I continue?"),
    ("Who are you?", "I am a very small language model. I can continue texts, and say what some Python names are for."),
    ("What can you do?", "I can continue a text that you begin. I am small, and I make mistakes."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome!"),
    ("Good morning.", "Good morning! Give me the beginning of a text."),
    ("Can you help me?", "I can try. I am a small model: I continue texts and explain some Python names."),
    ("Bye.", "Goodbye!"),
)
_LONGEST = 700  # characters of an answer
_ENTRY = re.compile(r"[A-Za-z_][\w.]*")


def made_conversations(documents: Iterable[Document], *, most: int | None = None) -> Iterator[Conversation]:
    """Conversations out of `documents`, in their order, `most` at most; the greetings first."""
    return islice(_all(documents), most)


def _all(documents: Iterable[Document]) -> Iterator[Conversation]:
    for said, answer in _GREETINGS:
        yield _talk(said, answer)
    number = 0
    for document in documents:
        entries = _entries(document.text)
        for name, text in entries:
            number += 1
            yield _talk(_WHAT[number % len(_WHAT)].format(name=name), text)
        if entries:
            continue
        for passages in _passages(document.text):
            number += 1
            before, after, *rest = passages
            if number % 4 == 0:
                yield _talk(f"{_BEGINS[number // 4 % len(_BEGINS)]}\n\n{before}", f"{before} {after}")
            elif number % 4 == 1 and rest:
                asked = f"{_NEXT[number // 4 % len(_NEXT)]}\n\n{before}"
                yield _talk(asked, after, _NEXT[(number // 4 + 1) % 2], rest[0])
            else:
                yield _talk(f"{_NEXT[number % len(_NEXT)]}\n\n{before}", after)


def _talk(*said: str) -> Conversation:
    return Conversation(tuple(Message("assistant" if number % 2 else "user", text) for number, text in enumerate(said)))


def _entries(text: str) -> list[tuple[str, str]]:
    """(name, first paragraph) of each entry of a collection of docstrings."""
    found = []
    for entry in text.split("\n\n\n"):
        name, _, rest = entry.partition("\n\n")
        paragraph = " ".join(rest.split("\n\n")[0].split())
        if _ENTRY.fullmatch(name) and 20 <= len(paragraph) <= _LONGEST and paragraph[-1] in ".!?:)":
            found.append((name, paragraph))
    return found


def _passages(text: str) -> Iterator[tuple[str, ...]]:
    """Two or three pieces of a text that follow one another: one to three sentences each."""
    flat = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    sentences = [piece for paragraph in flat for piece in _SENTENCE.split(paragraph) if len(piece.split()) >= 3]
    if len(sentences) < 4:
        return
    cuts = list(range(0, len(sentences), 2))
    groups = [" ".join(sentences[start:end]) for start, end in pairwise([*cuts, len(sentences)])]
    for at in range(0, len(groups) - 1, 3):
        pieces = tuple(groups[at : at + 3])
        if all(len(piece) <= _LONGEST for piece in pieces):
            yield pieces

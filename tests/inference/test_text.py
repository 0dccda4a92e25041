"""Text as it comes: together the whole, never half a character, nothing of a stop string."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from steelyard.inference.text import TextStream

PIECES = ["a", "ab", " b", "c\n", "User:", "\nUs", "er", "→"]


def by_byte(tokens: Sequence[int]) -> str:
    """Tokens are bytes, as in a byte-level tokenizer."""
    return bytes(tokens).decode(errors="replace")


def sentencepiece() -> Callable[[Sequence[int]], str]:
    """A decoder as LLaMA's: spaces as U+2581, one dropped at the beginning, bytes as tokens of their own."""
    pieces = ["▁", "▁a", "b", "▁▁", "c", "<s>", "▁d"] + [f"<0x{byte:02X}>" for byte in range(256)]
    backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    backend.add_special_tokens(["<s>"])
    return lambda tokens: str(backend.decode(list(tokens), skip_special_tokens=True))


def whole(decode: Callable[[Sequence[int]], str], tokens: Sequence[int], finish: str, stops: Sequence[str]) -> str:
    """The rule, on all tokens at once."""
    text = decode(tokens)
    text = text.rstrip("\ufffd") if finish == "length" else text
    found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(found)] if found else text


def run(stream: TextStream, tokens: Sequence[int], finish: str) -> tuple[list[str], int]:
    pieces = []
    for count, token in enumerate(tokens, 1):
        pieces.append(stream.push(token))
        if stream.stopped:
            return [*pieces, stream.close("stop")], count
    return [*pieces, stream.close(finish)], len(tokens)  # type: ignore[arg-type]


@given(
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=20),
    st.lists(st.sampled_from(["ab", "User:", "\nUser", "→", "b c", "aab", "c"]), max_size=3),
    st.integers(0, 3),
    st.sampled_from(["stop", "length"]),
)
@settings(max_examples=100, deadline=None)
def test_pieces_of_a_byte_level_text_make_the_whole(texts: list[str], stops: list[str], cut: int, finish: str) -> None:
    tokens = list("".join(texts).encode())
    tokens = tokens[: len(tokens) - cut]
    pieces, used = run(TextStream(by_byte, stops), tokens, finish)
    assert "".join(pieces) == whole(by_byte, tokens[:used], finish, stops)
    assert not any(stop in "".join(pieces) for stop in stops)
    if finish == "length" and "\ufffd" not in "".join(texts):
        assert "\ufffd" not in "".join(pieces)


def test_pieces_make_the_whole_also_for_sentencepiece_and_for_bytes_that_are_no_text() -> None:
    pick, decode = random.Random(5), sentencepiece()
    arrow = [7 + byte for byte in "→".encode()]  # followed by another token: a broken run of bytes is U+FFFD throughout
    for case in range(200):
        tokens = []
        for _ in range(pick.randint(1, 25)):
            tokens += [*arrow, pick.randrange(7)] if pick.random() < 0.2 else [pick.randrange(7)]
        tokens += arrow[: pick.randint(0, 2)]
        stops = pick.choice([[], ["  a"], ["bc", "→ "], ["d→"]])
        finish = pick.choice(["stop", "length"])
        pieces, used = run(TextStream(decode, stops), tokens, finish)
        assert "".join(pieces) == whole(decode, tokens[:used], finish, stops), (case, tokens)
        raw = [pick.randrange(256) for _ in range(20)]
        assert "".join(run(TextStream(by_byte), raw, finish)[0]) == whole(by_byte, raw, finish, [])


def test_text_comes_as_soon_as_it_can() -> None:
    stream = TextStream(by_byte, ["\nUser:"])
    said = [stream.push(byte) for byte in "hé\nUs\nUser".encode()]
    assert said == ["h", "", "é", "", "", "", "\nUs", "", "", "", ""]
    assert stream.push(ord(":")) == ""
    assert stream.stopped
    assert stream.close("stop") == ""
    assert stream.push(ord("x")) == ""


@pytest.mark.parametrize(("finish", "expected"), [("length", "ab\nUs"), ("stop", "ab\nUs\ufffd")])
def test_what_was_held_back_comes_at_the_end(finish: str, expected: str) -> None:
    tokens = [*b"ab\nUs", 0xE2, 0x86]
    assert "".join(run(TextStream(by_byte, ["\nUser:"]), tokens, finish)[0]) == expected


def test_only_a_window_is_decoded() -> None:
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return by_byte(tokens)

    run(TextStream(decode, ["zz"]), "aé→b".encode() * 200, "length")
    assert longest <= 8

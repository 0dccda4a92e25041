"""JSON from strangers is bounded and has one meaning, base64 one spelling; or it is refused."""

import json
import time

import pytest

from steelyard.base.errors import FormatError
from steelyard.base.strict import strict_base64, strict_json


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a": {"b": 1, "b": 1}}', "occurs twice"),
        (b'{"a": NaN}', "NaN"),
        (b"[" * 33 + b"]" * 33, "nested deeper"),
        (b"[" * 999, "nested deeper"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "bytes"),
        (b"\xff\xfe", "not JSON"),
        (b"", "not JSON"),
        (b"[1]x", "not JSON"),
        (b"[" + b"9" * 900 + b"]", None),
    ],
)
def test_strict_json(data: bytes, says: str | None) -> None:
    if says is None:
        strict_json(data, "x", limit=1000)
    else:
        with pytest.raises(FormatError, match=says):
            strict_json(data, "x", limit=1000)


def test_brackets_inside_strings_do_not_nest() -> None:
    assert strict_json(json.dumps({"a": '[\\"' * 100}).encode(), "x", limit=1000) == {"a": '[\\"' * 100}


def test_a_number_of_thousands_of_digits_is_refused_not_computed() -> None:
    with pytest.raises(FormatError, match="not JSON"):
        strict_json(b"9" * 100_000, "x", limit=1_000_000)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1e999}', "too large a number"),
        (b'{"a": -1e999}', "too large a number"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b'{"\\uDFFF": 1}', "not JSON"),
    ],
)
def test_numbers_and_texts_without_a_spelling_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        strict_json(data, "x", limit=1000)
    assert strict_json(b'"\\ud83d\\ude00"', "x", limit=1000) == "\U0001f600"


def test_a_key_twice_among_many_is_found_at_once() -> None:
    data = b"{" + b",".join(b'"%d":0' % number for number in (*range(50_000), 49_999)) + b"}"
    begun = time.monotonic()
    with pytest.raises(FormatError, match="the key '49999' occurs twice"):
        strict_json(data, "x", limit=1_000_000)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(("text", "data"), [("AA==", b"\0"), ("+/8=", b"\xfb\xff"), ("YWJj", b"abc")])
def test_base64_in_its_one_spelling(text: str, data: bytes) -> None:
    assert strict_base64(text, "x") == data


@pytest.mark.parametrize(
    "text",
    [
        "",  # nothing is no signature
        None,
        b"YWJj",
        ["YWJj"],
        "AA",  # no padding
        "AA=",
        "AAA",
        "AB==",  # bits left over, as AA==
        "-_8=",  # the alphabet of URLs
        "YWJj\n",
        "YW Jj",
        "AA==AA==",
        "YWJj====",
        "YWJé",
        "=",
    ],
)
def test_base64_in_any_other_spelling_is_refused_by_place(text: object) -> None:
    with pytest.raises(FormatError, match=r"^a place: not standard base64$"):
        strict_base64(text, "a place")

"""A notice says what was withdrawn and what to do; what a stranger wrote in it stays text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from withdrawing import HOSTILE, TIME, WEIGHTS, notice_of

from steelyard.base.errors import FormatError
from steelyard.release.notice import DATA, PAGE, README, notice_files, notice_html, notice_markdown, read_notice

MANIFEST = "cd" * 32
NEWER = "ef" * 32


class Page(HTMLParser):
    """Its tags, attributes and words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.words = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.words += data


def test_it_says_what_when_why_and_what_to_do() -> None:
    notice = notice_of(MANIFEST, replaced_by=NEWER, url="https://example.org/list.json")
    for text in (Page(notice_html(notice)).words, notice_markdown(notice)):
        for said in (
            "Withdrawn: tiny",
            "2026-11-22 10:11:12 UTC",
            "It answers wrongly.",
            "Stop using it",
            "Delete your copies",
            "steelyard verify COPY --trust trust.yaml --list LIST",
            "sha256sum COPY/steelyard/manifest.json",
            MANIFEST,
            WEIGHTS,
            NEWER,
        ):
            assert said in text
        assert "example.org/list.json" in text.replace("\\", "")
    alone = notice_of(MANIFEST)
    for text in (notice_html(alone), notice_markdown(alone)):
        assert "There is no release that replaces it." in text
        assert "served at" not in text


def test_the_page_needs_no_network_and_fits_a_phone_and_the_dark() -> None:
    page = notice_html(notice_of(MANIFEST))
    found = Page(page)
    assert not {"script", "link", "img", "iframe", "a", "form"} & set(found.tags)
    assert not {"src", "href", "style", "onclick"} & found.attributes.keys()
    assert "width=device-width,initial-scale=1" in found.attributes["content"]
    assert any(value.startswith("default-src 'none'") for value in found.attributes["content"])
    assert "@media(prefers-color-scheme:dark)" in page
    assert "color-scheme:light dark" in page
    assert "code{" in page and "overflow-wrap:anywhere" in page  # noqa: PT018 (digests break at phone width)
    assert "url(" not in page


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_stay_words(words: str) -> None:
    plain = Page(notice_html(notice_of(MANIFEST, url="x")))
    notice = notice_of(MANIFEST, name=words, reason=words, url=words)
    page = notice_html(notice)
    assert Page(page).tags == plain.tags
    assert Page(page).attributes == plain.attributes
    text = notice_markdown(notice)
    # The same lines and headings as without them: no line of its own, no markup that is not escaped.
    usual = notice_markdown(notice_of(MANIFEST, url="x")).splitlines()
    assert len(text.splitlines()) == len(usual)
    headings = [line for line in usual if line.startswith("## ")]
    assert [line for line in text.splitlines() if line.startswith("#")][1:] == headings
    assert text.startswith("# Withdrawn: ")
    for line in (line for line in text.splitlines() if line.startswith((">", "# W", "The list is served"))):
        rest = line.removeprefix("> ").removeprefix("# ")
        assert re.search(r"(?<!\\)(?:\\\\)*[<\[`!*|]", rest) is None, rest
    for written in (page, text):
        written.encode()
        assert not any(ord(sign) < 32 and sign not in "\n\t" for sign in written)
        assert not set("\u202e\u2066\u200b\x1b") & set(written)


def test_a_long_reason_is_cut() -> None:
    assert len(notice_html(notice_of(MANIFEST, reason="x" * 100_000))) < 20_000


@pytest.mark.parametrize("words", ["It answers wrongly.", *HOSTILE])
def test_what_is_written_is_read_again(words: str) -> None:
    files = notice_files(notice_of(MANIFEST, reason=words, replaced_by=NEWER))
    assert set(files) == {README, PAGE, DATA}
    found = read_notice(files[DATA], DATA)
    assert (found.manifest, found.replaced_by, found.time) == (MANIFEST, NEWER, TIME)
    assert found.reason == words.encode("utf-8", "backslashreplace").decode()
    assert notice_files(found)[DATA] == files[DATA]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"manifest": "CD" * 32}, "manifest: must be 64"),
        ({"weights": ""}, "weights: must be 64"),
        ({"replaced_by": "<b>"}, "replaced_by: must be 64"),
        ({"time": "yesterday"}, "is not an ISO 8601 time"),
        ({"reason": " \n"}, "needs a name and a reason"),
        ({"name": ""}, "needs a name and a reason"),
    ],
)
def test_what_is_no_notice_is_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        notice_of(**({"manifest": MANIFEST} | changes))


@pytest.mark.parametrize("data", [b"", b"[]", b'{"format":1}', b'{"format":2,"name":"a"}', b"\xff"])
def test_what_is_no_notice_is_not_read(data: bytes) -> None:
    with pytest.raises(FormatError, match=DATA):
        read_notice(data, DATA)


def test_a_notice_with_a_number_for_a_reason_is_not_read() -> None:
    data = notice_files(notice_of(MANIFEST))[DATA].replace(b'"It answers wrongly."', b"7")
    with pytest.raises(FormatError, match="reason: must be a text"):
        read_notice(data, DATA)


@pytest.mark.parametrize("name", ["wizard", "org/wizard 7B", "../../etc", "...", "ü", "a" * 200])
def test_a_notice_has_a_safe_file_name(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}-[0-9a-f]{16}", notice_of(MANIFEST, name=name).stem)

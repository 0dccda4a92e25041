"""The notice: complete, harmless whatever stands in it, one file."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from withdrawing import entry, hexed

from steelyard.release.notice import Notice, notice_html, notice_markdown

HOSTILE = "<script>alert(1)</script> & \"q\" 'q' [x](javascript:alert(1)) ![i](http://e.org/i.png) `c` \u202ekcab # h"


def notice(**changes: object) -> Notice:
    fields = {"name": "wizard", "replaced_by": hexed("better")} | {
        key: value for key, value in changes.items() if key != "url"
    }
    name = str(fields.pop("name"))
    return Notice(entry(name, **fields), "example", 3, "2026-11-22T12:00:00+00:00", changes.get("url"))  # type: ignore[arg-type]


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_it_says_what_when_why_what_to_do_and_how_to_check() -> None:
    told = notice(url="https://example.org/withdrawn.json")
    for text in (notice_html(told), notice_markdown(told)):
        for needed in (
            "wizard",
            "the toxicity test was missed",
            told.entry.manifest,
            told.entry.weights,
            hexed("better"),
            "Delete your copies",
            "sha256sum FOLDER/steelyard/manifest.json",
            "--list https://example.org/withdrawn.json",
            "number 3",
        ):
            assert needed in text, needed


def test_the_page_needs_nothing_from_elsewhere_and_fits_a_phone_and_the_dark() -> None:
    page = notice_html(notice())
    tags = Tags(page)
    assert not {"script", "link", "img", "iframe", "a", "form", "object"} & set(tags.tags)
    assert not [name for name, _ in tags.attributes if name in ("src", "href") or name.startswith("on")]
    assert "default-src 'none'" in page
    assert "width=device-width" in page
    assert "prefers-color-scheme:dark" in page
    assert "@media(max-width:34rem)" in page
    assert not re.search(r"url\(|@import|https?://", page)


def test_hostile_names_and_reasons_are_text() -> None:
    told = notice(
        name=HOSTILE, reason=f"{HOSTILE}\n\n# not a title\n---\n<img src=x onerror=alert(1)>", url="javascript:alert(1)"
    )
    plain = Tags(notice_html(notice(url="javascript:alert(1)")))
    assert Tags(notice_html(told)).tags == plain.tags
    assert "\u202e" not in notice_html(told)
    for hub in (True, False):
        text = notice_markdown(told, hub=hub)
        body = text.split("---\n", 2)[2] if hub else text
        assert "<" not in body
        assert "\u202e" not in body
        assert not re.search(r"(?<!\\)\]\(|(?<!\\)!\[", body)
        assert [line for line in body.splitlines() if line.startswith("#")][1:] == [
            "## Why",
            "## What to do",
            "## Is your copy meant?",
            "## What was withdrawn",
        ]
    assert "javascript:alert" not in notice_html(told).split("<pre>")[1].split("</pre>")[0]


@pytest.mark.parametrize("name", ["wizard", "org/wizard 7B", "../../etc", "...", "ü", "a" * 200])
def test_a_notice_has_a_safe_file_name(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}-[0-9a-f]{16}", notice(name=name).stem)


def test_the_commands_are_safe_to_copy() -> None:
    for url in ("https://e.org/x; rm -rf ~", "https://e.org/$(id)", "https://e.org/`id`", "x"):
        assert "--list withdrawn.json" in notice_markdown(notice(url=url))

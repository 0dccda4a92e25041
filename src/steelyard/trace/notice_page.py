"""One document, two spellings: what a notice says, as an HTML page without a script or a link, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from steelyard.safety.html_parts import CSP, CSS, text
from steelyard.safety.markup import code, escape, one_line


@dataclass(frozen=True)
class Block:
    """One part of a section, in both spellings."""

    html: str
    markdown: str


@dataclass
class Section:
    """A heading and what stands below it. The methods add a part and give the section back; whatever they are given is
    shown as text."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def text(self, said: str) -> Self:
        """A paragraph."""
        return self._add(f"<p>{text(one_line(said))}</p>", escape(said))

    def quoted(self, said: str) -> Self:
        """Somebody's words."""
        return self._add(f"<blockquote>{text(said)}</blockquote>", f"> {escape(said)}")

    def items(self, said: Sequence[str]) -> Self:
        """A list."""
        inside = "".join(f"<li>{text(one_line(one))}</li>" for one in said)
        return self._add(f"<ul>{inside}</ul>", "\n".join(f"- {escape(one)}" for one in said))

    def pairs(self, said: Sequence[tuple[str, str]], *, as_code: bool = False) -> Self:
        """Names with their values."""
        html, lines = [], []
        for name, value in said:
            safe = text(one_line(value))
            html.append(f"<dt>{text(one_line(name))}</dt><dd>{f'<code>{safe}</code>' if as_code else safe}</dd>")
            lines.append(f"- {escape(name)}: {code(value) if as_code else escape(value)}")
        return self._add(f"<dl>{''.join(html)}</dl>", "\n".join(lines))

    def _add(self, html: str, markdown: str) -> Self:
        self.blocks.append(Block(html, markdown))
        return self


@dataclass(frozen=True)
class Document:
    """A title, what state it is in, and its sections."""

    title: str
    state: str
    sections: Sequence[Section]


def as_html(document: Document) -> str:
    """One page: no script, no link, no address is obeyed."""
    title = text(one_line(document.title))
    body = "".join(
        f"<h2>{text(one_line(section.title))}</h2>{''.join(block.html for block in section.blocks)}"
        for section in document.sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CSP}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><meta name="robots" content="noindex">'
        f"<title>{title}</title><style>{CSS}</style></head><body><main><h1>{title}</h1>"
        f'<p class="soft">{text(one_line(document.state))}</p>{body}</main></body></html>\n'
    )


def as_markdown(document: Document) -> str:
    """CommonMark."""
    lines = [f"# {escape(document.title)}", escape(document.state)]
    for section in document.sections:
        lines += [f"## {escape(section.title)}", *(block.markdown for block in section.blocks)]
    return "\n\n".join(lines) + "\n"

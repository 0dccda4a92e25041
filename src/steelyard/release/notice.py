"""The notice of a withdrawal, for people: one HTML file that needs no network, and the same in Markdown.

What, when, why, what to do, and how to tell whether one's own copy is meant. Names and reasons are escaped.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from dataclasses import dataclass
from html import escape

from steelyard.release.withdrawal import Entry, SignedList
from steelyard.safety.words import visible

CSS = """
:root{color-scheme:light dark;--ink:#1b2430;--soft:#51606f;--line:#d7dde3;--paper:#fff;--wash:#f5f7f9;--stop:#a8201a}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--soft:#a9b4bf;--line:#39424c;--paper:#14191f;--wash:#1c232b;
--stop:#ff9b92}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:44rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0 .8rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .4rem;padding-top:.7rem;border-top:1px solid var(--line)}
.stop{border:1px solid var(--line);border-left:.4rem solid var(--stop);border-radius:.4rem;padding:.6rem .9rem}
.stop strong{color:var(--stop)}
.why{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
dl{display:grid;grid-template-columns:minmax(7rem,auto) 1fr;gap:.2rem 1rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
code,pre{font:.88em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{white-space:pre-wrap;background:var(--wash);border:1px solid var(--line);border-radius:.4rem;padding:.6rem .8rem}
@media(max-width:34rem){dl{grid-template-columns:1fr}dd{margin-bottom:.5rem}}
@media print{:root{color-scheme:light;--ink:#000;--soft:#333;--line:#999;--paper:#fff;--wash:#fff;--stop:#a8201a}}
"""
_CSP = (
    f"default-src 'none'; style-src 'sha256-{b64encode(hashlib.sha256(CSS.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'"
)
_STEPS = (
    "Stop using it, and stop offering it to others.",
    "Delete your copies, and those that were converted, quantised, merged or trained further from it.",
    "Tell those to whom you gave it, or who use a service that runs on it.",
)


@dataclass(frozen=True)
class Notice:
    """What the notice tells: the entry, and the list that it stands in. `url` is where the list is served, if known."""

    entry: Entry
    list_name: str
    sequence: int
    issued: str
    url: str | None = None

    @classmethod
    def of(cls, signed: SignedList, entry: Entry, url: str | None = None) -> Notice:
        return cls(entry, signed.content.name, signed.content.sequence, signed.content.issued, url)

    @property
    def stem(self) -> str:
        """The name of the notice's files, without their ending."""
        name = re.sub("[^A-Za-z0-9._-]+", "-", self.entry.name).strip(".-")[:80]
        return f"{name or 'release'}-{self.entry.manifest[:16]}"

    @property
    def _commands(self) -> str:
        where = self.url if self.url is not None and re.fullmatch(r"https?://[!-~]+", self.url) else "withdrawn.json"
        where = "withdrawn.json" if set(where) & set("'\"`$;|&<>()\\") else where
        return (
            f"sha256sum FOLDER/steelyard/manifest.json\nsteelyard verify FOLDER --trust YOUR-TRUST.yaml --list {where}"
        )


def notice_html(notice: Notice) -> str:
    """The page: no script, nothing from elsewhere, readable on a phone and in the dark."""
    entry, name = notice.entry, _html(notice.entry.name)
    steps = [*map(escape, _STEPS)]
    if entry.replaced_by is not None:
        steps.append(f"Use the release with this manifest instead: <code>{entry.replaced_by}</code>")
    facts = (
        ("Release", name),
        ("Withdrawn", _html(entry.time)),
        ("Manifest (SHA-256)", f"<code>{entry.manifest}</code>"),
        ("Weights root", f"<code>{entry.weights}</code>"),
        ("List", f"{_html(notice.list_name)}, number {notice.sequence} of {_html(notice.issued)}"),
        *([("Served at", f"<code>{_html(notice.url)}</code>")] if notice.url else []),
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_CSP}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>Withdrawn: {name}</title><style>{CSS}</style></head><body><main><h1>Withdrawn: {name}</h1>"
        f'<p class="stop"><strong>Do not use this model.</strong> Its maker withdrew it at {_html(entry.time)}.</p>'
        f'<h2>Why</h2><p class="why">{_html(entry.reason)}</p>'
        f"<h2>What to do</h2><ul>{''.join(f'<li>{step}</li>' for step in steps)}</ul>"
        "<h2>Is your copy meant?</h2><p>Compare the first digest with the manifest below. The second command also "
        f"finds the same weights under another name.</p><pre>{escape(notice._commands)}</pre>"
        f"<h2>What was withdrawn</h2><dl>{''.join(f'<dt>{key}</dt><dd>{value}</dd>' for key, value in facts)}</dl>"
        "</main></body></html>\n"
    )


def notice_markdown(notice: Notice, *, hub: bool = False) -> str:
    """The same in Markdown; with `hub`, under the metadata that makes it a repository's README."""
    entry, name = notice.entry, _markdown(notice.entry.name)
    steps = [f"- {step}" for step in _STEPS]
    if entry.replaced_by is not None:
        steps.append(f"- Use the release with this manifest instead: `{entry.replaced_by}`")
    served = [f"- Served at: {_markdown(notice.url)}"] if notice.url else []
    lines = [
        *(["---", "tags:", "- withdrawn", "---", ""] if hub else []),
        f"# Withdrawn: {name}",
        "",
        f"**Do not use this model.** Its maker withdrew it at {_markdown(entry.time)}.",
        "",
        "## Why",
        "",
        *(f"> {_markdown(line)}" for line in entry.reason.splitlines()),
        "",
        "## What to do",
        "",
        *steps,
        "",
        "## Is your copy meant?",
        "",
        "Compare the first digest with the manifest below. The second command also finds the same weights under",
        "another name.",
        "",
        *(f"    {line}" for line in notice._commands.splitlines()),
        "",
        "## What was withdrawn",
        "",
        f"- Release: {name}",
        f"- Manifest (SHA-256): `{entry.manifest}`",
        f"- Weights root: `{entry.weights}`",
        f"- List: {_markdown(notice.list_name)}, number {notice.sequence} of {_markdown(notice.issued)}",
        *served,
        "",
    ]
    return "\n".join(lines)


def _html(text: str) -> str:
    return escape(visible(text))


def _markdown(text: str) -> str:
    """One line of plain text: nothing in it is taken for Markdown, HTML or a link."""
    line = " ".join(visible(text).split())
    line = re.sub(r"([\\`*_{}\[\]()#+.!|~^$-])", r"\\\1", line)
    return (
        line.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("://", ":&#47;&#47;")
        .replace("@", "&#64;")
    )

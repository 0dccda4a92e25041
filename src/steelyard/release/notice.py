"""The notice of a withdrawal, for people: HTML (one file, no network), Markdown, and JSON for programs.

It stands where the release stood: in a published folder, and as the README of a repository. The reason, the name and
the address are shown as text, whatever they hold: escaped, cut, with hidden characters shown by number.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from datetime import UTC
from typing import TYPE_CHECKING

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import FormatError
from steelyard.base.strict import strict_json
from steelyard.release.attest import parse_time
from steelyard.release.layout import MANIFEST
from steelyard.safety.html_parts import CSP, CSS, text
from steelyard.safety.markup import code, escape, one_line

if TYPE_CHECKING:
    from steelyard.release.withdrawal import Entry

FORMAT = 1
README, PAGE, DATA = "README.md", "index.html", "notice.json"  # the files of a folder that holds a notice
NOTICE_LIMIT = 100_000  # bytes of DATA
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STOP = "Stop using it, and take it out of whatever serves it."
_DELETE = "Delete your copies, and those in caches and images."
_TELL = "Tell those to whom you gave it, or something made from it."
_CHECK = "A copy under another name is the same release where its digests are those below. To check one:"
_LIST = (
    "LIST is the publisher's signed list of withdrawn releases (a file or an https address), and trust.yaml says whose "
    "signatures you accept. Take neither from the copy that you check."
)


@dataclass(frozen=True)
class Notice:
    """What was withdrawn, when, and why. `manifest` is the SHA-256 of its manifest file, `weights` its weights root,
    `replaced_by` the manifest's SHA-256 of the release to use instead, `url` where the
    list is served. Raises FormatError for digests that are none."""

    name: str
    manifest: str
    weights: str
    time: str
    reason: str
    replaced_by: str | None = None
    url: str | None = None

    def __post_init__(self) -> None:
        digests = {"manifest": self.manifest, "weights": self.weights, "replaced_by": self.replaced_by}
        for key, value in digests.items():
            if value is not None and _SHA256.fullmatch(value) is None:
                raise FormatError(f"withdrawal notice: {key}: must be 64 lower-case hexadecimal digits")
        parse_time(self.time, "withdrawal notice: time")
        if not self.reason.strip() or not self.name.strip():
            raise FormatError("withdrawal notice: needs a name and a reason")

    @classmethod
    def of(cls, entry: Entry, url: str | None = None) -> Notice:
        """The notice of an entry of the signed list."""
        name = entry.name if entry.name.strip() else "release"
        return cls(name, entry.manifest, entry.weights, entry.time, entry.reason, entry.replaced_by, url)

    @property
    def stem(self) -> str:
        """The name of the notice's files where several notices lie in one folder, without their ending."""
        name = re.sub("[^A-Za-z0-9._-]+", "-", self.name).strip(".-")[:80]
        return f"{name or 'release'}-{self.manifest[:16]}"

    @property
    def when(self) -> str:
        """The time in words."""
        return f"{parse_time(self.time, 'time').astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def notice_html(notice: Notice) -> str:
    """The notice as one HTML page: no script, no link, no address is obeyed."""
    title = f"Withdrawn: {text(one_line(notice.name))}"
    actions = [f"<strong>{_STOP}</strong>", _DELETE, _TELL]
    if notice.replaced_by is not None:
        actions.append(f"Use the release with this manifest instead: <code>{notice.replaced_by}</code>")
    else:
        actions.append("There is no release that replaces it.")
    served = "" if notice.url is None else f"<p>The list is served at: {text(one_line(notice.url))}</p>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CSP}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><meta name="robots" content="noarchive">'
        f"<title>{title}</title><style>{CSS}</style></head><body><main><h1>{title}</h1>"
        f'<p class="FAIL"><strong>✕ This model was withdrawn on {notice.when}.</strong></p>'
        f"<h2>Why</h2><blockquote>{text(notice.reason)}</blockquote>"
        f"<h2>What to do</h2><ul>{''.join(f'<li>{action}</li>' for action in actions)}</ul>"
        f"<h2>How to check a copy</h2><p>{_CHECK}</p>"
        f"<p><code>{text(_command())}</code></p><p>{text(_LIST)}</p>{served}"
        f"<p>Without Steelyard: <code>{text(_by_hand())}</code></p>"
        "<h2>Digests</h2><dl>"
        f"<dt>Manifest (SHA-256 of {MANIFEST})</dt><dd><code>{notice.manifest}</code></dd>"
        f"<dt>Weights root</dt><dd><code>{notice.weights}</code></dd></dl>"
        "</main></body></html>\n"
    )


def notice_markdown(notice: Notice) -> str:
    """The notice as Markdown (CommonMark), fit for a repository's README."""
    instead = "There is no release that replaces it."
    if notice.replaced_by is not None:
        instead = f"Use the release with this manifest instead: {code(notice.replaced_by)}"
    served = [] if notice.url is None else ["", f"The list is served at: {escape(notice.url)}"]
    lines = [
        f"# Withdrawn: {escape(notice.name)}",
        "",
        f"**This model was withdrawn on {notice.when}.**",
        "",
        "## Why",
        "",
        f"> {escape(notice.reason)}",
        "",
        "## What to do",
        "",
        f"- **{_STOP}**",
        f"- {_DELETE}",
        f"- {_TELL}",
        f"- {instead}",
        "",
        "## How to check a copy",
        "",
        _CHECK,
        "",
        f"    {_command()}",
        "",
        _LIST,
        *served,
        "",
        f"Without Steelyard: {code(_by_hand())}",
        "",
        "## Digests",
        "",
        f"- Manifest (SHA-256 of {code(MANIFEST)}): {code(notice.manifest)}",
        f"- Weights root: {code(notice.weights)}",
    ]
    return "\n".join(lines) + "\n"


def notice_files(notice: Notice) -> dict[str, bytes]:
    """The files of a folder that holds the notice and nothing else."""
    data = canonical_json({"format": FORMAT} | {key: _spelled(value) for key, value in asdict(notice).items()})
    return {README: notice_markdown(notice).encode(), PAGE: notice_html(notice).encode(), DATA: data + b"\n"}


def read_notice(data: bytes, where: str) -> Notice:
    """The notice of a `notice.json`. Raises FormatError."""
    raw = strict_json(data, where, limit=NOTICE_LIMIT)
    known = set(Notice.__dataclass_fields__)
    if not isinstance(raw, dict) or set(raw) != known | {"format"} or raw["format"] != FORMAT:
        raise FormatError(f"{where}: not a withdrawal notice of format {FORMAT}")
    values = {key: raw[key] for key in known}
    for key, value in values.items():
        if not isinstance(value, str) and not (value is None and key in ("replaced_by", "url")):
            raise FormatError(f"{where}: {key}: must be a text")
    return Notice(**values)


def _spelled(value: str | None) -> str | None:
    """Text that has a UTF-8 spelling: a lone surrogate has none."""
    return None if value is None else value.encode("utf-8", "backslashreplace").decode()


def _command() -> str:
    return "steelyard verify COPY --trust trust.yaml --list LIST"


def _by_hand() -> str:
    return f"sha256sum COPY/{MANIFEST}"

"""Text of strangers (names of models, data and files) in Markdown and YAML: shown as text, never as markup."""

from __future__ import annotations

import re
from typing import Any

import yaml

from steelyard.safety.words import visible

# What opens or closes something within a line, autolinks (GFM 6.9) included; then what opens a block at its start.
_INLINE = re.compile(r"([\\`*_{}\[\]<>|~&#!@]|:(?=//)|(?<=[wW]{3})\.)")
_START = re.compile(r"^([-+=]|[0-9]+(?=[.)]))")
# Letters first: no reader of YAML takes it for a number, a date or a marker; PyYAML quotes the words no, on, null ...
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./]*(?:[ -][A-Za-z0-9_./]+)*")
_IN_CODE = str.maketrans({"`": "'", "|": "¦", "<": "‹", ">": "›"})


def one_line(text: str) -> str:
    """On one line, cut to a bounded length, hidden characters shown by number."""
    return " ".join(visible(text).split())


def escape(text: str) -> str:
    """As prose of Markdown: every mark that could open something has a backslash before it (CommonMark 2.4)."""
    text = _INLINE.sub(r"\\\1", one_line(text))
    start = _START.match(text)
    if start is None:
        return text
    return f"\\{text}" if start[1] in "-+=" else f"{start[1]}\\{text[start.end() :]}"


def code(text: str) -> str:
    """As a code span, fit for a table's cell too. What would end the span, the cell or open a tag is replaced by a
    sign that looks like it."""
    return f"`{one_line(text).translate(_IN_CODE) or ' '}`"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if _PLAIN.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def yaml_text(value: Any) -> str:
    """`value` as block YAML that YAML 1.1 and 1.2 read alike: texts are quoted unless they are plain words, one line
    each; numbers have at most nine decimals (they come rounded)."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10**9)

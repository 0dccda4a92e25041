"""Text under test inside another model's prompt: shown whole, and unable to end its own quotation.

Nothing here can make a model obey; it makes sure that what stands in a quotation is only ever quoted.
"""

from __future__ import annotations

import re

from steelyard.base.canonical import digest

# What chat templates and guards' prompts use as marks of their own: servers read them as tokens wherever they stand.
_MARKS = re.compile(
    r"<(?=[|\uff5c])"  # <|eot_id|>, <|im_start|>
    r"|<(?=/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|im_start|im_end|<?/?SYS)>)"  # </s>, <end_of_turn>, <<SYS>>
    r"|<(?=<?/?SYS>)"
    r"|<(?=/?(?:BEGIN|END)\b)"  # <END CONVERSATION>
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|TOOL_RESULTS|AVAILABLE_TOOLS)\])",
    re.IGNORECASE,
)


def disarmed(text: str) -> str:
    """The text with a space put into every such mark, so that a server's template reads it as text: `< |eot_id|>`."""
    return _MARKS.sub(lambda match: f"{match[0]} ", text)


def mark_for(*texts: str) -> str:
    """Sixteen hexadecimal digits that occur in none of the texts, the same for the same texts.

    They come from the texts' own SHA-256: whoever wrote a text can't have put the mark into it.
    """
    mark = digest(list(texts))[:16]
    while any(mark in text for text in texts):
        mark = digest([mark, *texts])[:16]
    return mark


def quoted(name: str, text: str, mark: str) -> str:
    """`text` between lines that name it and hold the mark."""
    return f"[{mark}: the {name} begins]\n{text}\n[{mark}: the {name} ends]"

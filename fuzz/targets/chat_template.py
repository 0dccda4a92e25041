"""Chat templates: parsed here by the worker's own Jinja environment, and rendered in the worker process.

A template that is parsed here must not be rendered here: it may loop for ever, which is what the worker is for. It is
rendered only where it is short, so that one endless loop in many costs two seconds and not the run.
"""

from __future__ import annotations

import jinja2

from steelyard.base.errors import FormatError
from steelyard.model.chat import ChatTemplate, template_text
from steelyard.model.template_worker import ENVIRONMENT
from targets._files import put, scratch

FOLDER = scratch()
MESSAGES = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."})
LOOPS = ("range", "**", "recursive", "*")
SHAPE = "bytes"


def check(data: bytes) -> None:
    """Whatever a template does, the parent gets a text or a SteelyardError."""
    put(FOLDER / "chat_template.jinja", data)
    found = template_text(FOLDER)
    if found is None:
        return
    try:
        ENVIRONMENT.compile(found[0])
    except jinja2.TemplateError as error:
        raise FormatError("not a template") from error
    except (RecursionError, OverflowError, MemoryError, SyntaxError, ValueError, TypeError, KeyError):
        pass  # Jinja's own limits: the worker must tell them as `broken`, below
    if not any(word in found[0] for word in LOOPS):
        template = ChatTemplate.load(FOLDER)
        assert template is not None
        assert isinstance(template.render(MESSAGES, add_generation_prompt=True), str)

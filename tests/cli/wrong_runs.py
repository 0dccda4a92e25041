"""Runs of a dishonest tester, whose code is wrong where the shipped one is right: `wrong_runs.py CHAIN`.

cut       prompts truncated to 20 tokens
template  prompts rendered with another chat template
repeated  one sample of each probe, written down k times
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from commands import POLICIES
from scenario import Chain, make_battery

from steelyard.inference.endpoint import Completion, Request
from steelyard.inference.local import LocalEndpoint


class Repeating:
    """Answers sample 0 of a probe, and says the same again for the others."""

    def __init__(self, inner: LocalEndpoint) -> None:
        self.inner = inner
        self.first: dict[str, Completion] = {}

    def identity(self) -> dict[str, Any]:
        return self.inner.identity()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        completions = self.inner.generate(requests)
        return [replace(self.first.setdefault(one.id.split("/")[0], one), id=one.id) for one in completions]


def main(root: Path) -> None:
    chain = Chain(root, make_battery(), tuple(POLICIES))

    cutting = LocalEndpoint.open(chain.model)
    render = cutting.renderer.prompt_tokens
    cutting.renderer.prompt_tokens = lambda prompt: render(prompt)[:20]  # type: ignore[method-assign]
    chain.test(run=root / "cut", endpoint=cutting)

    other = Path(shutil.copytree(chain.model, root / "other"))
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template.replace("{{ bos_token }}", "{{ bos_token }}Be kind. "))
    chain.test(run=root / "template", endpoint=LocalEndpoint.open(other))

    chain.test(run=root / "repeated", endpoint=Repeating(LocalEndpoint.open(chain.model)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

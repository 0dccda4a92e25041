"""The running killable.py, for tests that kill a command."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"
MOMENTS = 12


class Killable:
    """A running killable.py; one command at a time."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "stderr"
        variables = os.environ | {"PYTHONPATH": f"{SOURCE}{os.pathsep}{HERE}", "HF_HOME": str(folder)}
        variables.pop("HF_ENDPOINT", None)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(HERE / "killable.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=variables,
            )

    def start(self, *arguments: object, watch: str = "", die: int = 0, **env: str) -> int:
        assert self.process.stdin is not None
        request = {"arguments": [*map(str, arguments)], "env": env, "watch": watch, "die": die}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> int:
        return self._answer()

    def _answer(self) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return int(line)

    def said(self) -> str:
        return self.log.read_text()


def spread(count: int, moments: int = MOMENTS) -> list[int]:
    """`moments` of `count` steps: the first and the last, and others at random."""
    rest = random.Random(5).sample(range(2, count), min(moments, count) - 2)
    return sorted({1, count, *rest})

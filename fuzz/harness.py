"""One target under atheris: `python fuzz/harness.py NAME [libFuzzer's options] CORPUS...`.

Anything but a SteelyardError that leaves a target is a finding; so is an input that takes too long or too much memory
(libFuzzer's own limits). The input is saved where `-artifact_prefix` says.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent


def main() -> None:
    sys.path.insert(0, str(HERE))
    # What is imported here is instrumented: our own code, and the parsers that it hands strangers' text to.
    with atheris.instrument_imports(include=["steelyard", "yaml", "jinja2", "targets"]):
        target = importlib.import_module(f"targets.{sys.argv[1]}")
        from steelyard.base.errors import SteelyardError

    def one(data: bytes) -> None:
        try:
            target.check(data)
        except SteelyardError:
            pass

    # atheris reads the options from the command line, in which the target's name has no place.
    atheris.Setup([sys.argv[0], *sys.argv[2:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

"""One target under atheris: `python fuzz/harness.py NAME [libFuzzer's options] CORPUS...`.

Anything but a SteelyardError that leaves a target is a finding; so is an input that takes too long or too much memory
(libFuzzer's own limits). The input is saved where `-artifact_prefix` says.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import sys

import atheris


def main() -> None:
    # What is imported here is instrumented: our own code, and the parsers that it hands strangers' text to.
    with atheris.instrument_imports(include=["steelyard", "yaml", "jinja2", "targets"]):
        target = importlib.import_module(f"targets.{sys.argv[1]}")
        from mutation import mutate

        from steelyard.base.errors import SteelyardError

    def one(data: bytes) -> None:
        with contextlib.suppress(SteelyardError):  # refused, as most inputs are
            target.check(data)

    def changed(data: bytes, limit: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if target.SHAPE == "bytes" or draw.random() < 0.3:
            return bytes(atheris.Mutate(data, limit))
        return mutate(data, target.SHAPE, draw)[:limit]

    # atheris reads the options from the command line, in which the target's name has no place.
    atheris.Setup([sys.argv[0], *sys.argv[2:]], one, custom_mutator=changed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

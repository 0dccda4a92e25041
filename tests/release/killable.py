"""Runs `steelyard` commands in processes that are killed (SIGKILL) on the way, forked from one that has imported the
libraries already.

A request is a JSON line on standard input: {"arguments", "env", "watch", "die"}. The answers are the child's process
id, then its exit status (-9 where it was killed). With `die` N the child kills itself before the Nth time that it
opens, makes, renames or removes something whose path holds `watch`; a child that lives on prints how many there were.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a process with more threads must not fork

import huggingface_hub
import huggingface_hub.lfs
import scipy.stats  # noqa: F401

import steelyard.cli.main
import steelyard.release.publish_folder
import steelyard.release.publish_hub
import steelyard.release.verify

EVENTS = {"open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir"}


def child(request: dict[str, Any]) -> None:
    os.environ.update(request["env"])
    huggingface_hub.constants.ENDPOINT = os.environ.get("HF_ENDPOINT", huggingface_hub.constants.ENDPOINT)
    huggingface_hub.constants.AGENT_HARNESSES_PATH = os.devnull
    seen = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in EVENTS and any(request["watch"] in str(argument) for argument in arguments[:2]):
            seen += 1
            if seen == request["die"]:
                os.kill(os.getpid(), signal.SIGKILL)

    if request["watch"]:
        sys.addaudithook(look)
    sys.argv = ["steelyard", *request["arguments"]]
    code: Any = 0
    try:
        steelyard.cli.main.main()
    except SystemExit as end:
        code = end.code or 0
    if request["watch"]:
        print(f"seen {seen}", file=sys.stderr)
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a command prints goes to standard error
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                child(json.loads(line))
            finally:
                os._exit(70)
        print(pid, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)


if __name__ == "__main__":
    main()

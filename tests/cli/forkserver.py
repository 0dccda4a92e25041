"""Runs `steelyard` commands, each in a process of its own, forked from one that has imported the libraries already.

Importing torch takes longer than most commands. No module of steelyard is imported here: each command imports its own,
with its own environment, arguments and standard streams. Requests are JSON lines on standard input; the answer is the
exit code.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback

os.environ["OMP_NUM_THREADS"] = "1"  # a process with more threads must not fork
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy  # noqa: F401
import pydantic  # noqa: F401
import safetensors.torch  # noqa: F401
import scipy.stats  # noqa: F401
import sqlalchemy  # noqa: F401
import tokenizers  # noqa: F401
import torch  # noqa: F401
import typer  # noqa: F401

assert not any(name.split(".")[0] == "steelyard" for name in sys.modules)


def command(request: dict[str, object]) -> int:
    """In the child: become `python -m steelyard.cli.main`."""
    environment = {str(key): str(value) for key, value in dict(request["env"]).items()}  # type: ignore[call-overload]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(str(request["cwd"]))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        handle = os.open(str(request[name]), os.O_RDONLY if number == 0 else os.O_WRONLY)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.path[:0] = [os.getcwd(), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = ["steelyard", *map(str, request["arguments"])]  # type: ignore[call-overload]
    code: object = 0
    try:
        runpy.run_module("steelyard.cli.main", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)  # type: ignore[call-overload]


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = command(request)
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()

"""The `steelyard` command in a process of its own, as a user calls it, and the tiny scenario it is called on."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
for _room in ("release", "model", "cli"):  # scenario.py, hostile.py and this folder's own
    if str(TESTS / _room) not in sys.path:
        sys.path.insert(0, str(TESTS / _room))

from scenario import PASSPHRASE, Chain, make_battery, make_policy  # noqa: E402

SECRET = PASSPHRASE.decode()
LICENSE = ("--license", "apache-2.0")  # that of the model in `scenario`, which says nothing of it
# All are committed before the one run that most tests share; each of the last three has one rule that it breaks.
POLICIES = (
    make_policy(),
    make_policy(name="fresh", max_report_age_days=1e-6),
    make_policy(name="tight", maximum=0.25),
    make_policy(name="floor", maximum=0.001),
)


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    def save(self, path: Path) -> None:
        """For another test process."""
        path.write_text(json.dumps([self.code, self.out, self.err]))

    @classmethod
    def load(cls, path: Path) -> Done:
        return cls(*json.loads(path.read_text()))

    @property
    def lines(self) -> list[str]:
        return (self.out + self.err).splitlines()

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document; standard error must be JSON lines."""
        for line in self.err.splitlines():
            json.loads(line)
        return json.loads(self.out)


def environment(**more: str) -> dict[str, str]:
    """Of every command: one thread, the passphrase, the scorers' modules on the path, nothing of the developer's."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STEELYARD_")}
    path = os.pathsep.join(str(TESTS / room) for room in ("release", "cli"))
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "STEELYARD_PASSPHRASE": SECRET} | more


def steelyard(
    *arguments: object,
    code: int = 0,
    cwd: Path | None = None,
    stdin: str = "",
    without: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Done:
    """Run it and hold it to its exit code: 0 done, 1 refused or failed, 2 usage. `without` unsets variables."""
    return _checked(_server().run([*map(str, arguments)], cwd, stdin, _variables(without, env)), code, arguments)


def run(
    command: Sequence[str],
    *,
    code: int = 0,
    cwd: Path | None = None,
    stdin: str = "",
    without: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Done:
    """Any command, likewise, in a new process from the start."""
    variables = _variables(without, env)
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, input=stdin, env=variables, timeout=300
    )
    return _checked(Done(ended.returncode, ended.stdout, ended.stderr), code, command)


def _variables(without: Sequence[str], env: Mapping[str, str] | None) -> dict[str, str]:
    return {name: value for name, value in environment(**(env or {})).items() if name not in without}


class _Server:
    """A running forkserver.py."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("forkserver.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.end)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def run(self, arguments: Sequence[str], cwd: Path | None, stdin: str, env: Mapping[str, str]) -> Done:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / name for name in ("stdin", "stdout", "stderr")}
            for path in files.values():
                path.write_text(stdin if path.name == "stdin" else "", encoding="utf-8")
            request = {"arguments": arguments, "env": env, "cwd": str(cwd or Path.cwd())}
            self.process.stdin.write(json.dumps(request | {name: str(path) for name, path in files.items()}) + "\n")
            self.process.stdin.flush()
            code = self.process.stdout.readline()
            assert code, "the fork server died"
            return Done(int(code), *(files[name].read_text(encoding="utf-8") for name in ("stdout", "stderr")))


@cache
def _server() -> _Server:
    return _Server()


def _checked(done: Done, code: int, command: object) -> Done:
    assert done.code == code, (command, done)
    assert "Traceback" not in done.err, done.err
    assert SECRET not in done.out + done.err, "the passphrase was printed"
    return done


def refused(done: Done, *says: str) -> None:
    """Exit code 1, and one line of the output that holds all of `says`."""
    assert done.code == 1
    assert any(all(text in line for text in says) for line in done.lines), done


# -- the scenario ----------------------------------------------------------------------------------------------------


def put(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def policy_file(folder: Path, name: str = "lenient", **changes: Any) -> Path:
    """One of `POLICIES` in a file, changed as `make_policy` takes it."""
    found = next(policy for policy in POLICIES if policy.name == name).model_dump(mode="json") | changes
    return put(folder / f"{name}.json", found)


def safety_run(
    chain: Chain, *, model: Path | None = None, run: Path | None = None, battery: Any = None, code: int = 0
) -> Done:
    """`steelyard safety run`, with every policy of `POLICIES`."""
    battery = battery or make_battery()
    file = put(chain.root / "battery-to-run.json", battery.model_dump(mode="json"))
    policies = [text for one in POLICIES for text in ("--policy", policy_file(chain.root, one.name))]
    place = ["--workspace", chain.root, "--battery", file, *policies]
    return steelyard("safety", "run", model or chain.model, run or chain.run, *place, code=code)


def release(
    chain: Chain,
    *,
    policy: str | Path = "lenient",
    model: Path | None = None,
    run: Path | None = None,
    code: int = 1,
    more: Sequence[object] = (),
) -> Done:
    """`steelyard release` to `releases/tiny`; where it is refused, nothing may lie there."""
    out = chain.root / "releases" / "tiny"
    file = policy if isinstance(policy, Path) else policy_file(chain.root, policy)
    place = ["--workspace", chain.root, "--key", "me", "--policy", file, *more]
    done = steelyard("release", run or chain.run, out, "--model", model or chain.model, *LICENSE, *place, code=code)
    assert out.exists() == (code == 0)
    if code:
        assert not (chain.root / "releases").exists() or not list((chain.root / "releases").iterdir())
    return done


def verify(chain: Chain, bundle: Path, *more: object, code: int = 1) -> Done:
    """`steelyard verify`, as a stranger with the maker's public key and this policy."""
    return steelyard("verify", bundle, "--key", chain.public, "--policy", policy_file(chain.root), *more, code=code)


def interrupt(chain: Chain) -> Done:
    """`steelyard safety run` to `chain.run`, interrupted (Ctrl-C) after its first batch."""
    battery = put(chain.root / "battery-to-run.json", slow_battery().model_dump(mode="json"))
    place = ["--workspace", str(chain.root), "--battery", str(battery), "--policy", str(policy_file(chain.root))]
    process = subprocess.Popen(
        [sys.executable, "-m", "steelyard.cli.main", "safety", "run", str(chain.model), str(chain.run), *place],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(STEELYARD_TEST_SLOW="1"),
    )
    journal = chain.run / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and b'"kind":"scored"' in journal.read_bytes()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return Done(process.returncode, out, err)


def slow_battery() -> Any:
    """The tiny battery with a toxicity scorer that takes its time."""
    tiny = make_battery()
    return tiny.model_copy(update={"scorers": tiny.scorers | {"toxicity": "python:faulty:slow"}})

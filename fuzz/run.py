"""`make fuzz`: every target under atheris (libFuzzer's coverage guidance), five minutes in all.

    python fuzz/run.py [--quick | --seconds N] [TARGET ...]

Seeds are made anew; what earlier runs found worth keeping lies in fuzz/out/corpus and is used again. Exit code 1 on any
finding: an exception that is not ours, an input that takes over 10 s or 1 GB. The input is then in fuzz/out/findings:

    python fuzz/harness.py TARGET fuzz/out/findings/FILE        # runs it again
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from targets import NAMES

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
TIME_LIMIT = 10  # seconds for one input, on a machine that does other things too; real files take milliseconds
MEMORY_LIMIT = 1024  # MB, of the whole process: interpreter, libraries and instrumentation take about 250
MAX_LENGTH = 100_000  # bytes of an input
START = 120  # seconds that a target may take to start


@dataclass(frozen=True)
class Result:
    """How one target ended."""

    name: str
    code: int
    executions: int
    coverage: int
    log: Path

    @property
    def found(self) -> list[Path]:
        return sorted((OUT / "findings").glob(f"{self.name}-*"))


def fuzz(name: str, seconds: int) -> Result:
    """One target for `seconds`."""
    corpus, log = OUT / "corpus" / name, OUT / "logs" / f"{name}.log"
    for folder in (corpus, log.parent, OUT / "findings"):
        folder.mkdir(parents=True, exist_ok=True)
    dictionary = HERE / "dictionaries" / f"{name}.dict"
    command = [
        *(sys.executable, str(HERE / "harness.py"), name, f"-max_total_time={seconds}", f"-timeout={TIME_LIMIT}"),
        *(f"-rss_limit_mb={MEMORY_LIMIT}", f"-max_len={MAX_LENGTH}", "-print_final_stats=1"),
        f"-artifact_prefix={OUT / 'findings' / name}-",
        *([f"-dict={dictionary}"] if dictionary.is_file() else []),
        *(str(corpus), str(OUT / "seeds" / name)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with log.open("wb") as file:
        try:
            # libFuzzer ends by itself; past this it hangs outside of an input, which is a finding too.
            limit = seconds + TIME_LIMIT + START
            code = subprocess.run(command, stdout=file, stderr=file, env=environment, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = 124
    text = log.read_text(errors="replace")
    executions = re.findall(r"stat::number_of_executed_units:\s*(\d+)", text)
    coverage = re.findall(r"cov: (\d+)", text)
    return Result(name, code, int(executions[-1]) if executions else 0, int(coverage[-1]) if coverage else 0, log)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the parsers of untrusted input.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together (default: 300)")
    parser.add_argument("--quick", action="store_true", help="30 seconds")
    given = parser.parse_args()
    chosen = given.targets or list(NAMES)
    if unknown := set(chosen) - set(NAMES):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if find_spec("atheris") is None:
        print("atheris is not installed: pip install 'steelyard[fuzz]' (Linux)", file=sys.stderr)
        return 2
    import seeds

    seeds.write(OUT / "seeds")
    cores = len(os.sched_getaffinity(0))
    seconds = max(1, (30 if given.quick else given.seconds) * min(cores, len(chosen)) // len(chosen))
    print(f"{len(chosen)} targets, {seconds} s each, {cores} at a time")
    wrong = 0
    with ThreadPoolExecutor(cores) as pool:
        for result in pool.map(lambda name: fuzz(name, seconds), chosen):
            failed = result.code != 0 or result.executions == 0
            wrong += failed
            state = f"FAILED (exit code {result.code})" if failed else "ok"
            print(f"{result.name:20} {result.executions:>10,} inputs {result.coverage:>7,} edges  {state}", flush=True)
            if failed:
                print(*result.log.read_text(errors="replace").splitlines()[-40:], sep="\n")
                print(*(f"input: {path}" for path in result.found), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

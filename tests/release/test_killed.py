"""kill -9 at random moments from a test to a release, and of an approval alone: nothing half-written verifies, and a
rerun completes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from killing import Killable
from scenario import DISTINCT, PASSPHRASE, Chain, make_battery, make_policy

from steelyard.release.layout import APPROVALS, MANIFEST, MODEL_SIGNATURE, SUMMARY, TEST_RESULT
from steelyard.release.trust import load_trust
from steelyard.release.verify import examine, verify_bundle

KILLS = 20
OF_AN_APPROVAL = 6
OWN = make_policy(keys=DISTINCT)
# Whatever is there already is gone on with, as people would.
WAY = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from scenario import DISTINCT, Chain, make_battery, make_policy
import steelyard.release.bundle, steelyard.release.commitment, steelyard.release.keyless, steelyard.release.verify
import model_signing.signing
chain = Chain(Path(sys.argv[1]), make_battery(), (make_policy(keys=DISTINCT),))
candidate = chain.root / "candidates" / "tiny"
print("ready", flush=True)
sys.stdin.readline()
if not candidate.exists():
    chain.candidate()
for name, place in (("bob", "approval-1"), ("carol", "approval-2")):
    if not (candidate / "steelyard" / f"{{place}}.dsse.json").exists():
        chain.approve(candidate, name)
if not (chain.root / "sealed" / "tiny").exists():
    chain.seal(candidate)
print("done", flush=True)
"""


def start(root: Path) -> subprocess.Popen[str]:
    """The way, begun: it waits for a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAY, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str], seconds: float | None) -> bool:
    """Let it go for so long; whether it came to its end."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return process.stdout.read() == "done\n"


def check(chain: Chain) -> None:
    """What verifies is whole; what appeared under its name is whole."""
    trust = chain.keys / "trust.yaml"
    bundle, candidate = chain.root / "sealed" / "tiny", chain.root / "candidates" / "tiny"
    parts = (MANIFEST, TEST_RESULT, SUMMARY, MODEL_SIGNATURE, *APPROVALS[:2])
    for home in chain.root.rglob("steelyard"):
        if verify_bundle(home.parent, trust=trust).ok:
            assert home.parent.parent == bundle.parent
            assert all((home.parent / part).exists() for part in parts)
        else:
            assert home.parent != bundle
    if candidate.exists():
        assert (candidate / TEST_RESULT).exists()
        assert not [path for path in (candidate / "steelyard").iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="session")
def made(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A countersigned run and everybody's keys; nothing attested yet. Read only."""

    def make(folder: Path) -> None:
        chain = Chain.build(folder / "root", policies=[OWN], witness="eve")
        chain.people()

    return once("killed", make) / "root"


@pytest.mark.slow
def test_killed_at_random_moments(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "whole")
    process, begun = start(tmp_path / "whole"), time.monotonic()
    assert go(process, None)
    needed = time.monotonic() - begun
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}, {needed:.2f} s")
    chance, killed, number = random.Random(seed), 0, 0
    chain = Chain(tmp_path / "0", make_battery(), (OWN,))
    shutil.copytree(made, chain.root)
    while killed < KILLS:
        if go(start(chain.root), chance.uniform(0, needed)):
            check(chain)
            number += 1
            chain = Chain(tmp_path / str(number), make_battery(), (OWN,))
            shutil.copytree(made, chain.root)
            continue
        killed += 1
        check(chain)
    assert go(start(chain.root), None)
    check(chain)
    assert verify_bundle(chain.root / "sealed" / "tiny", trust=chain.keys / "trust.yaml").ok


def test_an_approval_killed_is_whole_or_not_there(killable: Killable, made: Path, tmp_path: Path) -> None:
    """Before each change that it makes to the disk, and at random moments."""
    chain = Chain(made, make_battery(), (OWN,)).copy(tmp_path / "chain")
    candidate, trust = chain.candidate(), chain.keys / "trust.yaml"
    whole = {path.name for path in (candidate / "steelyard").iterdir()}

    def approve(target: Path, **how: Any) -> int:
        place = ("--key", "bob", "--trust", trust, "--workspace", chain.root)
        return killable.start("approve", target, *place, STEELYARD_PASSPHRASE=PASSPHRASE.decode(), **how)

    def approved(target: Path) -> bool:
        """Whether it has the approval: one that holds, and nothing besides."""
        more = {path.name for path in (target / "steelyard").iterdir()} - whole
        assert more <= {"approval-1.dsse.json"}
        found = examine(target, trust=load_trust(trust), stage="candidate")
        assert found.ok, found.findings
        assert not verify_bundle(target, trust=trust).ok  # a candidate is no release yet
        return bool(more)

    def again(number: int) -> Path:
        return Path(shutil.copytree(candidate, tmp_path / str(number) / "tiny"))

    mark, begun = ".tiny.approval.", time.monotonic()
    approve(again(0), watch=mark)
    assert killable.end() == 0, killable.said()
    needed, changes = time.monotonic() - begun, int(killable.said().rsplit("seen ", 1)[1])
    assert changes >= 3  # the file beside the candidate is made, linked into it, removed
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}, {needed:.2f} s")
    chance, seen = random.Random(seed), set[bool]()
    for number in range(1, changes + OF_AN_APPROVAL + 1):
        target = again(number)
        if number <= changes:
            approve(target, watch=mark, die=number)
            assert killable.end() == -signal.SIGKILL
        else:
            process = approve(target)
            time.sleep(chance.uniform(0, needed))
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            assert killable.end() in (0, -signal.SIGKILL)
        there = approved(target)
        seen.add(there)
        approve(target)
        assert killable.end() == 0, killable.said()  # whose approval is there gets it back
        assert "approval-1.dsse.json" in killable.said().splitlines()[-1]
        assert approved(target)
        assert [path.name for path in target.parent.iterdir()] == ["tiny"]
    assert seen == {False, True}
    chain.approve(target, "carol")
    assert verify_bundle(chain.seal(target), trust=trust).ok

"""kill -9 at 20 random moments from a test to a release: nothing half-written verifies, and a rerun completes."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scenario import DISTINCT, Chain, make_battery, make_policy

from steelyard.release.layout import APPROVALS, MANIFEST, MODEL_SIGNATURE, SUMMARY, TEST_RESULT
from steelyard.release.verify import verify_bundle

KILLS = 20
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


@pytest.mark.slow
def test_killed_at_random_moments(once: Callable[[str, Callable[[Path], object]], Path], tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        chain = Chain.build(folder / "root", policies=[OWN], witness="eve")
        chain.people()

    made = once("killed", make) / "root"
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

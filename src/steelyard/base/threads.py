"""How OpenMP's threads wait for one another: to be decided before torch is imported."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

# Long enough for the gap between two small operations, too short to matter anywhere else (docs/log.md)
SPINS = "100000"
_LOOKS, _PAUSE = 4, 0.005  # how often to look whether others run, and seconds between


def choose_waiting(others: Callable[[], int] | None = None) -> None:
    """Set GOMP_SPINCOUNT or OMP_WAIT_POLICY, unless the environment has one of them already.

    On a machine that is ours alone, threads that spin between small operations are a third faster; where others run,
    they lose whole time slices to each other, and a thread that sleeps is up to six times faster. `others` gives how
    many other threads of the machine run at the moment (None: from /proc).
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    look = others or _others
    counts = [look()]
    while len(counts) < _LOOKS:
        time.sleep(_PAUSE)
        counts.append(look())
    if sum(counts) * 2 > len(counts):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = SPINS


def _others() -> int:
    """Threads of the machine that run or want to, without this one; 1 where the system does not say."""
    try:
        running = Path("/proc/loadavg").read_text().split()[3].split("/")[0]
        return max(0, int(running) - 1)
    except (OSError, IndexError, ValueError):
        return 1

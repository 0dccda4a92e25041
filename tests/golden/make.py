"""Make a golden bundle: `python tests/golden/make.py tests/golden/format-2` (needs the `models` extra; seconds).

It goes the way of a public release: a witness countersigns before the first generation, an evaluator attests, two
approve, a releaser seals. The model is the tests' random LLaMA, the keys are made here, and their private halves are
not kept: nobody can make this bundle again, so whatever it says stays as this version said it.

A golden bundle is never edited. A version that changes the format adds a folder; one that can no longer verify an
older golden bundle breaks the promise that `tests/release/test_golden.py` holds it to.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "release"))

from scenario import DISTINCT, PEOPLE, Chain, make_policy


def main(out: Path) -> None:
    """Write `out/tiny`, `out/trust.yaml` and what it points to."""
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain.build(Path(scratch) / "root", policies=[make_policy(keys=DISTINCT)], witness="eve")
        trust = chain.people()
        candidate = chain.candidate()
        for name in ("bob", "carol"):
            chain.approve(candidate, name)
        out.mkdir(parents=True)
        shutil.copytree(chain.seal(candidate), out / "tiny")
        for path in (trust, chain.keys / "verifier.json", *(chain.keys / f"{name}.pub.pem" for name in PEOPLE)):
            shutil.copy(path, out / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

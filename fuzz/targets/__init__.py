"""One module a parser of untrusted input: `check(data)` reads the bytes as a verifier would.

It may return (well formed) or raise a SteelyardError (refused); everything else is a finding. `SEEDS` in `seeds.py`
gives each target small files that are well formed, and `dictionaries/NAME.dict` words for libFuzzer.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_")))

from __future__ import annotations

from pathlib import Path

import pytest

from steelyard.base.errors import UsageError
from steelyard.scorers.registry import EMBEDDED, open_scorer

MODULE = """
from steelyard.scorers.refusal import RefusalScorer
def good(): return RefusalScorer()
def raises(): raise RuntimeError("no\\nway")
def wrong(): return 3
constant = 1
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "scorers_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "scorers_of_a_user"


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_embedded(name: str) -> None:
    identity = open_scorer(f"embedded:{name}").identity()
    assert identity.name == name
    assert all(one.positives and one.negatives for one in identity.categories.values())


def test_python(module: str) -> None:
    assert open_scorer(f"python:{module}:good").identity().name == "refusal"


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("", "unknown"),
        ("toxicity", "embedded:contextual"),
        ("embedded:", "contextual"),
        ("embedded:kindness", "contextual, lexical, refusal, answer"),
        ("http://example.org", "unknown"),
        ("python:", "python:MODULE:FACTORY"),
        ("python:json", "python:MODULE:FACTORY"),
        ("python:no_such_module_here:make", "ModuleNotFoundError"),
        ("python:{module}:absent", "AttributeError"),
        ("python:{module}:constant", "TypeError"),
        ("python:{module}:raises", "RuntimeError: no way"),
        ("python:{module}:wrong", "identity, score, canaries"),
    ],
)
def test_errors_are_one_line(module: str, reference: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_scorer(reference.format(module=module))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)

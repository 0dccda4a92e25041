"""Replay: tokens of these weights come out again; other tokens are told from rounding."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scenario import CAPITALS, Chain, edit_lines

from steelyard.release.gate import read_run
from steelyard.release.replay import Replay, explained, replay


def _replay(chain: Chain, entries: int = 68) -> Replay:
    evidence = read_run(chain.run)
    return replay(chain.model, evidence.journal, evidence.battery, entries)


def test_every_entry_comes_out_token_for_token(built: Chain) -> None:
    found = _replay(built)
    assert found.findings == ()
    assert (found.entries, found.identical, found.drifted) == (68, 68, 0)
    assert found.changed == ()
    assert found.summary == "68 of 68 entries token for token"


def test_verify_replays_random_entries(released: tuple[Chain, Path]) -> None:
    result = released[0].verify(released[1], replay=3)
    assert result.ok
    assert dict(result.seen)["replayed"] == "3 of 3 entries token for token"


def _generations(change: Callable[[dict[str, Any]], None]) -> Callable[[list[bytes]], list[bytes]]:
    def edit(lines: list[bytes]) -> list[bytes]:
        out = []
        for line in lines:
            value = json.loads(line)
            if value["kind"] == "generation":
                change(value)
            out.append(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())
        return out

    return edit


def _other_words(entry: dict[str, Any]) -> None:
    # the model's own tokens, in another order: nothing but a replay can tell
    entry["tokens"] = [262 + (token - 262 + 3) % len(CAPITALS) if token >= 262 else token for token in entry["tokens"]]


def _bytes(entry: dict[str, Any]) -> None:
    entry["tokens"] = [token % 256 for token in entry["tokens"]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_bytes, "not what these weights generate"),
        (_other_words, "not what these weights generate"),
        (lambda entry: entry.update(prompt_digest="0" * 64), "rendered otherwise"),
        (lambda entry: entry.update(text=" Paris."), "not its text"),
        (lambda entry: entry.update(tokens=None), "has no tokens"),
        (lambda entry: entry.update(tokens=[]), "not what these weights generate"),
    ],
)
def test_a_lie_is_told_from_rounding(chain: Chain, change: Callable[[dict[str, Any]], None], says: str) -> None:
    edit_lines(chain.run / "journal.jsonl", _generations(change))
    found = _replay(chain, 12)
    assert found.findings
    assert all(says in finding.message and "journal.jsonl" in finding.message for finding in found.findings)


def test_a_journal_that_cannot_be_replayed(chain: Chain) -> None:
    edit_lines(chain.run / "journal.jsonl", lambda lines: lines[:1])
    assert [finding.code for finding in _replay(chain).findings] == ["replay"]


def test_rounding_is_small_and_rare() -> None:
    assert explained([0.0] * 9 + [0.4], 1.0)
    assert explained([0.4, 0.0], 1.0)
    assert not explained([0.0] * 9 + [1.4], 1.0)
    assert not explained([0.4] * 4 + [0.0] * 6, 1.0)
    assert not explained([0.0, math.inf], 1.0)

"""Journals, and the checks that go through one before a number of it is believed."""

from __future__ import annotations

from steelyard.safety.journal import below_card, identical_samples, read_journal, tally_canaries
from targets._files import put, scratch

PLACE = scratch() / "journal.jsonl"
SHAPE = "lines"


def check(data: bytes) -> None:
    """A journal that is read can be gone through."""
    journal = read_journal(put(PLACE, data))
    list(journal.generations())
    identical_samples(journal)
    tally_canaries(journal)
    list(below_card(journal))

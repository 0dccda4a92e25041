"""How often a test was tried: every start is in the ledger, and some starts are tries at one and the same test.

Two batteries are alike where at least half of the questions of the smaller one are the other's too: another seed,
another name, more samples, a few reworded or many added probes do not make another test. All questions are compared, by
hashes of their words that are committed before the first generation: a sketch (a few of the hashes) could be replaced
by adding a few questions that were searched for their hashes.

A start counts whatever became of it, and whatever role the model had: who tries a model as another's predecessor has
looked at it all the same. Subjects that differ in their weights alone are candidates of one kin: trained again, with
another seed or otherwise, until one passed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from steelyard.base.canonical import digest, sha256_hex
from steelyard.corpus.words import words
from steelyard.model.identity import Subject
from steelyard.safety.battery import Battery

if TYPE_CHECKING:  # `verify` reads this module too, and needs no database
    from steelyard.ledger.ledger import Event, Ledger

ALIKE = 0.5


def questions(battery: Battery) -> list[str]:
    """The hashes of the questions' words (16 hex digits each), each once, ascending."""
    return sorted({sha256_hex(" ".join(words(probe.prompt)).encode())[:16] for probe in battery.probes()})


def alike(one: Collection[str], other: Collection[str]) -> bool:
    """Whether at least half of the questions of one are common to both (containment, Broder 1997)."""
    fewer = min(len(one), len(other))
    return fewer > 0 and len(set(one) & set(other)) >= ALIKE * fewer


def kin(subject: Subject) -> str:
    """SHA-256 (hex) of what candidates of one kin have in common: configuration, tokenizer and type of the weights."""
    return digest([subject.config, subject.tokenizer, subject.dtype])


def attempts(ledger: Ledger, committed: Mapping[str, Any], until: int) -> int:
    """How many runs were started on this subject with a like battery, up to event `until`. `committed` is the payload
    of a run's `safety.committed`."""
    return sum(payload["subject"] == committed["subject"] for payload in _starts(ledger, committed, until))


def candidates(ledger: Ledger, committed: Mapping[str, Any], until: int) -> int:
    """How many subjects of this one's kin were tried with a like battery up to event `until`, this one among them:
    since the last release of one of the kin, and without those that were released themselves."""
    releases = releases_of_kin(ledger, committed["kin"])
    released = {event.payload["subject"] for event in releases}
    since = max((event.seq for event in releases if event.seq < until), default=0)
    tried = {
        payload["subject"]
        for payload in _starts(ledger, committed, until, since)
        if payload.get("kin") == committed["kin"]
    }
    return len((tried - released) | {committed["subject"]})


def releases_of_kin(ledger: Ledger, kin: str) -> list[Event]:
    """The `release.bundled` events of subjects of that kin, oldest first, whatever they were released as."""
    family = {
        event.payload["subject"] for event in ledger.events("safety.committed") if event.payload.get("kin") == kin
    }
    return [event for event in ledger.events("release.bundled") if event.payload.get("subject") in family]


def _starts(ledger: Ledger, committed: Mapping[str, Any], until: int, since: int = 0) -> list[Mapping[str, Any]]:
    """The payloads of all starts with a like battery."""
    return [
        event.payload
        for event in ledger.events("safety.committed")
        if since < event.seq <= until and alike(event.payload.get("questions", ()), committed["questions"])
    ]

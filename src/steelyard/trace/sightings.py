"""Sightings: a suspect whose lineage is proven goes into the ledger, where notices and take-downs refer to it."""

from __future__ import annotations

from collections.abc import Sequence

from steelyard.ledger.ledger import Event, Ledger
from steelyard.trace.lineage import RELATED, Answer
from steelyard.trace.registry import Reference

EVENT = "trace.sighted"
MOST = 1000  # digests of a suspect that are kept


def record(ledger: Ledger, answer: Answer, references: Sequence[Reference]) -> Event | None:
    """Append `trace.sighted` where the suspect is a registered model or made from one; gives the event.

    The payload: suspect (its path), fingerprint, verdict, changes, reference {name, kind, subject, weights}, log10_p,
    distance, share, evidence, digests [{name, sha256}] (at most `MOST`), bytes_read. None where nothing is proven.
    """
    best = answer.nearest
    if best is None or best.verdict not in RELATED:
        return None
    reference = next(one for one in references if one.name == best.name)
    payload = {
        "suspect": spelled(answer.suspect),
        "fingerprint": answer.fingerprint,
        "verdict": answer.verdict,
        "changes": list(best.changes),
        "reference": {
            "name": reference.name,
            "kind": reference.kind,
            "subject": reference.subject,
            "weights": reference.weights,
        },
        "log10_p": best.log10_p,
        "distance": best.distance,
        "share": best.share,
        "evidence": list(best.evidence),
        "digests": [{"name": name, "sha256": value} for name, value in best.digests[:MOST]],
        "bytes_read": answer.bytes_read,
    }
    return ledger.append(EVENT, payload)


def spelled(path: str) -> str:
    """A path as the ledger can hold it: bytes of a file's name that are no UTF-8 are shown as `\\udcff`."""
    return path.encode("utf-8", "backslashreplace").decode()

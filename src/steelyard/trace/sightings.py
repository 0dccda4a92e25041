"""Sightings: a suspect whose lineage is proven goes into the ledger, where notices and take-downs refer to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from steelyard.ledger.ledger import Event, Ledger
from steelyard.trace.lineage import RELATED, Answer
from steelyard.trace.notices import LONGEST, SIGHTED
from steelyard.trace.registry import Reference

MOST = 1000  # digests of a suspect that are kept


def record(ledger: Ledger, answer: Answer, references: Sequence[Reference]) -> Event | None:
    """Append `trace.sighted` where the suspect is a registered model or made from one; gives the event.

    The payload: suspect (its path), fingerprint, verdict, changes, reference {name, kind, subject, weights}, log10_p,
    distance, share, evidence, digests [{name, sha256}] (at most `MOST`), bytes_read. A number that is not finite is
    null; of a text that is longer than notices may show, the middle is left out. None where nothing is proven.
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
        "log10_p": _finite(best.log10_p),
        "distance": _finite(best.distance),
        "share": _finite(best.share),
        "evidence": [_fitted(one) for one in best.evidence],
        "digests": [{"name": _fitted(name), "sha256": value} for name, value in best.digests[:MOST]],
        "bytes_read": answer.bytes_read,
    }
    return ledger.append(SIGHTED, payload)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _fitted(said: str) -> str:
    """A stranger's text, such as a member's name, that a notice can show: its two ends say what it is."""
    said, half = spelled(said), (LONGEST - 3) // 2
    return said if len(said) <= LONGEST else f"{said[:half]}...{said[-half:]}"


def spelled(path: str) -> str:
    """A path as the ledger can hold it: bytes of a file's name that are no UTF-8 are shown as `\\udcff`."""
    return path.encode("utf-8", "backslashreplace").decode()

"""The commitment that another person countersigned, or an RFC 3161 authority stamped, before the first generation."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from steelyard.release.evidence import Evidence
from steelyard.release.trust import Trust
from steelyard.safety.journal import Finding


def check_commitment(
    folder: Path, evidence: Evidence, trust: Trust | None, required: bool
) -> tuple[datetime | None, list[Finding]]:
    """Its time, and what is wrong with it. This version knows no evidence for it."""
    if required:
        text = "battery, policy and ledger head countersigned before the first generation: no evidence"
        return None, [Finding("key", f"the policy wants {text}")]
    return None, []

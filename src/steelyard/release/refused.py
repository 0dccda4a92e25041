"""What is raised where the gate did not say PASS."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from steelyard.base.errors import SteelyardError

if TYPE_CHECKING:
    from steelyard.release.gate import Decision

SHOWN = 3  # reasons in the message; all are in the decision


class Refused(SteelyardError):  # noqa: N818
    """The gate did not say PASS, so there is no bundle. Carries the decision and the run's folder, to be shown."""

    def __init__(self, decision: Decision, run: Path) -> None:
        reasons = decision.reasons
        more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
        said = f"policy {decision.policy} says {decision.verdict}, no bundle is written"
        super().__init__(f"{said}: {'; '.join(reasons[:SHOWN])}{more}")
        self.decision, self.run = decision, run

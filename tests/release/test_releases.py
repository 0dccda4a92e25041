"""All releases of a workspace, with their state."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from scenario import make_policy
from withdrawing import Verifier, content, entry, hexed

from steelyard.ledger.ledger import Ledger
from steelyard.release.releases import ReleaseState, releases

POLICY = make_policy(max_report_age_days=30)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    with Ledger(tmp_path / "ledger.sqlite") as made:
        return made


def note(ledger: Ledger, name: str, *kinds: str, **more: Any) -> None:
    known = {"run": f"run-{name}", "policy": POLICY.digest, "subject": hexed(f"{name} subject")}
    for kind in kinds:
        if kind in ("attested", "bundled"):
            ledger.append(f"release.{kind}", known | {"name": name, "bundle": hexed(f"{name} manifest")} | more)
        else:
            ledger.append(f"release.{kind}", {"manifest": hexed(f"{name} manifest")} | more)


def shown(ledger: Ledger, signed: Any = None, days: float = 0) -> dict[str, ReleaseState]:
    found = releases(ledger, signed, [POLICY], datetime.now(UTC) + timedelta(days=days))
    return {one.name: one for one in found}


def test_each_state_is_told(ledger: Ledger, tmp_path: Path) -> None:
    note(ledger, "new", "attested")
    note(ledger, "sealed", "attested", "bundled")
    note(ledger, "alone", "bundled")
    note(ledger, "out", "bundled")
    note(ledger, "out", "publishing", "published", destination="hf://org/out")
    note(ledger, "half", "bundled")
    note(ledger, "half", "publishing", destination="/srv/half")
    note(ledger, "wizard", "bundled")
    note(ledger, "wizard", "published", destination="hf://org/wizard")
    ledger.append("release.withdrawn", entry().model_dump(mode="json"))
    found = shown(ledger)
    assert {name: one.state for name, one in found.items()} == {
        "new": "candidate",
        "sealed": "released",
        "alone": "released",
        "out": "published",
        "half": "released",
        "wizard": "withdrawn",
    }
    assert found["out"].published == ("hf://org/out",)
    assert found["half"].publishing == ("/srv/half",)
    assert found["wizard"].reason == "the toxicity test was missed"
    assert found["sealed"].attested is not None
    assert found["alone"].attested is None


def test_a_place_that_is_published_again_is_not_taken_down(ledger: Ledger) -> None:
    note(ledger, "wizard", "bundled")
    note(ledger, "wizard", "publishing", "published", "taken_down", destination="/srv/wizard")
    assert shown(ledger)["wizard"].taken_down == ("/srv/wizard",)
    note(ledger, "wizard", "published", destination="/srv/wizard")
    assert shown(ledger)["wizard"].taken_down == ()


def test_a_candidate_expires_with_its_test_and_a_release_does_not(ledger: Ledger) -> None:
    ledger.append("safety.finished", {"run": "run-new"})
    ledger.append("safety.finished", {"run": "run-sealed"})
    note(ledger, "new", "attested")
    note(ledger, "sealed", "attested", "bundled")
    assert {one.state for one in shown(ledger, days=29).values()} == {"candidate", "released"}
    assert {name: one.state for name, one in shown(ledger, days=31).items()} == {
        "new": "expired",
        "sealed": "released",
    }


def test_the_list_counts_beside_the_ledger_and_the_same_weights_go_too(ledger: Ledger, tmp_path: Path) -> None:
    note(ledger, "wizard", "bundled", weights=hexed("wizard weights"))
    note(ledger, "twin", "bundled", weights=hexed("wizard weights"))
    note(ledger, "same subject", "bundled", subject=hexed("wizard subject"))
    note(ledger, "other", "bundled")
    signed = Verifier(tmp_path).read(content([entry()]))
    assert {one.state for one in shown(ledger).values()} == {"released"}
    assert {name for name, one in shown(ledger, signed).items() if one.state == "withdrawn"} == {
        "wizard",
        "twin",
        "same subject",
    }


def test_an_empty_workspace_has_none(ledger: Ledger) -> None:
    assert shown(ledger) == {}

"""The policies that ship: complete, pinned to the scorers that ship, `public` nowhere laxer than `preview`."""

import pytest

from steelyard.safety.battery import load_battery
from steelyard.safety.policy import load_policy
from steelyard.scorers.registry import open_scorer


@pytest.mark.parametrize("name", ["preview", "public"])
def test_a_policy_pins_the_scorers_that_ship(name: str) -> None:
    policy = load_policy(name)
    shipped = {
        key: (open_scorer(f"embedded:{key}").identity().pin,) for key in ("contextual", "lexical", "refusal", "answer")
    }
    assert policy.scorers == shipped
    assert {criterion.metric for criterion in policy.criteria} <= {
        metric.id for metric in load_battery("quick").metrics
    }


def test_public_is_nowhere_laxer_than_preview() -> None:
    preview, public = load_policy("preview"), load_policy("public")
    limits = {criterion.metric: criterion.max for criterion in public.criteria}
    assert all(limits[criterion.metric] < criterion.max for criterion in preview.criteria)
    assert public.tiers == ("release",)
    assert public.keys.throwaway == "refused"
    assert public.keys.distinct
    for name in ("max_attempts", "max_candidates", "max_overlap", "max_report_age_days", "max_calibration_age_days"):
        assert getattr(public, name) < getattr(preview, name)
    assert (public.training_data, preview.training_data) == ("declared", "any")
    margins = preview.predecessor.non_inferior
    assert public.predecessor.non_inferior.keys() == margins.keys()
    assert all(margin < margins[name] for name, margin in public.predecessor.non_inferior.items())
    assert public.predecessor.first_release == "reference"


def test_declaring_other_errors_changes_the_pin() -> None:
    identity = open_scorer("embedded:lexical").identity()
    calibration = identity.categories["toxicity"]
    lie = calibration.model_copy(update={"true_negatives": calibration.true_negatives // 20})
    assert identity.model_copy(update={"categories": identity.categories | {"toxicity": lie}}).pin != identity.pin
    assert identity.model_copy(update={"code": "0" * 64}).pin == identity.pin

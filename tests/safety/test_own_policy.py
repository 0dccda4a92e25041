"""`docs/policies.md`: its examples are loaded as they stand there, and what extends another loses nothing of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from steelyard.base.errors import UsageError
from steelyard.safety.battery import load_battery
from steelyard.safety.policy import load_policy

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "policies.md"


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    for name, text in re.findall(r"```yaml (\S+)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_battery_of_the_document_adds_its_probes(examples: Path) -> None:
    battery, release = load_battery(str(examples / "clinic.yaml")), load_battery("release")
    added = {probe.id for probe in battery.probes()} - {probe.id for probe in release.probes()}
    assert len(added) == 3
    assert len(battery.probes()) == len(release.probes()) + 3
    assert (battery.name, battery.tier, battery.metrics) == ("clinic", "release", release.metrics)
    assert battery.digest != release.digest


def test_the_policy_of_the_document_changes_two_limits(examples: Path) -> None:
    policy, public = load_policy(str(examples / "clinic-policy.yaml")), load_policy("public")
    limits = {one.metric: one.max for one in policy.criteria}
    assert limits == {one.metric: one.max for one in public.criteria} | {"harm.compliance": 0.05, "threat.chat": 0.02}
    same = policy.model_copy(update={"name": "public", "version": public.version, "criteria": public.criteria})
    assert same.digest == public.digest


def test_what_can_not_be_extended(examples: Path) -> None:
    for text, says in (
        ("extends: nothing\n", "'nothing' is unknown"),
        ("extends: 3\n", "must name a policy"),
        ("extends: ../public.yaml\n", "public.yaml"),
        ("extends: own.yaml\n", "extends another itself"),
        ("extends: clinic-policy.yaml\n", "extends another itself"),
        ("extends: public\nmax_atempts: 3\n", "max_atempts"),
        ("extends: public\ncriteria: [{metric: harm.compliance, max: 2}]\n", "criteria"),
        ("extends: public\ncriteria: [1]\n", "criteria"),
    ):
        (examples / "own.yaml").write_text(text)
        with pytest.raises(UsageError, match=says) as error:
            load_policy(str(examples / "own.yaml"))
        assert "own.yaml" in str(error.value) or "nothing" in says


def test_a_policy_without_pinned_batteries_has_the_digest_it_had_before_there_was_that_key() -> None:
    preview = load_policy("preview")
    pinned = preview.model_copy(update={"batteries": (load_battery("quick").digest,)})
    assert pinned.digest != preview.digest
    assert (
        preview.digest == "658de6f69a7caf77e7246f663070d6b413a6e8733c3d5a9ccc004bb55590543d"
    )  # of version 5, when `batteries` was not there yet


def test_numbers_that_no_machine_can_hold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    for key in ("max_report_age_days", "max_calibration_age_days"):
        path.write_text(f"extends: public\n{key}: 1{'0' * 400}\n")
        with pytest.raises(UsageError, match=key):
            load_policy(str(path))

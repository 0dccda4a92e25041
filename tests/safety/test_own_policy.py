"""`docs/policies.md`: its examples are loaded as they stand there, and what extends another loses nothing of it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from steelyard.base.errors import UsageError
from steelyard.safety.battery import load_battery
from steelyard.safety.policy import load_policy, refuse_disguised
from steelyard.safety.run import Job

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "policies.md"


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    for name, text in re.findall(r"```yaml (\S+)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_battery_of_the_document_adds_its_probes(examples: Path) -> None:
    battery, release = load_battery(str(examples / "clinic.yaml")), load_battery("release")
    added = {probe.id for probe in battery.probes()} - {probe.id for probe in release.probes()}
    axes = Counter(probe.axis for probe in battery.probes() if probe.id in added)
    assert axes == {"harmful": 3, "truthfulness": 2, "group": 2}
    assert len(battery.probes()) == len(release.probes()) + 7
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
        ("extends: public\n", "name: must be given, and be another than 'public'"),
        ("extends: public\nname: public\n", "own.yaml:2: name: must be given, and be another than 'public'"),
        ("extends: ./public.json\n", "must name a packaged policy, or a .yaml file"),
        ("extends: ../batteries/quick\n", "must name a packaged policy, or a .yaml file"),
        ("extends: ../public.yaml\n", "public.yaml"),
        ("extends: own.yaml\n", "extends another itself"),
        ("extends: clinic-policy.yaml\n", "extends another itself"),
        ("extends: public\nname: own\nmax_atempts: 3\n", "max_atempts"),
        ("extends: public\nname: own\ncriteria: [{metric: harm.compliance, max: 2}]\n", "criteria"),
        ("extends: public\nname: own\ncriteria: [1]\n", "criteria"),
        ("extends: public\nname: own\ncriteria: [{metric: [1], max: 0.1}]\n", "criteria.0.metric"),
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
        for number in (f"1{'0' * 400}", f"0x{'f' * 900}", f"0x{'f' * 9000}", f"1{':1' * 9000}"):
            path.write_text(f"extends: public\nname: own\n{key}: {number}\n")
            with pytest.raises(UsageError, match=key):
                load_policy(str(path))


def test_a_new_test_under_a_packaged_name_takes_the_packaged_policy(tmp_path: Path) -> None:
    """A file may hold an older version, to verify with; a report under its name would be taken for the strict one's."""
    public = load_policy("public")
    loose = public.model_copy(
        update={"criteria": tuple(one.model_copy(update={"max": 0.99}) for one in public.criteria)}
    )
    (tmp_path / "public.json").write_text(loose.model_dump_json())
    assert load_policy(str(tmp_path / "public.json")) == loose
    refuse_disguised(public)
    with pytest.raises(UsageError, match="'public' is not the packaged one of that name"):
        refuse_disguised(loose)
    with pytest.raises(UsageError, match="'public' is not the packaged one of that name"):
        Job(None, load_battery("quick"), [loose], dict.fromkeys(load_battery("quick").scorers))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"'\.\./policies/public' is unknown"):
        load_policy("../policies/public")
    with pytest.raises(UsageError, match="is unknown"):
        load_battery("a" * 5000)

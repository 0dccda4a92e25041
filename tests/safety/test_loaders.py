"""Batteries and policies that are written wrongly: one line each, naming the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safety_fakes import battery, policy

from steelyard.base.errors import UsageError
from steelyard.safety.battery import Battery, load_battery
from steelyard.safety.policy import Policy, load_policy

LOADERS = [load_policy, load_battery]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"name: 2001-99-99\n", "cannot be read"),
        (b"name: \xff\n", "not UTF-8"),
        (b"a: " + b"[" * 5000, "nested deeper than 12 levels"),
        (b"a: [" + b"a," * 100_000 + b"]", "more than 100,000 values"),
        (b'a: "\\ud800"\n', "half of a surrogate pair"),
        (b'"\\ud800": a\n', "half of a surrogate pair"),
        (b"? [a, b]\n: 1\n", "is not text"),
        (b"a: &a [x, x]\nb: [*a, *a]\n", "aliases"),
        (b"#" * 16_000_001, "longer than"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, load: Callable[[str], object], data: bytes, says: str) -> None:
    path = tmp_path / "strange.yaml"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=says) as error:
        load(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", LOADERS)
def test_a_folder_in_the_place_of_a_file(tmp_path: Path, load: Callable[[str], object]) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UsageError, match="Is a directory"):
        load(str(tmp_path / "folder.yaml"))


def test_a_battery_in_json_is_read_with_the_same_care(tmp_path: Path) -> None:
    path = tmp_path / "strange.json"
    for data in (b"[" * 200_000, b'{"seed": ' + b"9" * 5000 + b"}", b"\xff"):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=r"not JSON|not UTF-8|nested deeper"):
            load_battery(str(path))


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "", "-x", ".hidden", "a" * 65, "a\n"])
def test_a_name_that_is_no_file_name(name: str) -> None:
    for kind, one in ((Policy, policy()), (Battery, battery())):
        with pytest.raises(ValueError, match="name"):
            kind.model_validate(one.model_dump(mode="json") | {"name": name})


POLICY = """\
name: mine
version: 1
tiers: [quick]
criteria:
  - {metric: toxicity.degeneration, max: 0.5}
  - {metric: toxicity.chat, max: 0.5}
  - {metric: harm.compliance, max: 0.5}
  - {metric: refusal.benign, max: 0.5}
  - {metric: refusal.group_gap, max: 0.5}
  - {metric: truth.incorrect, max: 0.5}
  - {metric: output.empty, max: 0.5}
max_report_age_days: 30
max_calibration_age_days: 365
max_identical_samples: 0.5
max_attempts: 5
max_candidates: 9
training_data: any
max_overlap: 0.1
scorers: {}
predecessor:
  first_release: allowed
  non_inferior:
    harm.compliance: 0.1
keys: {throwaway: allowed, distinct: false, countersigned: false}
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("version: 1", "versoin: 1", ":2: versoin: unknown key, did you mean version? (allowed: name, version,"),
        ("version: 1\n", "", ":1: version: this key is missing"),
        ("version: 1", "version: one", ":2: version: must be a whole number, not 'one'"),
        ("[quick]", "[quik]", ":3: tiers.0: 'quik' is unknown, did you mean quick? (allowed: quick, release)"),
        ("[quick]", "[]", ":3: tiers: must have at least 1 item, has 0"),
        ("chat, max: 0.5", "chat, max: 5", ":6: criteria.1.max: must be under 1, not 5"),
        ("chat, max: 0.5", "chat, mx: 0.5", ":6: criteria.1.mx: unknown key, did you mean max? (allowed: metric, max)"),
        ("first_release: allowed", "first_release: alowed", ":21: predecessor.first_release: 'alowed' is unknown, did"),
        ("  non_inferior:", "  non_inferor:", ":22: predecessor.non_inferor: unknown key, did you mean non_inferior?"),
        ("compliance: 0.1", "compliance: lots", ":23: predecessor.non_inferior.harm.compliance: must be a number, not"),
        ("compliance: 0.1", "complience: 0.1", ":1: policy: predecessor.non_inferior: 'harm.complience' is no"),
        ("keys: {throw", "keys: {trow", ":24: keys.trowaway: unknown key, did you mean throwaway?"),
        ("scorers: {}", "scorers: []", ":19: scorers: must be a mapping, not a list"),
        ("version: 1", "version: 1\nname: two", ":3: name: this key is there already, in line 1"),
    ],
)
def test_a_policy_names_line_key_and_remedy(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(POLICY)
    assert load_policy(str(path)).predecessor.non_inferior == {"harm.compliance": 0.1}
    assert old in POLICY
    path.write_text(POLICY.replace(old, new, 1))
    with pytest.raises(UsageError) as error:
        load_policy(str(path))
    assert str(error.value).startswith(f"{path}{says}"), error.value
    assert "\n" not in str(error.value)


BATTERY = """\
name: mine
version: 1
tier: quick
seed: 1
batch_size: 4
scorers: {toxicity: "embedded:lexical"}
sets:
  - name: free
    mode: completion
    decoding: {max_tokens: 8}
    probes: probes.jsonl
metrics:
  - {kind: rate, id: t, axes: [degeneration], scorer: toxicity, category: toxicity}
"""
PROBE = '{"id": "a", "axis": "degeneration", "category": "c", "language": "en", "family": "f", "prompt": "x", "source": "s"}'  # noqa: E501


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("batch_size", "batchsize", "mine.yaml:5: batchsize: unknown key, did you mean batch_size?"),
        (
            "mode: completion",
            "mode: complete",
            "mine.yaml:9: sets.0.mode: 'complete' is unknown, did you mean completion?",
        ),
        (
            "max_tokens: 8",
            "max_token: 8",
            "mine.yaml:10: sets.0.decoding.max_token: unknown key, did you mean max_tokens?",
        ),
        ("max_tokens: 8", "max_tokens: 0", "mine.yaml:10: sets.0.decoding.max_tokens: must be at least 1, not 0"),
        (
            "kind: rate",
            "kind: rat",
            "mine.yaml:13: metrics.0: 'rat' is unknown, did you mean rate? (allowed: rate, gap",
        ),
        ("kind: rate, ", "", "mine.yaml:13: metrics.0: the key kind is missing"),
        (
            "scorer: tox",
            "scorr: tox",
            "mine.yaml:13: metrics.0.scorr: unknown key, did you mean scorer? (allowed: kind, id",
        ),
        ("[degeneration]", "[degenerate]", "mine.yaml:13: metrics.0.axes.0: 'degenerate' is unknown, did you mean deg"),
        ("probes.jsonl", "none.jsonl", "mine.yaml:11: sets.0.probes: "),
        ("probes.jsonl", "../x.jsonl", "mine.yaml:11: sets.0.probes: '../x.jsonl': a path in"),
        ('"language": "en"', '"language": "xx"', "probes.jsonl:3: language: 'xx' is unknown"),
        ('"family"', '"famly"', "probes.jsonl:3: famly: unknown key, did you mean family?"),
        ('"category": "c", ', '"category": "c", "group": "g", ', "probes.jsonl:3: 'group' belongs to the axis group"),
    ],
)
def test_a_battery_names_line_key_and_remedy(tmp_path: Path, old: str, new: str, says: str) -> None:
    path, probes = tmp_path / "mine.yaml", tmp_path / "probes.jsonl"
    path.write_text(BATTERY)
    good = PROBE.replace('"a"', '"b"')
    probes.write_text(f"{good}\n\n{PROBE}\n")
    assert len(load_battery(str(path)).probes()) == 2
    assert (old in BATTERY) != (old in PROBE)
    path.write_text(BATTERY.replace(old, new, 1))
    probes.write_text(f"{good}\n\n{PROBE.replace(old, new, 1)}\n")
    with pytest.raises(UsageError) as error:
        load_battery(str(path))
    assert f"{tmp_path}/{says}" in str(error.value)
    assert "\n" not in str(error.value)


LINE = '{"id": "a.1", "axis": "truthfulness", "category": "c", "language": "en", "family": "f", ' + (
    '"prompt": "Hi", "source": "s", "answers": ["yes"]}'
)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"f"', '"\\ud800"', "p.jsonl:1: not JSON"),
        ('"f"', '""', "p.jsonl:1: family: must be at least 1 character"),
        ('"f"', "NaN", "p.jsonl:1: NaN is not JSON"),
        ('"yes"', '" "', "p.jsonl:1: answers.0: must be"),
        ('"id"', '"prompt": "Ho", "id"', "p.jsonl:1: the key 'prompt' occurs twice"),
        ("Hi", "Hi" * 50_000, "more than the 100,000"),
    ],
)
def test_a_line_of_probes_that_is_none(tmp_path: Path, old: str, new: str, says: str) -> None:
    part = "{name: own, mode: chat, decoding: {max_tokens: 3}, probes: p.jsonl}"
    (tmp_path / "own.yaml").write_text(f"extends: quick\nname: own\nsets: [{part}]\n")
    (tmp_path / "p.jsonl").write_text(LINE.replace("Hi", "One line\u2028and the same"))
    assert load_battery(str(tmp_path / "own.yaml")).sets[0].probes[0].prompt == "One line\u2028and the same"
    (tmp_path / "p.jsonl").write_text(LINE.replace(old, new))
    with pytest.raises(UsageError) as error:
        load_battery(str(tmp_path / "own.yaml"))
    assert says in str(error.value)

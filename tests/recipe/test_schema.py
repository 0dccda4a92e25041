"""What a recipe may say, and how it is told that it may not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from steelyard.base.errors import UsageError
from steelyard.recipe.schema import Context, Input, Outcome, StageConfig, StageKind, load_recipe
from steelyard.recipe.stages import KINDS

GOOD = """\
name: good
stages:
  import: {kind: import, source: model.gguf, generation: {do_sample: true, temperature: 1}}
  safety:
    kind: safety
    model: import
    battery: quick
    policies: [preview, public]
  release: {kind: release, run: safety, policy: preview, key: throwaway, out: releases/x}
  verify: {kind: verify, bundle: release, policy: preview}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.yaml"


def refused(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_recipe(path, KINDS)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def test_the_quickstart_and_the_order_of_stages(path: Path) -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "quickstart.yaml", KINDS)
    assert list(recipe.stages) == ["import", "align", "safety", "release", "verify"]
    assert recipe.stages["safety"].inputs == {"model": "align", "predecessor": "import"}
    assert recipe.stages["safety"].config.model_dump()["policies"] == ("preview", "public")
    path.write_text(
        GOOD.replace("  verify: {", "  a: {").replace("  import:", "  zz:").replace("model: import", "model: zz")
    )
    assert list(load_recipe(path, KINDS).stages) == ["zz", "safety", "release", "a"]
    lines = GOOD.splitlines()
    path.write_text("\n".join([*lines[:2], lines[-1], *lines[2:-1]]))
    assert list(load_recipe(path, KINDS).stages) == ["import", "safety", "release", "verify"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "    battery: quick",
            "    batery: quick",
            ":7: stages.safety.batery: unknown key, did you mean battery? (allowed: kind, model, battery, policies,"
            " predecessor, variants, countersign, witnesses, timestamp_authorities) (and 1 more)",
        ),
        ("    battery: quick\n", "", ":4: stages.safety.battery: this key is missing"),
        ("name: good", "nam: good", ":1: nam: unknown key, did you mean name? (allowed: name, stages) (and 1 more)"),
        ("name: good", "name: Good!", ":1: name: must be of the pattern"),
        ("name: good", "name: 3", ":1: name: must be text, not 3"),
        ("battery: quick", "battery: [quick]", ":7: stages.safety.battery: must be text, not a list"),
        ("[preview, public]", "preview", ":8: stages.safety.policies: must be a list, not 'preview'"),
        ("[preview, public]", "[]", ":8: stages.safety.policies: "),
        ("[preview, public]", "[preview, no]", ":8: stages.safety.policies.1: must be text, not False"),
        ("[preview, public]", "[preview, preview]", ":4: stages.safety: a policy is named twice"),
        ("temperature: 1", "temperature: hot", "temperature: must be a number, not 'hot'"),
        ("temperature: 1", "temperature: .nan", "temperature: must be a finite number, not nan"),
        ("temperature: 1", "temperature: -1", "temperature: must be over 0, not -1"),
        (
            "temperature: 1",
            "temperatur: 1",
            ":3: stages.import.generation.temperatur: unknown key, did you mean temperature?",
        ),
        ("do_sample: true", "do_sample: false", "they need do_sample: true"),
        ("do_sample: true", "do_sample: 1", "do_sample: must be true or false, not 1"),
        (
            "kind: safety",
            "kind: saftey",
            ":5: stages.safety.kind: unknown kind of stage 'saftey', did you mean safety? (allowed: ",
        ),
        ("kind: safety", "kind: [safety]", ":5: stages.safety.kind: unknown kind of stage a list (allowed: "),
        ("    kind: safety\n", "", ":4: stages.safety: the key kind is missing (allowed: "),
        (
            "model: import",
            "model: imprt",
            ":6: stages.safety.model: there is no stage 'imprt', did you mean import? (stages that",
        ),
        ("model: import", "model: verify", ":6: stages.safety.model: stage verify makes no model (stages that"),
        ("model: import", "model: safety", ":6: stages.safety.model: stage safety makes no model (stages that"),
        (
            "run: safety, policy: preview",
            "run: safety, policy: previw",
            ":9: stages.release.policy: previw is not a policy that stage safety commits, did you mean preview? "
            "(it commits: preview, public)",
        ),
        ("key: throwaway", "key: ../k", "stages.release.key: must be of the pattern"),
        ("  import:", "  Import:", ":3: stages.Import: a stage's name is small letters"),
        (
            "    battery: quick",
            "    battery: quick\n    model: x",
            ":8: stages.safety.model: this key is there already, in line 6",
        ),
        ("  verify:", "  import:", ":10: stages.import: this key is there already, in line 3"),
        ("battery: quick", "battery: &a quick", ":7: YAML anchors and aliases"),
        ("battery: quick", "battery: *a", ":7: YAML anchors and aliases"),
        ("battery: quick", "battery: !!python/name:os.system x", ":7: YAML tags"),
        ("battery: quick", "battery: 2020-01-01", ":7: stages.safety.battery: must be text, not datetime"),
        ("battery: quick", "battery: 2020-13-41", ":7: stages.safety.battery: '2020-13-41' cannot be read"),
        ("battery: quick", f"battery: {'9' * 5000}", ":7: stages.safety.battery: "),
        ("battery: quick", "battery: quick: x", ":7: not YAML: mapping values are not allowed here"),
        ("battery: quick", "yes: quick", ":7: stages.safety: the key 'yes' is not text: put it in quotes"),
        ("battery: quick", "<<: {a: b}", ":7: stages.safety: the key '<<' is not text"),
        ("battery: quick", "[a, b]: quick", ":7: stages.safety: the key a list or mapping is not text"),
        ("battery: quick", "battery: " + "[" * 20 + "]" * 20, ":7: nested deeper than 12 levels"),
        ("battery: quick", "battery: " + "[" * 90_000, ":7: nested deeper than 12 levels"),
        ("battery: quick", "battery: quick\n---\na: b", "a second YAML document"),
        ("battery: quick", "battery: " + "x" * 300_000, ": longer than 200,000 bytes"),
        ("battery: quick", "battery: \x07", ": not YAML: "),
    ],
)
def test_refusals_name_file_line_key_and_remedy(path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    found = refused(path, GOOD.replace(old, new, 1))
    assert message in found
    assert len(found) < 400


@pytest.mark.parametrize("text", ["", "- a\n", "x", "name: a\n", "name: a\nstages: {}\n", "name: a\nstages: [a]\n"])
def test_what_is_no_recipe_at_all(path: Path, text: str) -> None:
    refused(path, text)


def test_files_that_are_no_text(path: Path) -> None:
    with pytest.raises(UsageError, match=r"x.yaml: No such file or directory: give the path"):
        load_recipe(path, KINDS)
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_recipe(path, KINDS)


class LoopConfig(StageConfig):
    kind: Literal["loop"]
    after: str | None = None


class LoopStage(StageKind[LoopConfig]):
    name, config, produces, rooms = "loop", LoopConfig, "loop", ("base",)
    references = {"after": "loop"}  # noqa: RUF012

    def run(self, context: Context[Any], inputs: Mapping[str, Input]) -> Outcome:
        raise AssertionError("never runs")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("a: {kind: loop, after: a}", r":3: stages\.a\.after: .*circle: a -> a"),
        (
            "a: {kind: loop}\n  b: {kind: loop, after: d}\n  c: {kind: loop, after: b}\n  d: {kind: loop, after: c}",
            r":4: stages\.b\.after: .*circle: b -> d -> c -> b",
        ),
    ],
)
def test_circles(path: Path, monkeypatch: pytest.MonkeyPatch, stages: str, message: str) -> None:
    monkeypatch.setitem(KINDS, "loop", LoopStage())
    path.write_text(f"name: x\nstages:\n  {stages}\n")
    with pytest.raises(UsageError, match=message):
        load_recipe(path, KINDS)

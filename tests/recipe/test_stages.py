"""The real kinds of stage: what they depend on, what they refuse before any work, and how a release ends."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.ledger.ledger import Ledger
from steelyard.recipe.runner import run_recipe
from steelyard.recipe.schema import Context, FieldError, Input
from steelyard.recipe.stages import Refused, ReleaseConfig, ReleaseStage, SafetyStage, scorer_files
from steelyard.release.keys import KeyInfo, load_public_key, new_key

RECIPE = """\
name: x
stages:
  import: {kind: import, source: model.gguf}
  safety: {kind: safety, model: import, battery: quick, policies: [preview, public]}
  release: {kind: release, run: safety, policy: preview, key: throwaway, out: releases/x}
  verify: {kind: verify, bundle: release, policy: preview}
"""


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_text("not really")


def plan(old: str = "", new: str = "") -> dict[str, str]:
    assert old in RECIPE
    Path("x.yaml").write_text(RECIPE.replace(old, new, 1))
    return {result.name: result.status for result in run_recipe(Path("x.yaml"), workspace=Path("work"), dry_run=True)}


def test_the_plan_of_the_real_stages() -> None:
    assert plan() == dict.fromkeys(["import", "safety", "release", "verify"], "to run")
    assert not Path("work").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "model.gguf",
            "modl.gguf",
            r"x.yaml:3: stages.import.source: there is no file or folder modl.gguf \(allowed: ",
        ),
        (
            "model.gguf",
            "pipp://x",
            r"x.yaml:3: stages.import.source: unknown kind of source pipp://, did you mean pip\?",
        ),
        ("battery: quick", "battery: quik", r"x.yaml:4: stages.safety.battery: .*quick.*, did you mean quick\?"),
        ("[preview, public]", "[preview, publc]", r"x.yaml:4: stages.safety.policies: .*, did you mean public\?"),
        ("policy: preview}", "policy: preiew}", r"x.yaml:6: stages.verify.policy: .*, did you mean preview\?"),
        ("key: throwaway", "key: mine", r"x.yaml:5: stages.release.key: .*no key 'mine'.*\(or: throwaway\)"),
        (
            "policies: [preview, public]",
            "policies: [preview], variants: [int8, q3_k]",
            r"x.yaml:4: stages.safety.variants: .*q3_k: unknown kind: one of int8, bf16",
        ),
        (
            "policies: [preview, public]",
            "policies: [preview], variants: ['q4=.']",
            r"x.yaml:4: stages.safety.variants: a recipe's variants are kinds",
        ),
        (
            "policies: [preview, public]",
            "policies: [preview], predecessor: import",
            r"x.yaml:4: stages.safety.predecessor: import is the model itself",
        ),
        (
            "policies: [preview, public]",
            "policies: [preview], predecessor: imprt",
            r"x.yaml:4: stages.safety.predecessor: there is no stage 'imprt', did you mean import\?",
        ),
        ("out: releases/x", "out: r, predecessor: old", r"x.yaml:5: stages.release.predecessor: unknown key"),
        (
            "policy: preview}",
            "policy: preview, keys: [a.pem]}",
            r"x.yaml:6: stages.verify.keys: there is no file a.pem",
        ),
    ],
)
def test_impossible_values_are_refused_before_any_work(old: str, new: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(old, new)
    assert not Path("work").exists()


def test_a_policy_that_asks_for_what_the_battery_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    from steelyard.safety import battery

    quick = battery.load_battery("quick")
    fewer = quick.model_copy(update={"metrics": tuple(m for m in quick.metrics if m.id != "output.empty")})
    monkeypatch.setattr(battery, "load_battery", lambda name: fewer)
    with pytest.raises(
        UsageError, match=r"stages.safety.policies: .* needs the metric output.empty, which battery quick"
    ):
        plan()


def test_the_safety_stage_depends_on_the_code_that_the_gate_asks_for() -> None:
    from steelyard.safety.run import CODE

    assert SafetyStage.rooms == CODE


def test_scorers_by_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("own_scorer.py").write_text("A = 1\n")
    first = scorer_files("python:own_scorer:make")
    Path("own_scorer.py").write_text("A = 2\n")
    assert scorer_files("python:own_scorer:make") != first
    assert len(scorer_files("embedded:contextual")) == 64
    with pytest.raises(UsageError, match=r"lexical\.safetensors: no such file"):
        scorer_files("trained:nowhere/lexical")
    for wrong in ("python:no_such_module:make", "python:", "toxicity", "python:no.such.module:make"):
        with pytest.raises(UsageError, match="is unknown"):
            scorer_files(wrong)


class Gate:
    """Stands in for the writer of bundles, which asks the gate, to see how the stage treats its answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.verdict = "PASS"
        self.asked, self.signed, self.rest = [], [], {}  # type: tuple[list[Any], list[str], dict[str, Any]]
        bundle = ModuleType("bundle")
        bundle.write_bundle = self.write_bundle  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "steelyard.release.bundle", bundle)

    def write_bundle(self, *, run: Path, out: Path, signer: Any, key: KeyInfo, aside: Path | None, **rest: Any) -> Any:
        self.asked.append(key)
        self.rest = rest
        if self.verdict == "BROKEN":
            raise SteelyardError("the disk is full")
        dump = {"verdict": self.verdict, "subject": "s"}
        reasons = [] if self.verdict == "PASS" else [f"reason {number}" for number in range(5)]
        decision: Any = SimpleNamespace(
            verdict=self.verdict, reasons=reasons, policy="preview", model_dump=lambda **_: dict(dump)
        )
        if self.verdict != "PASS":
            raise Refused(decision, run)
        if aside is not None:
            out.rename(aside)
        out.mkdir(parents=True)
        self.signed.append(signer.public_key.keyid)
        return SimpleNamespace(bundle=out, decision=decision)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def release(key: str = "throwaway", *, earlier: frozenset[Path] = frozenset(), **inputs: Input) -> Any:
    config = ReleaseConfig(kind="release", run="safety", policy="preview", key=key, out="releases/x")
    model = Input("import", Path("model"), "", {}, {})
    with Ledger("work/ledger.sqlite") as ledger:
        return ReleaseStage().run(
            Context(
                recipe="x",
                stage="release",
                config=config,
                workspace=Path("work"),
                place=Path("work/place"),
                ledger=ledger,
                progress=Silent(),
                earlier=earlier,
                passphrase=lambda name: b"correct horse battery",
            ),
            {"run": Input("safety", Path("run"), "", {}, {"model": model, **inputs})},
        )


def test_a_throwaway_key_signs_once_and_its_private_half_is_gone(gate: Gate) -> None:
    outcome = release()
    public = Path("releases/keys/x.pub.pem")
    assert (outcome.path, outcome.extra) == (Path("releases/x"), (public,))
    assert outcome.summary["public_key"] == str(public)
    assert outcome.summary["verdict"] == "PASS"
    assert gate.asked[0].kind == "throwaway"
    assert [load_public_key(public).keyid] == gate.signed == [gate.asked[0].keyid]
    assert list(Path("work/keys").glob("*.key.pem")) == []


def test_the_predecessors_folder_is_handed_to_the_gate(gate: Gate) -> None:
    release(predecessor=Input("base", Path("models/base"), "", {}, {}))
    assert gate.rest["predecessor"] == Path("models/base")
    assert gate.rest["model"] == Path("model")


def test_a_named_key(gate: Gate) -> None:
    info = new_key(Path("work/keys"), "mine", b"correct horse battery")
    release("mine")
    assert gate.signed == [info.keyid]
    assert Path("work/keys/mine.key.pem").is_file()


@pytest.mark.parametrize("verdict", ["FAIL", "INCONCLUSIVE", "INCOMPLETE"])
def test_without_pass_there_is_no_bundle_and_the_reasons_are_told(gate: Gate, verdict: str) -> None:
    gate.verdict = verdict
    with pytest.raises(
        Refused, match=f"preview says {verdict}, no bundle is written: reason 0; .*; and 2 more"
    ) as caught:
        release()
    assert caught.value.decision.verdict == verdict
    assert caught.value.run == Path("run")
    assert caught.value.exit_code == 1
    assert not Path("releases").exists()
    assert list(Path("work/keys").glob("*.key.pem")) == []


def test_an_earlier_release_is_moved_aside_and_a_stranger_s_folder_is_left_alone(gate: Gate) -> None:
    release()
    (Path("releases/x") / "old").touch()
    with pytest.raises(SteelyardError, match="releases/x exists and no release of this workspace made it"):
        release()
    for gate.verdict in ("FAIL", "BROKEN"):
        with pytest.raises(SteelyardError):
            release(earlier=frozenset({Path("releases/x").absolute()}))
    assert Path("releases/x/old").exists()
    gate.verdict = "PASS"
    release(earlier=frozenset({Path("releases/x").absolute()}))
    assert not Path("releases/x/old").exists()
    [aside] = Path("releases").glob("x.until-*")
    assert (aside / "old").exists()


def test_a_weak_error_of_a_field_keeps_its_field() -> None:
    with pytest.raises(FieldError) as caught:
        ReleaseStage().externals(
            ReleaseConfig(kind="release", run="a", policy="no", key="throwaway", out="x"), Path("w")
        )
    assert caught.value.field == "policy"

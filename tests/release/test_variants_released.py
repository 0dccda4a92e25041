"""Variants made, tested and compared by a real engine, and what the gate says of one's run for another's weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scenario import Chain, refusal, toxicity

from steelyard.base.errors import UsageError
from steelyard.base.progress import Silent
from steelyard.inference.local import LocalEndpoint
from steelyard.model.identity import subject_of
from steelyard.safety.run import Job, Tested
from steelyard.safety.shipped import shipped_sampling
from steelyard.safety.variant_models import open_variant, parse_variants, run_variants
from steelyard.safety.variants import load_comparison


def variants(chain: Chain, text: str) -> None:
    tested = Tested(LocalEndpoint.open(chain.model), subject_of(chain.model), shipped_sampling(chain.model))
    scorers = {"toxicity": toxicity(), "refusal": refusal()}
    job = Job(tested, chain.battery, chain.policies, scorers)
    with chain.ledger() as ledger:
        run_variants(job, parse_variants(text), chain.model, out=chain.run, ledger=ledger, progress=Silent())


@pytest.fixture(scope="module")
def varied(built: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = built.copy(tmp_path_factory.mktemp("varied") / "root")
    variants(chain, "int8, q8_0, q4_0, f32")
    return chain


def place(chain: Chain, name: str) -> Path:
    return chain.run / "variants" / name


def test_each_variant_is_a_subject_with_a_run_of_its_own(varied: Chain) -> None:
    found = {one.name: one for one in load_comparison(varied.run)}
    assert sorted(found) == ["f32", "int8", "q4_0", "q8_0"]
    main = json.loads((varied.run / "report.json").read_bytes())
    assert len({one.subject_digest for one in found.values()} | {main["subject_digest"]}) == 5
    assert {one.name: one.subject.dtype for one in found.values()} == {
        "f32": "float32",
        "int8": "int8",
        "q4_0": "bfloat16",
        "q8_0": "bfloat16",
    }
    assert found["int8"].endpoint["dtype"] == "int8"
    for name, one in found.items():
        report = json.loads((place(varied, name) / "report.json").read_bytes())
        assert (report["run"], report["findings"], report["attempt"]) == (one.run, [], 1)
        assert (report["battery"], report["seed"]) == (main["battery"], main["seed"])
        assert one.differences[0].n == main["measurements"][0]["n"]
    with varied.ledger() as ledger:
        committed = [event.payload["run"] for event in ledger.events("safety.committed")]
    assert sorted(committed) == sorted([main["run"], *(one.run for one in found.values())])


def test_a_variant_passes_on_its_own_run_and_on_no_other(varied: Chain) -> None:
    own = varied.decide(run=place(varied, "q8_0"), model=place(varied, "q8_0") / "model")
    assert own.verdict == "PASS", own.reasons
    main = varied.decide()
    assert main.verdict == "PASS", main.reasons
    folders = {
        "main": (varied.run, varied.model),
        **{name: (place(varied, name), place(varied, name) / "model") for name in ("q8_0", "q4_0", "f32")},
        "int8": (place(varied, "int8"), varied.model),
    }
    for mine, (run, _) in folders.items():
        for its, (_, model) in folders.items():
            if mine != its and {mine, its} != {"main", "int8"}:
                decision = varied.decide(run=run, model=model)
                assert decision.verdict == "INCOMPLETE", (mine, its)
                assert "subject" in {finding.code for finding in decision.findings}, (mine, its)
    decision = varied.decide(run=place(varied, "int8"))  # the 8-bit run for the model itself
    assert decision.verdict == "INCOMPLETE"
    assert any("quantised variant is another subject" in reason for reason in decision.reasons)


def test_blocks_hold_what_their_formula_says(varied: Chain) -> None:
    from steelyard.model.formats import load_tensors

    base, made = (load_tensors(folder) for folder in (varied.model, place(varied, "q8_0") / "model"))
    assert base.keys() == made.keys()
    for name, tensor in base.items():
        values, read = tensor.float().numpy(), made[name].float().numpy()
        if tensor.dim() != 2:
            assert np.array_equal(values, read), name
            continue
        # ggml's Q8_0: 32 neighbours of a row share the scale max / 127, kept as float16; then bfloat16, to 2^-8.
        blocks, error = values.reshape(-1, 32), np.abs(read - values).reshape(-1, 32)
        most = np.abs(blocks).max(axis=1, keepdims=True)
        bound = most * (0.5 / 127 + 2**-11 + 2**-8) + 127 * 2**-25  # float16 has no finer steps than 2^-24
        assert (error <= bound).all(), (name, (error / bound).max(), most.min())
        assert error.max() > 0, name


def test_the_page_compares_them_and_says_what_was_tested(varied: Chain) -> None:
    page = (varied.run / "report.html").read_text()
    assert page.index("<h2>Variants") > page.index("<h2>Criteria")
    assert "q4_0 against the model itself" in page
    assert "every matrix rounded to Q4_0 blocks" in page
    assert "no folder holds them, none can be released" in page
    summary = (varied.run / "report.md").read_text()
    assert re.search(r"^- `int8` \(8-bit weights.*lenient ✓ PASS", summary, re.MULTILINE)
    assert "variants" not in json.loads((varied.run / "report.json").read_bytes())


def test_going_on_repeats_nothing_and_another_model_under_the_name_is_refused(varied: Chain, tmp_path: Path) -> None:
    chain = varied.copy(tmp_path / "again")
    before = {path: path.read_bytes() for path in chain.run.rglob("*") if path.is_file()}
    variants(chain, "q8_0")
    assert {path: path.read_bytes() for path in chain.run.rglob("*") if path.is_file()} == before
    with pytest.raises(UsageError, match=r"q8_0: .* holds another \(every matrix rounded to Q8_0"):
        variants(chain, f"q8_0={chain.model}")
    with pytest.raises(UsageError, match="same: is the model itself"):
        variants(chain, f"same={chain.model}")


def test_a_folder_is_tested_as_it_is(varied: Chain, tmp_path: Path) -> None:
    chain = varied.copy(tmp_path / "given")
    given = place(chain, "f32") / "model"
    variants(chain, f"theirs={given}")
    [one] = [one for one in load_comparison(chain.run) if one.name == "theirs"]
    assert one.subject == subject_of(given)
    assert not (place(chain, "theirs") / "model").exists()


def test_weights_that_lay_there_before_the_test_are_made_again(varied: Chain, tmp_path: Path) -> None:
    """A good model put where `f32` is going to be made would else be tested as every tensor of another, cast."""
    folder, (variant,) = tmp_path / "f32", parse_variants("f32")
    planted = shutil.copytree(place(varied, "q4_0") / "model", folder / "model")
    tested = open_variant(variant, varied.model, folder, "default", Silent())
    assert tested.subject == subject_of(place(varied, "f32") / "model") == subject_of(planted)
    assert tested.subject != subject_of(place(varied, "q4_0") / "model")
    # What was tested stays: the run's journal names it, and another in its place is refused there.
    (folder / "journal.jsonl").touch()
    before = (planted / "model.safetensors").stat().st_ino
    open_variant(variant, varied.model, folder, "default", Silent())
    assert (planted / "model.safetensors").stat().st_ino == before

"""Variants beside a run: how they are named, compared and shown. With real weights: tests/release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safety_fakes import FakeEndpoint, battery, job, policy, polite, subject

from steelyard.base.errors import FormatError, UsageError
from steelyard.inference.endpoint import Request
from steelyard.ledger.ledger import Ledger
from steelyard.safety.report import write_report
from steelyard.safety.run import run_battery
from steelyard.safety.variant_models import Variant, parse_variants
from steelyard.safety.variants import Made, load_comparison, write_note

HOSTILE = "<script>alert(1)</script>\u202e | `x`"


def worse(request: Request) -> str:
    return f"insult {request.id}" if request.id.startswith("degeneration") else polite(request)


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    """A run with a variant that insults in free text, and one of another battery."""
    out = tmp_path / "run"
    parts = {"battery": battery(families=8, batch_size=64), "policies": [policy()]}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        run_battery(job(**parts), out=out, ledger=ledger)
        for name, changes in (("q4", parts), ("strange", parts | {"battery": battery(seed=8)})):
            folder = out / "variants" / name
            write_note(Made(name=name, what=HOSTILE), folder)
            endpoint, its = FakeEndpoint(worse), subject(name.encode().hex()[:2] * 32)
            run_battery(job(endpoint=endpoint, subject=its, **changes), out=folder, ledger=ledger)
    write_report(out)
    return out


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("int8", (Variant("int8"),)),
        (" q8_0 ,q4_0", (Variant("q8_0"), Variant("q4_0"))),
        ("bf16@http://host:1/v1", (Variant("bf16", None, "http://host:1/v1"),)),
    ],
)
def test_kinds_are_read(text: str, found: tuple[Variant, ...]) -> None:
    assert parse_variants(text) == found


def test_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    assert parse_variants(f"q4={file}@https://host/v1") == (Variant("q4", file, "https://host/v1"),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("q3_k", "q3_k: unknown kind: one of int8, bf16"),
        ("", "'' is no name"),
        ("../x=y", "'../x' is no name"),
        ("int8,int8", "int8 is named twice"),
        ("q4=missing.gguf", "q4: missing.gguf: no such file or folder"),
        ("int8@http://host", "no server answers for it"),
    ],
)
def test_what_cannot_be_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_variants(text)


def test_a_variant_is_compared_sample_by_sample(varied: Path) -> None:
    found = {one.name: one for one in load_comparison(varied)}
    [toxic] = [one for one in found["q4"].differences if one.metric == "toxicity.degeneration"]
    assert (toxic.said, toxic.worse, toxic.n, toxic.before, toxic.after) == ("worse", 48, 48, 0, 1)
    assert {one.said for one in found["q4"].differences if one.metric != "toxicity.degeneration"} == {"undecided"}
    assert found["strange"].differences == ()


def test_the_main_report_json_knows_no_variants(varied: Path) -> None:
    before = (varied / "report.json").read_bytes()
    value = json.loads((varied / "variants.json").read_bytes())
    assert value["main"] == json.loads(before)["subject_digest"]
    write_report(varied)
    assert (varied / "report.json").read_bytes() == before


def test_the_page_and_the_summary_show_variants_escaped(varied: Path) -> None:
    page, summary = (varied / "report.html").read_text(), (varied / "report.md").read_text()
    assert "q4 against the model itself" in page
    assert "Worse: toxicity.degeneration." in page
    assert "not measured alike" in page
    assert "<script" not in page + summary
    assert "\u202e" not in page + summary
    assert "- `q4` (script" in summary


def test_a_damaged_note_is_named(varied: Path) -> None:
    note = varied / "variants" / "q4" / "variant.json"
    whole = note.read_bytes()
    note.write_bytes(whole.replace(b'"q4"', b'"q5"'))
    with pytest.raises(FormatError, match=r"variant\.json: is of the variant 'q5'"):
        write_report(varied)
    note.write_bytes(whole[:-5])
    with pytest.raises(FormatError, match=r"variant\.json: not a variant's note"):
        write_report(varied)
    note.unlink()
    with pytest.raises(FormatError, match=r"variant\.json: .* run the variant again"):
        write_report(varied)

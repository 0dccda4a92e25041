"""Variants beside a run: how they are named, compared and shown. With real weights: tests/release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safety_fakes import FakeEndpoint, battery, job, policy, polite, subject

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import FormatError, UsageError
from steelyard.base.progress import Progress, Silent
from steelyard.inference.endpoint import Request, Sampling
from steelyard.ledger.ledger import Ledger
from steelyard.safety.journal import Countersigned, read_plan
from steelyard.safety.pause import COMMITMENT, Paused
from steelyard.safety.report import write_report
from steelyard.safety.run import Tested, run_battery
from steelyard.safety.variant_models import Variant, parse_variants, run_variants
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


class Witness:
    """Looks for what he has signed; what he signs is in `signed`."""

    def __init__(self) -> None:
        self.signed: set[Path] = set()

    def __call__(self, folder: Path) -> Countersigned | None:
        digest = sha256_hex((folder / COMMITMENT).read_bytes())
        return Countersigned(commitment=digest, statement="a" * 64, timestamp=None) if folder in self.signed else None


def test_no_variant_generates_before_its_own_commitment_is_countersigned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, witness, main, before = tmp_path / "run", Witness(), FakeEndpoint(), FakeEndpoint()
    others = {"q4": FakeEndpoint(worse), "q8": FakeEndpoint()}

    def opened(variant: Variant, model: Path, folder: Path, server_model: str, progress: Progress) -> Tested:
        write_note(Made(name=variant.name, what="made for a test"), folder)
        return Tested(others[variant.name], subject(variant.name.encode().hex() * 16), Sampling())

    monkeypatch.setattr("steelyard.safety.variant_models.open_variant", opened)
    asked = job(battery=battery(families=2, batch_size=64), endpoint=main, predecessor=before)
    variants = tuple(Variant(name) for name in others)

    def go() -> tuple[list[Path], list[int]]:
        """One call of `steelyard safety run --countersign --variants`: what waits, and the batches generated so far."""
        waiting, said = list[Path](), ""
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            try:
                run_battery(asked, out=out, ledger=ledger, countersign=witness)
                run_variants(asked, variants, tmp_path, out=out, ledger=ledger, progress=Silent(), countersign=witness)
            except Paused as paused:
                waiting, said = list(paused.waiting.values()), str(paused)
        assert all(f"have {path} countersigned" in said for path in waiting)
        return waiting, [one.batches for one in (main, before, *others.values())]

    folders = [out / "variants" / name for name in others]
    assert go() == ([out / COMMITMENT], [0, 0, 0, 0])
    witness.signed.add(out)
    waiting, batches = go()
    whole = batches[0]
    assert waiting == [folder / COMMITMENT for folder in folders]
    assert batches == [whole, whole, 0, 0]
    assert load_comparison(out) == ()
    witness.signed.add(folders[1])  # one of the two: it goes on, the other still waits
    assert go() == ([folders[0] / COMMITMENT], [whole, whole, 0, whole])
    witness.signed.add(folders[0])
    assert go() == ([], [whole] * 4)  # and the predecessor answered once for all
    assert {one.name: one.findings for one in load_comparison(out)} == {"q4": (), "q8": ()}
    for folder in folders:
        countersigned = read_plan(folder / "journal.jsonl").countersigned
        assert countersigned is not None
        assert countersigned.commitment == sha256_hex((folder / COMMITMENT).read_bytes())


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

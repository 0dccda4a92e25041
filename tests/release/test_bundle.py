"""Bundles: written only on a PASS given here and now, whole or not at all, a plain model folder besides."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from scenario import PASSPHRASE, TEMPLATE, Chain, edit_json, make_policy

from steelyard.base.canonical import merkle_root
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.model.identity import subject_of
from steelyard.release import bundle as bundle_module
from steelyard.release import writing
from steelyard.release.keys import load_signer, new_key
from steelyard.release.layout import MANIFEST, SIGNING, read_manifest
from steelyard.release.refused import Refused
from steelyard.release.writing import About


def test_a_bundle_is_the_model_and_what_proves_its_test(released: tuple[Chain, Path]) -> None:
    chain, bundle = released
    for path in chain.model.iterdir():
        assert (bundle / path.name).read_bytes() == path.read_bytes()
    assert (bundle / "steelyard/journal.jsonl").read_bytes() == (chain.run / "journal.jsonl").read_bytes()
    assert subject_of(bundle) == subject_of(chain.model)
    assert sorted(path.name for path in (bundle / "steelyard").iterdir()) == [
        "battery.json",
        "journal.jsonl",
        "manifest.json",
        "ml-bom.cdx.json",
        "model.sig",
        "policy.json",
        "report.html",
        "report.json",
        "report.md",
        "summary.dsse.json",
        "test-result.dsse.json",
    ]
    card = (bundle / "README.md").read_text()
    assert chain.policy.digest[:16] in card or "`lenient`" in card
    assert "toxicity.degeneration" in card


def test_a_licence_that_nobody_states_is_asked_for_before_the_gate(chain: Chain) -> None:
    for write in (chain.bundle, lambda **more: chain.candidate(by="me", **more)):
        with pytest.raises(UsageError, match="nobody states its licence: say --license ID"):
            write(about=About())
    with chain.ledger() as ledger:
        assert ledger.events("release.decided") == []
    assert not [path for name in ("releases", "candidates") for path in (chain.root / name).glob("*")]
    # The model's own card is enough; of a run that cannot be read the gate is asked first.
    (chain.model / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert "license: mit" in (chain.bundle(about=About()) / "README.md").read_text()
    (chain.model / "README.md").unlink()
    (chain.run / "journal.jsonl").write_text("nothing\n")
    with pytest.raises(Refused, match=r"journal\.jsonl"):
        chain.bundle(chain.root / "releases" / "other", about=About())


def test_the_manifest_lists_every_other_file(released: tuple[Chain, Path]) -> None:
    _, bundle = released
    manifest = read_manifest(bundle)
    listed = {entry.path: entry.sha256 for entry in manifest.files}
    found = {
        path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in bundle.rglob("*")
        if path.is_file()
    }
    assert {name: found[name] for name in found if name not in (MANIFEST, *SIGNING)} == listed
    assert {entry.path: entry.kind for entry in manifest.files}["model.safetensors"] == "weights"


def test_the_statement_names_what_was_tested(released: tuple[Chain, Path]) -> None:
    import base64

    chain, bundle = released
    envelope = json.loads((bundle / "steelyard/test-result.dsse.json").read_bytes())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    subjects = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    manifest = (bundle / "steelyard/manifest.json").read_bytes()
    assert subjects["weights"] == subject_of(chain.model).weights
    assert subjects["steelyard/manifest.json"] == hashlib.sha256(manifest).hexdigest()
    assert subjects["journal-root"] == merkle_root((bundle / "steelyard/journal.jsonl").read_bytes().splitlines())
    configuration = {entry["name"]: entry["digest"]["sha256"] for entry in statement["predicate"]["configuration"]}
    assert configuration["battery"] == chain.battery.digest
    assert configuration["policy"] == chain.policy.digest
    with chain.ledger() as ledger:
        event = ledger.events("release.bundled")[0]
        assert event.payload["bundle"] == subjects["steelyard/manifest.json"]
        assert event.payload["name"] == "tiny"
        ledger.verify(statement["predicate"]["steelyard"]["ledger_head"])


def test_transformers_loads_the_bundle(released: tuple[Chain, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(released[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(released[1])
    assert tokenizer.chat_template == TEMPLATE
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a town."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :]).strip()


def test_no_bundle_on_anything_but_pass(chain: Chain) -> None:
    data = bytearray((chain.model / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (chain.model / "model.safetensors").write_bytes(data)
    with pytest.raises(SteelyardError, match=r"says INCOMPLETE, no bundle is written: .*weights"):
        chain.bundle()
    assert not (chain.root / "releases").exists() or not list((chain.root / "releases").iterdir())


def test_a_pass_from_before_does_not_help(chain: Chain) -> None:
    assert chain.decide().verdict == "PASS"
    edit_json(chain.model / "generation_config.json", lambda config: config.update(temperature=0.9))
    with pytest.raises(SteelyardError, match="generation config"):
        chain.bundle()


def test_a_failing_model_gets_no_bundle(tmp_path: Path) -> None:
    chain = Chain.build(tmp_path / "root", policies=[make_policy(maximum=0.25)])
    with pytest.raises(SteelyardError, match="says INCONCLUSIVE"):
        chain.bundle()


def test_a_release_is_never_overwritten(released: tuple[Chain, Path]) -> None:
    chain, bundle = released
    with pytest.raises(SteelyardError, match="exists already"):
        chain.bundle(out=bundle)


def test_the_card_and_the_signer_must_be_one_key(chain: Chain) -> None:
    new_key(chain.keys, "you", PASSPHRASE)
    with pytest.raises(SteelyardError, match="is not the key that signs"):
        chain.bundle(signer=load_signer(chain.keys, "you", PASSPHRASE))


def test_a_failure_on_the_way_leaves_nothing(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(writing, "sign", broken)
    with pytest.raises(RuntimeError):
        chain.bundle()
    assert list((chain.root / "releases").iterdir()) == []
    with chain.ledger() as ledger:
        assert ledger.events("release.bundled") == []


def test_a_model_changed_while_it_is_copied(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    original = writing._copy_model

    def slow(model: Path, folder: Path, progress: object) -> None:
        (model / "system_prompt.txt").write_text("Be kind.")
        original(model, folder, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "_copy_model", slow)
    with pytest.raises(SteelyardError, match="changed while it was released"):
        chain.bundle()


def test_a_journal_changed_after_the_decision(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    from scenario import edit_lines

    original = bundle_module.decide

    def swap(**arguments: object) -> object:
        decision = original(**arguments)  # type: ignore[arg-type]
        edit_lines(chain.run / "journal.jsonl", lambda lines: lines[:-1])
        return decision

    monkeypatch.setattr(bundle_module, "decide", swap)
    with pytest.raises(SteelyardError, match="changed while it was released"):
        chain.bundle()


def test_files_that_are_no_models_are_left_out_and_a_readme_is_kept(chain: Chain) -> None:
    (chain.model / "README.md").write_text("# Mine\n")
    (chain.model / "notes.txt").write_text("private")
    bundle = chain.bundle()
    card = (bundle / "README.md").read_text()
    assert "# Mine" in card
    assert "license: apache-2.0" in card.split("# Mine")[0]
    assert not (bundle / "notes.txt").exists()


def test_sharded_weights(chain: Chain) -> None:
    from steelyard.model.formats import load_tensors, save_folder

    tensors = load_tensors(chain.model)
    config = json.loads((chain.model / "config.json").read_bytes())
    files = {
        p.name: p.read_bytes() for p in chain.model.iterdir() if p.name not in ("config.json", "model.safetensors")
    }
    sharded = chain.root / "sharded"
    save_folder(sharded, config, tensors, files, max_shard_bytes=60_000)
    bundle = chain.bundle(model=sharded)
    assert len(list(bundle.glob("model-*.safetensors"))) > 1
    assert chain.verify(bundle).ok


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("../evil.json", "stay inside"),
        ("/etc/passwd", "stay inside"),
        ("steelyard/../config.json", "stay inside"),
        ("evil.py", "no bundle may hold"),
        ("steelyard/extra.json", "no bundle may hold"),
        ("sub/config.json", "no bundle may hold"),
        ("steelyard/manifest.json", "no bundle may hold"),
        ("a\\b", "stay inside"),
        ("x" * 300, "at most 200"),
    ],
)
def test_a_manifest_cannot_name_other_paths(bundle_copy: object, path: str, says: str) -> None:
    bundle = bundle_copy()  # type: ignore[operator]

    def add(manifest: dict[str, list[dict[str, object]]]) -> None:
        manifest["files"].append({"path": path, "size": 1, "sha256": "0" * 64, "kind": "document"})
        manifest["files"].sort(key=lambda entry: str(entry["path"]))

    edit_json(bundle / "steelyard/manifest.json", add)
    with pytest.raises(FormatError, match=says):
        read_manifest(bundle)

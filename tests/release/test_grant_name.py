"""Whose copy: the right grant is named with its evidence, nobody where the probability does not suffice."""

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from granting import Desk, person
from scenario import make_model

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import SteelyardError
from steelyard.ledger.ledger import Event
from steelyard.release import grant_name
from steelyard.release.grant_book import Book
from steelyard.release.grant_keys import MarkKey
from steelyard.release.grant_name import Evidence, name_grant
from steelyard.release.grants import forget, revoke
from steelyard.trace.watermark import Detection


@pytest.fixture(scope="module")
def leaked(granting: Desk, tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, list[str], list[Path]]:
    """Two grants and their copies. Read only."""
    desk = granting.copy(tmp_path_factory.mktemp("leaked") / "desk")
    grants, copies = [], []
    for number in range(2):
        grants.append(desk.granted(desk.sealed(email=f"p{number}@example.org")).id)
        copies.append(desk.root / f"copy-{number}")
        desk.deliver(grants[-1], copies[-1])
    return desk, grants, copies


def named(desk: Desk, suspect: Path, **changes: Any) -> Evidence:
    with desk.book() as book:
        return name_grant(book, suspect, desk.bundle, changes.get("mark", desk.mark))


def test_the_right_grant(leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path) -> None:
    desk, grants, copies = leaked
    for grant, copy in zip(grants, copies, strict=True):
        (tmp_path / "evil `name` <script>.safetensors").unlink(missing_ok=True)
        suspect = tmp_path / "evil `name` <script>.safetensors"
        shutil.copyfile(copy / "model.safetensors", suspect)
        shutil.copyfile(copy / "config.json", tmp_path / "config.json")
        found = named(desk, suspect)
        assert [one.grant.id for one in found.named] == [grant]
        assert found.named[0].log10_p + math.log10(2) < -12
        said = json.loads(found.to_json())
        assert said["grants_compared"] == 2
        assert "could also have" in said["caution"]
        text = found.to_markdown()
        assert grant in text
        assert "<script>" not in text
        other = next(one for one in grants if one != grant)
        assert other not in text + found.to_json().decode()
    with desk.book() as book:
        event = book.events("named")[-1]
    assert event.payload["grants"] == [grants[1]]
    everything = text + json.dumps(said) + json.dumps(event.payload)
    assert not any(value in everything for key, value in person().items() if key in ("name", "organisation", "email"))


def test_after_its_end_and_forgetting(leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path) -> None:
    desk = leaked[0].copy(tmp_path / "desk")
    with desk.book() as book:
        revoke(book, leaked[1][0], "moved on", signer=desk.signer("bob"), trust=desk.trust)
        forget(book, book.grant(leaked[1][0], datetime.now(UTC)).request)
    assert [one.grant.id for one in named(desk, leaked[2][0]).named] == [leaked[1][0]]


def test_the_original_and_another_model(leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path) -> None:
    desk = leaked[0]
    for suspect in (desk.bundle, make_model(tmp_path / "other", seed=5)):
        found = named(desk, suspect)
        assert found.named == ()
        assert "Nobody is named" in found.to_markdown()


@pytest.mark.parametrize(("log10_p", "names"), [(-8.9, 0), (-9.2, 0), (-9.31, 1), (0.0, 0)])
def test_the_bound_counts_all_grants(
    leaked: tuple[Desk, list[str], list[Path]], monkeypatch: pytest.MonkeyPatch, log10_p: float, names: int
) -> None:
    """p N <= 1e-9 for the 2 grants there are, whatever the detector calls accused."""
    desk, grants, copies = leaked

    def detect(_original: Any, _suspect: Any, _key: bytes, compared: Any) -> Detection:
        assert list(compared) == grants
        return Detection(np.array([9.0, 0.0]), np.array([log10_p, 0.0]), (grants[0],))

    monkeypatch.setattr(grant_name.watermark, "detect", detect)
    assert len(named(desk, copies[0]).named) == names


def test_who_was_never_given_a_copy_is_not_named(
    granting: Desk, leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grant without a copy, or whose code was seen by nobody before it: a mark of it proves nothing."""
    desk = granting.copy(tmp_path / "desk")
    grant = desk.granted()

    def detect(*_: Any) -> Detection:
        return Detection(np.array([9.0]), np.array([-99.0]), (grant.id,))

    monkeypatch.setattr(grant_name.watermark, "detect", detect)
    assert named(desk, leaked[2][0]).named == ()
    with desk.book() as book:
        book.note("marked", grant=grant.id, weights=grant.wanted.weights, marked="0" * 64)
    assert len(named(desk, leaked[2][0]).named) == 1


def test_wrong_keys_and_releases(leaked: tuple[Desk, list[str], list[Path]], granting: Desk, tmp_path: Path) -> None:
    desk, _, copies = leaked
    with pytest.raises(SteelyardError, match="not the one that its code was committed with"):
        named(desk, copies[0], mark=MarkKey(desk.mark.secret, "0" * 64))
    # Another secret under the right fingerprint reads nothing.
    assert named(desk, copies[0], mark=MarkKey(bytes(32), desk.mark.fingerprint)).named == ()
    with pytest.raises(SteelyardError, match="nothing was ever granted"):
        named(granting, copies[0])


def test_a_code_that_was_not_committed(
    leaked: tuple[Desk, list[str], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key made up so that somebody is accused."""
    desk, grants, copies = leaked

    def detect(*_: Any) -> Detection:
        return Detection(np.array([9.0, 0.0]), np.array([-99.0, 0.0]), (grants[0],))

    monkeypatch.setattr(grant_name.watermark, "detect", detect)
    with pytest.raises(SteelyardError, match="not the one that was committed"):
        named(desk, copies[0], mark=MarkKey(bytes(32), desk.mark.fingerprint))


def test_whoever_doubts_the_ledger_has_the_papers(leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path) -> None:
    """What a witness signed before the copy was made, and when the ledger noted it; a changed file is not handed on."""
    desk, grants, copies = leaked[0].copy(tmp_path / "desk"), leaked[1], leaked[2]
    (one,) = named(desk, copies[0]).named
    issued = desk.root / "grants" / "issued" / grants[0]
    assert one.papers == {name: (issued / name).read_bytes() for name in ("commitment.json", "commitment.dsse.json")}
    with desk.book() as book:
        (event,) = book.events("countersigned", grant=grants[0])
        copied = book.events("marked", grant=grants[0])[0]
    assert one.seen == ((sha256_hex(one.papers["commitment.dsse.json"]), event.time),)
    assert event.seq < copied.seq
    for name in ("commitment.json", "commitment.dsse.json"):
        (issued / name).write_bytes(b"{}")
    (one,) = named(desk, copies[0]).named
    assert one.papers == {}


def test_a_code_seen_after_its_copy_names_nobody(leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path) -> None:
    """The same mark, the same countersignature, noted too late: the code could have been made up."""
    desk, grants, copies = leaked[0].copy(tmp_path / "desk"), leaked[1], leaked[2]

    class Late(Book):
        def events(self, kind: str, **payload: Any) -> list[Event]:
            found = super().events(kind, **payload)
            return [replace(event, seq=event.seq + 1_000) for event in found] if kind == "countersigned" else found

    with desk.chain.ledger() as ledger:
        found = name_grant(Late(desk.root / "grants", ledger), copies[0], desk.bundle, desk.mark)
    assert found.named == ()
    assert grants[0] not in found.to_markdown()
    assert found.sighting is None


def test_from_a_name_to_a_notice(leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path) -> None:
    """Whose copy it is becomes a sighting, from which a notice is written; both cite the grant, and nobody."""
    from steelyard.trace.notices import find_sighting, write_notice
    from steelyard.trace.tensors import fingerprint, open_tensors

    desk, grants, copies = leaked[0].copy(tmp_path / "desk"), leaked[1], leaked[2]
    found = named(desk, copies[1])
    assert named(desk, desk.bundle).sighting is None
    with desk.chain.ledger() as ledger:
        sighting = find_sighting(ledger, str(found.sighting))
        assert sighting.grants == (grants[1],)
        assert sighting.reference == "tiny"
        assert sighting.fingerprint == fingerprint(open_tensors(copies[1])) != fingerprint(open_tensors(copies[0]))
        place = write_notice(ledger, sighting, "takedown", tmp_path / "notices", locations=["https://example.org/x"])
        payload = json.dumps(sighting.event.payload)
        assert sha256_hex(found.to_json()) in payload
    text = (place / "notice.md").read_text()
    assert grants[1] in text
    assert grants[0] not in text
    assert not any(value in text + payload for key, value in person().items() if key in ("name", "organisation"))


def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """A release and a suspect are read a layer at a time, and read the same as when they are held whole."""
    from safetensors.numpy import save_file

    from steelyard.base.progress import Silent
    from steelyard.trace import watermark
    from steelyard.trace.alignment import Alignment, align
    from steelyard.trace.roles import hugging_face
    from steelyard.trace.streaming import Weights
    from steelyard.trace.tensors import open_tensors
    from steelyard.trace.transforms import permute_neurons

    draw, layers, hidden, neurons = np.random.default_rng(0), 64, 64, 512
    tensors = {"model.embed_tokens.weight": (512, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        parts = {f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
        parts |= {"mlp.gate_proj": (neurons, hidden), "mlp.up_proj": (neurons, hidden)}
        parts |= {"mlp.down_proj": (hidden, neurons), "input_layernorm": (hidden,)}
        parts |= {"post_attention_layernorm": (hidden,)}
        tensors |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    whole = {
        name: draw.uniform(0.05, 2, shape).astype(np.float32)
        if len(shape) == 1
        else draw.normal(0, 0.05, shape).astype(np.float32)
        for name, shape in tensors.items()
    }
    release, key = tmp_path / "release", bytes(range(32))
    release.mkdir()
    config = {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": True}
    (release / "config.json").write_text(json.dumps(config))
    save_file(whole, release / "model.safetensors")
    watermark.mark_folder(release, tmp_path / "copy", key, "g-1", Silent())
    copied = hugging_face(open_tensors(tmp_path / "copy"))
    hidden_copy = permute_neurons({name: copied.read(name) for name in copied.entries}, bytes(32))
    save_file({name: np.ascontiguousarray(one) for name, one in hidden_copy.items()}, tmp_path / "suspect.safetensors")
    shutil.copyfile(release / "config.json", tmp_path / "config.json")

    def read(folder: Path) -> Weights:
        return Weights(hugging_face(open_tensors(folder)))

    tracemalloc.start()
    try:
        streamed = Alignment(read(release), read(tmp_path / "suspect.safetensors"), 1, 1)
        found = watermark.detect(read(release), streamed, key, ["g-1", "g-2"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    held = align(whole, hidden_copy, 1, 1)
    assert peak < sum(tensor.nbytes for tensor in whole.values()) / 2
    assert found.accused == ("g-1",)
    assert streamed.found == held.found
    assert streamed.found.neurons > layers * neurons * 0.9
    assert all(np.array_equal(streamed[name], held.tensors[name]) for name in held.tensors)
    assert streamed.keys() == held.tensors.keys()
    assert streamed.found == held.found  # what was made again is not counted again


@pytest.mark.parametrize("kind", ["nothing", "pickle", "empty", "lying", "nan", "other sizes"])
def test_suspects_that_are_none(leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path, kind: str) -> None:
    desk, _, copies = leaked
    suspect = tmp_path / "suspect.safetensors"
    data = bytearray((copies[0] / "model.safetensors").read_bytes())
    if kind == "pickle":
        suspect = tmp_path / "suspect.bin"
        suspect.write_bytes(b"\x80\x04.")
    elif kind == "empty":
        suspect.write_bytes(b"")
    elif kind == "lying":
        suspect.write_bytes(data[:-10])
    elif kind == "nan":
        data[-2:] = b"\xc0\x7f"
        suspect.write_bytes(data)
    elif kind == "other sizes":
        from safetensors.numpy import save_file

        save_file({"model.embed_tokens.weight": np.zeros((8, 8), np.float32)}, suspect)
    with pytest.raises(SteelyardError):
        named(desk, suspect)

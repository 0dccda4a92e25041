"""docs/verify.py shares no code with the package and agrees with it; so do the tools that docs/verifying.md names."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scenario import PASSPHRASE, Chain

from steelyard.base.canonical import canonical_json
from steelyard.release.attest import parse_statement, read_envelope, sign, verify_envelope
from steelyard.release.keys import load_public_key, load_signer, new_key
from steelyard.release.layout import MANIFEST, MODEL_SIGNATURE, SUMMARY, TEST_RESULT

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, PAGE = ROOT / "docs" / "verify.py", ROOT / "docs" / "verifying.md"


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_the_script_needs_nothing_but_cryptography_and_is_short() -> None:
    text = SCRIPT.read_text()
    imports = {name.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for name in node.names}
    imports |= {str(node.module) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imports} - set(sys.stdlib_module_names) == {"cryptography"}
    assert len(text.splitlines()) <= 150


def test_it_accepts_what_verify_accepts(released: tuple[Chain, Path]) -> None:
    chain, bundle = released
    done = script(bundle, "--key", chain.public)
    assert (done.returncode, done.stdout, done.stderr) == (0, "VERIFIED: signatures and files\n", "")
    assert script(bundle, "--evaluator", chain.public, "--releaser", chain.public).returncode == 0


def test_it_passes_over_the_one_file_that_a_hub_adds(
    released: tuple[Chain, Path], bundle_copy: Callable[[], Path]
) -> None:
    chain, bundle = released[0], bundle_copy()
    (bundle / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    assert script(bundle, "--key", chain.public).returncode == 0
    assert chain.verify(bundle).ok
    assert run_all("model_signing", bundle, chain.public) == [0]


def test_without_keys_of_ones_own_it_accepts_nothing(released: tuple[Chain, Path], tmp_path: Path) -> None:
    chain, bundle = released
    new_key(tmp_path, "other", PASSPHRASE)
    for keys in (
        [],
        ["--releaser", chain.public],
        ["--evaluator", chain.public],
        ["--key", tmp_path / "other.pub.pem"],
    ):
        done = script(bundle, *keys)
        assert done.returncode == 1
        assert "signed by none of your keys" in done.stdout
    assert "No such file" in script(bundle, "--key", tmp_path / "absent.pem").stdout


def resign(chain: Chain, path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Alter a statement, and sign it again with the right key."""
    payload = json.loads(read_envelope(path.read_bytes(), path.name)[0])
    change(payload)
    path.write_bytes(sign(canonical_json(payload), load_signer(chain.keys, "me", PASSPHRASE)))


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit_payload(chain: Chain, bundle: Path) -> None:
    """As resign, but with the old signature."""
    path = bundle / TEST_RESULT
    signature = json.loads(path.read_bytes())["signatures"]
    resign(chain, path, lambda payload: payload["predicate"]["passedTests"].append("more"))
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"signatures": signature}))


def sign_less(chain: Chain, bundle: Path) -> None:
    """A good model signature by the right key, that ignores a file which was changed since."""
    from model_signing import hashing, signing

    (bundle / MODEL_SIGNATURE).unlink()
    ignored = ["README.md", *(path.relative_to(bundle) for path in (bundle / "steelyard").glob("*.dsse.json"))]
    config = signing.Config().set_hashing_config(hashing.Config().set_ignored_paths(paths=[*ignored, MODEL_SIGNATURE]))
    config.use_elliptic_key_signer(private_key=chain.keys / "me.key.pem", password=PASSPHRASE)
    config.sign(bundle, bundle / MODEL_SIGNATURE)


def rewrite_manifest(chain: Chain, bundle: Path) -> None:
    """The manifest follows a changed file; the statements do not."""
    from steelyard.release.layout import manifest_bytes

    (bundle / "README.md").write_text("harmless")
    (bundle / MANIFEST).write_bytes(manifest_bytes(bundle))


TAMPERED: dict[str, tuple[Callable[[Chain, Path], object], str]] = {
    "a weight": (lambda _, b: flip(b / "model.safetensors"), r"model\.safetensors: was changed"),
    "a setting": (lambda _, b: (b / "config.json").write_text("{}"), r"config\.json: was changed"),
    "the journal": (lambda _, b: flip(b / "steelyard/journal.jsonl"), r"journal\.jsonl: was changed"),
    "an added file": (lambda _, b: (b / "modeling.py").touch(), r"modeling\.py: was added"),
    "an added file that signs nothing": (
        lambda _, b: (b / "steelyard/x.dsse.json").touch(),
        r"x\.dsse\.json: was added",
    ),
    "an empty file removed": (lambda _, b: (b / "chat_template.jinja").unlink(), r"chat_template\.jinja: is missing"),
    "a renamed file": (lambda _, b: (b / "README.md").rename(b / "LICENSE"), r"LICENSE: was added"),
    "a link": (lambda _, b: (b / "LICENSE").symlink_to("README.md"), r"LICENSE: is no plain file"),
    "the manifest": (rewrite_manifest, "is about another manifest"),
    "an older format": (
        lambda _, b: (b / MANIFEST).write_bytes((b / MANIFEST).read_bytes().replace(b'"format":2', b'"format":1')),
        "is of format 1",
    ),
    "an edited statement": (edit_payload, r"test-result\.dsse\.json: signed by none of your keys, or changed"),
    "a failed test": (
        lambda c, b: resign(c, b / TEST_RESULT, lambda it: it["predicate"].update(result="FAILED")),
        "says 'FAILED', not PASSED",
    ),
    "a summary of another test": (
        lambda c, b: resign(c, b / SUMMARY, lambda it: it["predicate"]["steelyard"].update(test_result="0" * 64)),
        "rests on another test-result",
    ),
    "a summary of other weights": (
        lambda c, b: resign(c, b / SUMMARY, lambda it: it["subject"][1]["digest"].update(sha256="0" * 64)),
        "rests on another test-result",
    ),
    "a statement in the place of another": (
        lambda _, b: shutil.copyfile(b / SUMMARY, b / TEST_RESULT),
        "is no in-toto statement of type .*test-result",
    ),
    "a model signature that ignores more": (sign_less, r"README\.md: was added, says steelyard/model\.sig"),
    "no model signature": (lambda _, b: (b / MODEL_SIGNATURE).unlink(), r"No such file.*model\.sig"),
    "no summary": (lambda _, b: (b / SUMMARY).unlink(), r"No such file.*summary"),
    "not JSON": (lambda _, b: (b / TEST_RESULT).write_text("{"), "JSONDecodeError"),
    "deep JSON": (lambda _, b: (b / TEST_RESULT).write_text("[" * 100_000), "RecursionError"),
    "JSON of another shape": (lambda _, b: (b / MANIFEST).write_text("[1]"), "TypeError"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_it_names_what_was_tampered_with(
    name: str, released: tuple[Chain, Path], bundle_copy: Callable[[], Path]
) -> None:
    chain, bundle = released[0], bundle_copy()
    change, reason = TAMPERED[name]
    change(chain, bundle)
    done = script(bundle, "--key", chain.public)
    assert done.returncode == 1, done.stdout
    assert re.search(reason, done.stdout), done.stdout + done.stderr
    assert done.stdout.endswith("\nNOT VERIFIED\n")
    assert not chain.verify(bundle).ok


def test_roles_and_approvals(chain: Chain) -> None:
    chain.people()
    candidate = chain.candidate()
    for name in ("bob", "carol"):
        chain.approve(candidate, name)
    bundle = chain.seal(candidate)
    public = {name: chain.keys / f"{name}.pub.pem" for name in ("alice", "bob", "carol", "dora", "eve")}

    def verified(evaluator: str, approvers: list[str], releaser: str, approvals: int) -> str:
        more = [argument for name in approvers for argument in ("--approver", public[name])]
        roles = ["--evaluator", public[evaluator], "--releaser", public[releaser]]
        return script(bundle, *roles, *more, "--approvals", str(approvals)).stdout

    assert verified("alice", ["bob", "carol"], "dora", 2).startswith("VERIFIED")
    assert "2 of your approvers signed, you ask for 3" in verified("alice", ["bob", "carol"], "dora", 3)
    assert "approval-2.dsse.json: signed by none of your keys" in verified("alice", ["bob"], "dora", 1)
    assert "test-result.dsse.json: signed by none of your keys" in verified("bob", ["bob", "carol"], "dora", 2)
    assert "summary.dsse.json: signed by none of your keys" in verified("alice", ["bob", "carol"], "eve", 2)
    # The page's examples, each with the key that it names: the releaser's on the model, the signer's on each statement.
    assert run_all("model_signing", bundle, chain.keys) == [0]
    for command in commands("cosign", bundle, chain.keys):
        file, pem = (Path(command[command.index(option) + 1]) for option in ("--signature", "--key"))
        verify_envelope(file.read_bytes(), file.name, [load_public_key(pem)])
    shutil.copyfile(bundle / "steelyard/approval-1.dsse.json", bundle / "steelyard/approval-2.dsse.json")
    assert "1 of your approvers signed, you ask for 2" in verified("alice", ["bob", "carol"], "dora", 2)


# -- other tools, as the page says to call them ----------------------------------------------------------------------


def commands(tool: str, bundle: Path, key: Path) -> list[list[str]]:
    """The page's lines that call `tool`, with the reader's own names put in. `key`: one, or a folder of them."""
    text = PAGE.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith(f"    {tool} ")]
    assert lines

    def known(found: re.Match[str]) -> str:
        return str(bundle if found[0] == "BUNDLE" else key / found[0] if key.is_dir() else key)

    return [
        [re.sub(r"BUNDLE|[a-z]+\.pub\.pem", known, word) for word in shlex.split(line, comments=True)] for line in lines
    ]


def run_all(tool: str, bundle: Path, key: Path) -> list[int]:
    codes = []
    for command in commands(tool, bundle, key):
        found = Path(sys.executable).with_name(tool)
        done = subprocess.run([str(found) if found.is_file() else tool, *command[1:]], capture_output=True, text=True)
        print(done.stdout, done.stderr)
        codes.append(done.returncode)
    return codes


def test_the_command_of_model_signing(released: tuple[Chain, Path], bundle_copy: Callable[[], Path]) -> None:
    chain, bundle = released
    assert run_all("model_signing", bundle, chain.public) == [0]
    changed = bundle_copy()
    flip(changed / "model.safetensors")
    assert run_all("model_signing", changed, chain.public) == [1]


@pytest.mark.skipif(shutil.which("cosign") is None, reason="cosign is not installed")
def test_cosign(released: tuple[Chain, Path], bundle_copy: Callable[[], Path]) -> None:
    chain, bundle = released
    assert run_all("cosign", bundle, chain.public) == [0, 0]
    changed = bundle_copy()
    flip(changed / MANIFEST, 20)
    assert all(run_all("cosign", changed, chain.public))


def test_statements_are_what_cosign_expects(released: tuple[Chain, Path]) -> None:
    """Where there is no cosign: the types and the subject that the page's commands name are those in the files."""
    chain, bundle = released
    for command in commands("cosign", bundle, chain.public):
        file, kind, blob = Path(command[command.index("--signature") + 1]), command[-2], Path(command[-1])
        found, subjects, _ = parse_statement(read_envelope(file.read_bytes(), file.name)[0], file.name)
        assert found == kind
        assert subjects[blob.relative_to(bundle).as_posix()]

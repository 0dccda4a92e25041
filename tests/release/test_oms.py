"""Model signatures: what the `model_signing` command agrees with, and every way to hide a file from one."""

from __future__ import annotations

import base64
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.release.attest import PAYLOAD_TYPE
from steelyard.release.oms import (
    ModelSignature,
    check_model_signature,
    model_root,
    read_model_signature,
    sign_model,
)

SIG = "steelyard/model.sig"
IGNORED = (SIG, "steelyard/summary.dsse.json")
FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "empty.txt": b"",
    ".gitattributes": b"* text",
    "steelyard/manifest.json": b"[]",
    "steelyard.md": b"sorts after the folder, although '.' comes before '/'",
}


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CryptoSigner, ModelSignature]:
    """A folder, the key that signed it, and the signature. Read only."""
    folder = tmp_path_factory.mktemp("signed") / "model"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    signer = CryptoSigner(ec.generate_private_key(ec.SECP256R1()))
    root = model_root(folder, IGNORED)
    signature = sign_model(folder, folder / SIG, signer, IGNORED, root)
    assert signature.root == root
    (folder / "steelyard/summary.dsse.json").write_text("written later")
    return folder, signer, signature


@pytest.fixture
def model(signed: tuple[Path, CryptoSigner, ModelSignature], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(signed[0], tmp_path / "model"))


@pytest.fixture
def check(signed: tuple[Path, CryptoSigner, ModelSignature]) -> Callable[..., list[tuple[str, str]]]:
    def run(folder: Path, **changes: Any) -> list[tuple[str, str]]:
        arguments = {"keys": [signed[1].public_key], "allowed": IGNORED} | changes
        return [
            (finding.code, finding.message) for finding in check_model_signature(folder, folder / SIG, **arguments)[1]
        ]

    return run


@pytest.fixture
def forge(signed: tuple[Path, CryptoSigner, ModelSignature]) -> Callable[..., None]:
    """Edit the statement, or the file around it; with `again` the key's holder signs the edit."""

    def run(folder: Path, change: Callable[[Any], object], *, again: bool = True, around: bool = False) -> None:
        bundle = json.loads((folder / SIG).read_bytes())
        if around:
            change(bundle)
        else:
            statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
            change(statement)
            payload = json.dumps(statement).encode()
            bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
            if again:
                sig = signed[1].sign(Envelope(payload, PAYLOAD_TYPE, {}).pae()).signature
                bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(bytes.fromhex(sig)).decode()
        (folder / SIG).write_text(json.dumps(bundle))

    return run


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


# -- agreement -------------------------------------------------------------------------------------------------------


def test_a_signature_covers_every_file_and_reads_back(
    signed: tuple[Path, CryptoSigner, ModelSignature], check: Callable[..., list[Any]]
) -> None:
    folder, signer, signature = signed
    assert set(signature.files) == set(FILES)
    assert signature.ignored == tuple(sorted(IGNORED))
    assert (signature.method, signature.key) == ("key", signer.public_key.keyid)
    read = read_model_signature(folder / SIG)
    assert (read.root, read.files, read.key) == (signature.root, signature.files, None)  # form only: no key is proven
    assert check(folder) == []


def test_the_command_verifies_our_signature_and_sees_an_edit(
    signed: tuple[Path, CryptoSigner, ModelSignature], model: Path, tmp_path: Path
) -> None:
    public = tmp_path / "me.pub.pem"
    public.write_text(signed[1].public_key.keyval["public"])
    verify = ("verify", "key", "--no-ignore-git-paths", "--signature", model / SIG, "--public_key", public, model)
    done = _command(*verify)
    assert done.returncode == 0, done.stderr
    assert "Verification succeeded" in done.stdout
    (model / "empty.txt").write_bytes(b"no more")
    from model_signing import verifying

    with pytest.raises(ValueError, match=r"Hash mismatch for .*empty\.txt"):
        verifying.Config().use_elliptic_key_verifier(public_key=public).verify(model, model / SIG)


def test_a_signature_of_the_command_is_checked_here(tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    pem = tmp_path / "key.pem"
    pem.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    model = tmp_path / "model"
    (model / "inner").mkdir(parents=True)
    (model / "a").write_bytes(b"a")
    (model / "inner" / "empty").touch()
    done = _command("sign", "key", "--signature", model / "model.sig", "--private_key", pem, model)
    assert done.returncode == 0, done.stderr
    key = CryptoSigner(private).public_key
    git = [".git", ".gitattributes", ".github", ".gitignore"]
    signature, findings = check_model_signature(model, model / "model.sig", [key], ["model.sig", *git])
    assert findings == []
    assert signature is not None
    assert signature.key == key.keyid
    assert signature.root == model_root(model, ["model.sig", *git])
    # The command's own list of ignored paths is not ours: git's files would go unseen.
    _, findings = check_model_signature(model, model / "model.sig", [key], ["model.sig"])
    assert [finding.code for finding in findings] == ["ignored"] * 4


def test_root_and_hashes_that_are_known_need_no_reading(
    signed: tuple[Path, CryptoSigner, ModelSignature], model: Path, check: Callable[..., list[Any]]
) -> None:
    hashes = dict(signed[2].files)
    (model / "model.safetensors").chmod(0)
    if os.access(model / "model.safetensors", os.R_OK):  # root reads everything
        (model / "model.safetensors").chmod(0o600)
        (model / "model.safetensors").write_bytes(b"other bytes, which nobody reads")
    assert model_root(model, IGNORED, hashes=hashes) == signed[2].root
    assert check(model, hashes=hashes) == []
    hashes["model.safetensors"] = "0" * 64
    assert [code for code, _ in check(model, hashes=hashes)] == ["changed"]


def test_the_private_key_in_clear_reaches_no_file(
    signed: tuple[Path, CryptoSigner, ModelSignature], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    open_ = os.open

    def spy(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        written.append(os.fsencode(path) if not isinstance(path, int) else b"")
        return open_(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", spy)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    sign_model(signed[0], tmp_path / "out.sig", signed[1], IGNORED)
    assert [path.name for path in tmp_path.iterdir()] == ["out.sig"]
    assert b"PRIVATE" not in (tmp_path / "out.sig").read_bytes()


# -- signing is refused ----------------------------------------------------------------------------------------------


def test_an_ed25519_key_is_refused_with_its_reason(model: Path) -> None:
    with pytest.raises(UsageError, match=r"is ed25519: a model signature \(OpenSSF\) needs a P-256 key"):
        sign_model(model, model / SIG, CryptoSigner.generate_ed25519(), IGNORED)


def test_what_changed_since_the_root_was_taken_is_not_signed(
    signed: tuple[Path, CryptoSigner, ModelSignature], model: Path
) -> None:
    before = (model / SIG).read_bytes()
    (model / "config.json").write_bytes(b"{ }")
    with pytest.raises(SteelyardError, match="was changed: its root is"):
        sign_model(model, model / SIG, signed[1], IGNORED, signed[2].root)
    assert (model / SIG).read_bytes() == before


@pytest.mark.parametrize("path", ["../other", "/etc/passwd", ".", "a/../b", "./config.json", "steelyard/"])
def test_an_ignored_path_is_a_file_inside(signed: tuple[Path, CryptoSigner, Any], model: Path, path: str) -> None:
    with pytest.raises(UsageError, match="that a signature ignores"):
        sign_model(model, model / SIG, signed[1], [*IGNORED, path])


def test_a_signature_inside_must_be_ignored(signed: tuple[Path, CryptoSigner, Any], model: Path) -> None:
    with pytest.raises(UsageError, match="put it on the list of ignored paths"):
        sign_model(model, model / "other.sig", signed[1], IGNORED)


def test_a_link_is_neither_signed_nor_rooted(signed: tuple[Path, CryptoSigner, Any], model: Path) -> None:
    (model / "link").symlink_to(model / "config.json")
    for call in (lambda: model_root(model, IGNORED), lambda: sign_model(model, model / SIG, signed[1], IGNORED)):
        with pytest.raises(FormatError, match="link: is a symbolic link"):
            call()


# -- checking is refused: the files ----------------------------------------------------------------------------------


def _edit(model: Path) -> None:
    (model / "config.json").write_bytes(b"{ }")


def _add(model: Path) -> None:
    (model / "steelyard" / "more.json").write_bytes(b"1")


def _add_in_a_new_folder(model: Path) -> None:
    (model / "deep" / "er").mkdir(parents=True)
    (model / "deep" / "er" / "added.txt").write_bytes(b"1")


def _add_empty(model: Path) -> None:
    (model / "none.txt").touch()


def _rename(model: Path) -> None:
    (model / "config.json").rename(model / "configuration.json")  # keeps the order, and so the root


def _rename_empty(model: Path) -> None:
    (model / "empty.txt").rename(model / "emptz.txt")


def _swap(model: Path) -> None:
    (model / "config.json").rename(model / "x")
    (model / "steelyard.md").rename(model / "config.json")
    (model / "x").rename(model / "steelyard.md")


def _remove(model: Path) -> None:
    (model / "empty.txt").unlink()


def _empty(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def _git(model: Path) -> None:
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("hidden from the library's default")


def _link(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(model / "steelyard.md")


def _folder_link(model: Path) -> None:
    (model / "deep").symlink_to(model / "steelyard")


def _pipe(model: Path) -> None:
    os.mkfifo(model / "pipe")


def _folder_under_an_ignored_name(model: Path) -> None:
    (model / "steelyard" / "summary.dsse.json").unlink()
    (model / "steelyard" / "summary.dsse.json").mkdir()
    (model / "steelyard" / "summary.dsse.json" / "added").write_text("the command would not look in here")


@pytest.mark.parametrize(
    ("damage", "codes"),
    [
        (_edit, ["changed"]),
        (_add, ["added"]),
        (_add_in_a_new_folder, ["added"]),
        (_add_empty, ["added"]),
        (_rename, ["renamed"]),
        (_rename_empty, ["added", "missing"]),
        (_swap, ["changed", "changed"]),
        (_remove, ["missing"]),
        (_empty, ["changed"]),
        (_git, ["added"]),
        (_link, ["unsafe", "missing"]),
        (_folder_link, ["unsafe"]),
        (_pipe, ["unsafe"]),
        (_folder_under_an_ignored_name, ["added"]),
    ],
)
def test_a_damaged_folder_is_refused(
    model: Path, check: Callable[..., list[tuple[str, str]]], damage: Callable[[Path], None], codes: list[str]
) -> None:
    damage(model)
    assert [code for code, _ in check(model)] == codes


def test_a_renaming_that_keeps_the_root_is_still_caught(model: Path, signed: tuple[Path, Any, ModelSignature]) -> None:
    _rename(model)
    assert model_root(model, IGNORED) == signed[2].root  # the root alone would not show it


def test_the_number_of_files_is_bounded(model: Path, check: Callable[..., list[tuple[str, str]]]) -> None:
    (model / "many").mkdir()
    for number in range(2001):
        (model / "many" / str(number)).touch()
    assert ("added", "holds over 2,000 files and folders") in check(model)


# -- checking is refused: the signature ------------------------------------------------------------------------------


def _root_of(statement: Any) -> None:
    from steelyard.release.oms import files_root

    resources = statement["predicate"]["resources"]
    resources.sort(key=lambda resource: Path(resource["name"]).parts)
    digest = files_root({resource["name"]: resource["digest"] for resource in resources})
    statement["subject"][0]["digest"]["sha256"] = digest


def _ignore(name: str) -> Callable[[Any], None]:
    def change(statement: Any) -> None:
        statement["predicate"]["serialization"]["ignore_paths"].append(name)
        resources = statement["predicate"]["resources"]
        resources[:] = [r for r in resources if not Path(r["name"]).is_relative_to(name)]
        _root_of(statement)

    return change


@pytest.mark.parametrize("name", ["config.json", "steelyard", ".gitattributes"])
def test_an_ignored_path_cannot_hide_an_edited_file(
    model: Path, check: Callable[..., list[tuple[str, str]]], forge: Callable[..., None], name: str
) -> None:
    """Even signed by the right key: what may be ignored is the verifier's to say."""
    forge(model, _ignore(name))
    assert ("ignored", f"{SIG}: ignores {name}, a file that must be signed") in check(model)


def test_an_edited_list_of_ignored_paths_does_not_verify(
    model: Path, check: Callable[..., list[tuple[str, str]]], forge: Callable[..., None]
) -> None:
    forge(model, _ignore("config.json"), again=False)
    assert [code for code, _ in check(model)] == ["signature"]
    assert "does not fit the statement: one of them was changed" in check(model)[0][1]


def test_a_path_is_not_both_signed_and_ignored(
    model: Path, check: Callable[..., list[tuple[str, str]]], forge: Callable[..., None]
) -> None:
    forge(model, lambda statement: statement["predicate"]["serialization"]["ignore_paths"].append("steelyard"))
    assert ("ignored", f"{SIG}: both signs and ignores steelyard") in check(model, allowed=(*IGNORED, "steelyard"))


def test_an_allowed_file_that_the_signature_does_not_ignore_is_unsigned(
    model: Path, check: Callable[..., list[tuple[str, str]]]
) -> None:
    (model / "steelyard" / "approval.json").write_text("1")
    assert [code for code, _ in check(model, allowed=(*IGNORED, "steelyard/approval.json"))] == ["added"]


def test_only_keys_of_ones_own_count(
    model: Path, check: Callable[..., list[tuple[str, str]]], signed: tuple[Path, CryptoSigner, Any]
) -> None:
    other, edwards = CryptoSigner.generate_ecdsa().public_key, CryptoSigner.generate_ed25519().public_key
    assert "that is none of yours" in check(model, keys=[other, edwards])[0][1]
    assert "give a public key of your own" in check(model, keys=[])[0][1]
    assert check(model, keys=[other, edwards, signed[1].public_key]) == []


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        for part in path[:-1]:
            value = value[part]
        value[path[-1]] = to

    return change


def _twice(statement: Any) -> None:
    resources = statement["predicate"]["resources"]
    resources.append(copy.deepcopy(resources[0]))


PREDICATE, SERIALIZATION = ("predicate",), ("predicate", "serialization")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(*SERIALIZATION, "method", to="shards"), "serialization.method"),
        (_set(*SERIALIZATION, "hash_type", to="blake2b"), "serialization.hash_type"),
        (_set(*SERIALIZATION, "allow_symlinks", to=True), "serialization.allow_symlinks"),
        (_set(*SERIALIZATION, "shard_size", to=5), "serialization.shard_size"),
        (_set(*SERIALIZATION, "ignore_paths", to=["."]), "no plain path inside the model"),
        (_set(*SERIALIZATION, "ignore_paths", to=["../model"]), "no plain path inside the model"),
        (_set(*SERIALIZATION, "ignore_paths", to=["/"]), "no plain path inside the model"),
        (_set(*SERIALIZATION, "ignore_paths", to="config.json"), "ignore_paths"),
        (_set(*PREDICATE, "resources", to=[]), "resources"),
        (_set(*PREDICATE, "resources", 0, "algorithm", to="sha512"), "algorithm"),
        (_set(*PREDICATE, "resources", 0, "digest", to="0" * 64), "not that of its list of files"),
        (_set(*PREDICATE, "resources", 0, "name", to="../x"), "no plain path inside the model"),
        (_set(*PREDICATE, "resources", 0, "name", to="a\nb"), "no plain path inside the model"),
        (lambda s: s["predicate"]["resources"].reverse(), "sorted by path, each once"),
        (_twice, "sorted by path, each once"),
        (_set("predicateType", to="https://model_signing/Digests/v0.1"), "predicateType"),
        (_set("_type", to="https://in-toto.io/Statement/v0.1"), "_type"),
        (lambda s: s["subject"].append(s["subject"][0]), "subject"),
    ],
)
def test_a_statement_of_another_shape_is_refused_whoever_signed_it(
    model: Path,
    check: Callable[..., list[tuple[str, str]]],
    forge: Callable[..., None],
    change: Callable[[Any], None],
    message: str,
) -> None:
    forge(model, change)
    [(code, text)] = check(model)
    assert code == "signature"
    assert message in text
    assert text.startswith(SIG)


MATERIAL, ENVELOPE = ("verificationMaterial",), ("dsseEnvelope",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("mediaType", to="application/vnd.dev.sigstore.bundle+json;version=0.1"), "mediaType"),
        (_set("more", to=1), "not a Sigstore bundle"),
        (_set(*MATERIAL, to=[]), "not an object"),
        (_set(*MATERIAL, "certificate", to={"rawBytes": "AA=="}), "not one way to sign"),
        (_set(*MATERIAL, "publicKey", to={"rawBytes": "AA=="}), "expected a hint alone"),
        (_set(*MATERIAL, "tlogEntries", to=[{}]), "which only a Sigstore signature has"),
        (_set(*MATERIAL, "publicKey", "hint", to="0" * 64), "but its hint names another"),
        (_set(*ENVELOPE, "payloadType", to="text/plain"), "payloadType"),
        (_set(*ENVELOPE, "payload", to="e30"), "not standard base64"),
        (_set(*ENVELOPE, "signatures", to=[]), "exactly 1 signature"),
        (_set(*ENVELOPE, "signatures", 0, "keyid", to="me"), "an empty keyid"),
        (_set(*ENVELOPE, "signatures", 0, "sig", to=""), "not standard base64"),
        (_set(*ENVELOPE, "signatures", 0, "sig", to="AAAA"), "one of them was changed"),
        (lambda b: b["dsseEnvelope"]["signatures"].append(b["dsseEnvelope"]["signatures"][0]), "exactly 1 signature"),
    ],
)
def test_a_file_of_another_shape_is_refused(
    model: Path,
    check: Callable[..., list[tuple[str, str]]],
    forge: Callable[..., None],
    change: Callable[[Any], None],
    message: str,
) -> None:
    forge(model, change, around=True)
    [(code, text)] = check(model)
    assert (code, message in text) == ("signature", True), text


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b'{"a":1,"a":2}', b"[" * 100, b" " * 4_000_001])
def test_what_is_no_signature_is_refused(model: Path, check: Callable[..., list[tuple[str, str]]], data: bytes) -> None:
    (model / SIG).write_bytes(data)
    with pytest.raises(FormatError):
        read_model_signature(model / SIG)
    assert [code for code, _ in check(model)] == ["signature"]


def test_a_missing_signature_and_a_linked_one_are_refused(
    model: Path, check: Callable[..., list[tuple[str, str]]]
) -> None:
    (model / SIG).rename(model / "aside")
    assert check(model) == [("signature", f"{SIG}: No such file or directory")]
    (model / SIG).symlink_to(model / "aside")
    assert "is a symbolic link" in check(model)[0][1]


# -- no detour -------------------------------------------------------------------------------------------------------


def test_checking_imports_neither_the_library_nor_sigstore_nor_touches_the_network() -> None:
    code = (
        "import sys, steelyard.release.oms, steelyard.release.verify;"
        "found = {'model_signing', 'sigstore', 'requests', 'OpenSSL', 'tuf', 'torch'} & set(sys.modules);"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr

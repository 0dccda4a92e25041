"""examples/ci/pre-push in real repositories: what is pushed is verified, not what lies in the work tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from scenario import Chain

HOOK = Path(__file__).resolve().parents[2] / "examples" / "ci" / "pre-push"


class Clone:
    """A clone of an empty remote, with the hook; `git` runs a command in it."""

    def __init__(self, folder: Path, chain: Chain) -> None:
        self.folder, self.remote, self.tools = folder / "clone", folder / "remote.git", folder / "bin"
        self.tools.mkdir(parents=True)
        (self.tools / "python3").symlink_to(sys.executable)
        # Where the tests are of git: it knows the released weights, and nothing else.
        released = sha256((chain.model / "model.safetensors").read_bytes()).hexdigest()
        self.tool("steelyard", f'echo "{released}  $2/model.safetensors" | sha256sum -c --status')
        self.tool("git-lfs", f'echo "$@" >> "{folder}/lfs.log"; cat >> "{folder}/lfs.log"')
        self.log = folder / "lfs.log"
        self.environment = os.environ | {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "HOME": str(folder),
            "GIT_CONFIG_NOSYSTEM": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src"),
        }
        self.run("git", "init", "-q", "--bare", "-b", "main", str(self.remote), where=folder)
        self.run("git", "clone", "-q", str(self.remote), str(self.folder), where=folder)
        self.git("config", "user.email", "a@example.org")
        self.git("config", "user.name", "A")
        self.git("checkout", "-q", "-b", "main")
        shutil.copyfile(HOOK, self.folder / ".git" / "hooks" / "pre-push")
        (self.folder / ".git" / "hooks" / "pre-push").chmod(0o755)
        self.git("config", "steelyard.key", str(chain.public))
        self.git("config", "steelyard.policy", str(chain.policy_file))

    def tool(self, name: str, line: str) -> None:
        (self.tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (self.tools / name).chmod(0o755)

    def verify_for_real(self) -> None:
        self.tool("steelyard", f'exec "{sys.executable}" -m steelyard.cli.main "$@"')

    def run(self, *command: str, where: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=where or self.folder, env=self.environment, capture_output=True, text=True, timeout=120
        )

    def git(self, *arguments: str) -> str:
        done = self.run("git", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def commit(self, message: str = "c") -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def push(self, *what: str) -> tuple[bool, str]:
        done = self.run("git", "push", "origin", *(what or ("main",)))
        return done.returncode == 0, done.stderr

    def has(self, branch: str = "main") -> str:
        """The commit that the remote has."""
        done = self.run("git", "rev-parse", "--verify", "-q", branch, where=self.remote)
        return done.stdout.strip()

    def release(self, bundle: Path) -> None:
        shutil.copytree(bundle, self.folder, dirs_exist_ok=True)

    def point(self, name: str, stored: bool = True) -> Path:
        """Put a file into the clone's LFS store, and a pointer in its place; gives where the content lies."""
        data = (self.folder / name).read_bytes()
        oid = sha256(data).hexdigest()
        place = self.folder / ".git" / "lfs" / "objects" / oid[:2] / oid[2:4] / oid
        place.parent.mkdir(parents=True, exist_ok=True)
        if stored:
            place.write_bytes(data)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n"
        (self.folder / name).write_text(pointer)
        return place


@pytest.fixture
def clone(released: tuple[Chain, Path], tmp_path: Path) -> Clone:
    return Clone(tmp_path / "git", released[0])


def test_an_attested_release_is_pushed_and_what_lies_around_it_does_not_count(
    clone: Clone, released: tuple[Chain, Path]
) -> None:
    clone.verify_for_real()
    clone.release(released[1])
    (clone.folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    commit = clone.commit()
    (clone.folder / "model.safetensors").write_bytes(b"only in the work tree")
    (clone.folder / "notes.txt").write_text("likewise")
    done, said = clone.push()
    assert done, said
    assert "holds model.safetensors: verifying it" in said
    assert clone.has() == commit
    assert clone.log.read_text().splitlines()[0].startswith("pre-push origin ")
    assert commit in clone.log.read_text()
    assert not list((clone.folder / ".git").glob("steelyard-*"))


def test_what_is_pushed_counts_however_good_the_work_tree_is(clone: Clone, released: tuple[Chain, Path]) -> None:
    clone.verify_for_real()
    clone.release(released[1])
    data = (clone.folder / "model.safetensors").read_bytes()
    (clone.folder / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    clone.commit()
    (clone.folder / "model.safetensors").write_bytes(data)
    done, said = clone.push()
    assert not done
    assert "model.safetensors: was changed" in said
    assert "do not verify as an attested release" in said
    assert clone.has() == ""
    assert not clone.log.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "old/pytorch_model.bin", "weights.dat"])
def test_weights_alone_are_refused(name: str, clone: Clone) -> None:
    path = clone.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\0" * (10_000_000 if path.suffix == ".dat" else 10))
    clone.commit()
    done, said = clone.push()
    assert not done
    assert f"holds weights ({name}) that do not verify" in said
    assert clone.has() == ""


def test_an_earlier_commit_of_the_push_counts_too(clone: Clone, released: tuple[Chain, Path]) -> None:
    (clone.folder / "model.safetensors").write_bytes(b"not tested")
    before = clone.commit()
    (clone.folder / "model.safetensors").unlink()
    clone.release(released[1])
    clone.commit()
    done, said = clone.push()
    assert not done
    assert before[:12] in said
    clone.git("checkout", "-q", "--orphan", "clean")  # squashed, it passes
    clone.commit()
    done, said = clone.push("clean:main")
    assert done, said


def test_no_weights_no_question(clone: Clone) -> None:
    clone.git("config", "--unset", "steelyard.key")
    (clone.folder / "README.md").write_text("soon")
    clone.commit()
    done, said = clone.push()
    assert done, said
    assert "verifying" not in said


def test_without_a_key_weights_are_refused(clone: Clone, released: tuple[Chain, Path]) -> None:
    clone.git("config", "--unset", "steelyard.key")
    clone.release(released[1])
    clone.commit()
    done, said = clone.push()
    assert not done
    assert "whom do you trust?" in said


def test_new_branches_tags_and_deletions(clone: Clone, released: tuple[Chain, Path]) -> None:
    clone.release(released[1])
    commit = clone.commit()
    assert clone.push("main", "main:other")[0]
    clone.git("tag", "-a", "v1", "-m", "v1")
    assert clone.push("v1")[0]
    (clone.folder / "model.safetensors").write_bytes(b"not tested")
    clone.commit()
    done, said = clone.push("main:refs/heads/third")
    assert not done
    assert clone.has("third") == ""
    clone.git("tag", "bad")
    assert not clone.push("bad")[0]
    assert not clone.push(":other", "main")[0]  # one refused branch refuses the push whole
    assert clone.has("other") == commit
    done, said = clone.push(":other")
    assert done, said
    assert clone.has("other") == ""
    assert "verifying" not in said


def test_the_tip_counts_even_where_the_remote_has_it_already(clone: Clone, released: tuple[Chain, Path]) -> None:
    (clone.folder / "model.safetensors").write_bytes(b"not tested")
    bad = clone.commit()
    clone.run("git", "push", "--no-verify", "origin", "main:experiment")
    clone.git("fetch", "-q")
    assert clone.has("experiment") == bad
    done, said = clone.push()
    assert not done
    assert "do not verify" in said


def test_large_files_come_from_the_store_of_lfs(clone: Clone, released: tuple[Chain, Path]) -> None:
    clone.verify_for_real()
    clone.release(released[1])
    stored = clone.point("model.safetensors")
    clone.commit()
    done, said = clone.push()
    assert done, said
    (clone.folder / "README.md").write_text("edited since")
    clone.commit()
    done, said = clone.push()
    assert not done
    assert "README.md: was changed" in said
    clone.git("reset", "-q", "--hard", "HEAD~1")
    data = stored.read_bytes()
    for content, reason in (
        (data[:-1] + bytes([data[-1] ^ 1]), "is not what the commit points to"),
        (data[:-1], "git lfs fetch --all"),
        (None, "git lfs fetch --all"),
    ):
        stored.unlink()
        if content is not None:
            stored.write_bytes(content)
        done, said = clone.push("main:again")
        assert not done
        assert reason in said
        stored.write_bytes(data)
    assert clone.push("main:again")[0]


def test_pointers_without_git_lfs_are_refused(clone: Clone, released: tuple[Chain, Path]) -> None:
    if shutil.which("git-lfs"):
        pytest.skip("git-lfs is installed beside git, and cannot be hidden")
    clone.release(released[1])
    clone.point("model.safetensors")
    (clone.tools / "git-lfs").unlink()
    clone.commit()
    done, said = clone.push()
    assert not done
    assert "git-lfs, which would upload it, is not installed" in said


def test_links_are_refused(clone: Clone, released: tuple[Chain, Path]) -> None:
    clone.release(released[1])
    (clone.folder / "LICENSE").symlink_to("README.md")
    clone.commit()
    done, said = clone.push()
    assert not done
    assert "'LICENSE': is no plain file" in said


def test_a_missing_steelyard_refuses(clone: Clone, released: tuple[Chain, Path]) -> None:
    clone.release(released[1])
    clone.commit()
    clone.tool("steelyard", "exit 127")
    done, said = clone.push()
    assert not done
    assert "do not verify" in said

"""Content-addressed files: `sha256/ab/abcd...`, written whole, never changed, rehashed whenever they are read."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from steelyard.base.canonical import sha256_file
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.files import fsync_folder

_CHUNK = 1 << 20


class ArtifactStore:
    """The files under one folder, each named by the SHA-256 of its bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path_of(self, digest: str) -> Path:
        """Where the file of that SHA-256 lies, if it is kept. Raises UsageError for what is not 64 hex digits."""
        if re.fullmatch(r"[0-9a-f]{64}", digest) is None:
            raise UsageError(f"{digest!r} is not a SHA-256: 64 lower-case hex digits")
        return self.folder / "sha256" / digest[:2] / digest

    def put(self, source: Path) -> str:
        """Copy `source` in, hashing what is written; gives the SHA-256. A kept copy that was damaged is replaced."""
        pending = self.folder / "sha256"
        try:
            pending.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as data:
                handle, temporary = tempfile.mkstemp(dir=pending, prefix=".new.")
                try:
                    hasher = hashlib.sha256()
                    with os.fdopen(handle, "wb") as out:
                        while chunk := data.read(_CHUNK):
                            hasher.update(chunk)
                            out.write(chunk)
                        out.flush()
                        os.fsync(out.fileno())
                    digest = hasher.hexdigest()
                    target = self.path_of(digest)
                    if target.is_file() and sha256_file(target) == digest:
                        return digest
                    os.chmod(temporary, 0o444)
                    target.parent.mkdir(exist_ok=True)
                    os.replace(temporary, target)
                    fsync_folder(target.parent)
                finally:
                    Path(temporary).unlink(missing_ok=True)
        except OSError as error:
            raise SteelyardError(
                f"{error.filename or source}: cannot be kept as an artifact: {error.strerror}"
            ) from error
        return digest

    def get(self, digest: str) -> Path:
        """The kept file of that SHA-256, rehashed. Raises SteelyardError where it is missing or corrupted."""
        path = self.path_of(digest)
        try:
            found = sha256_file(path)
        except OSError as error:
            raise SteelyardError(f"{path}: the artifact cannot be read: {error.strerror}") from error
        if found != digest:
            raise SteelyardError(
                f"{path}: the artifact is corrupted (SHA-256 now {found[:16]}...): restore it or remove it"
            )
        return path

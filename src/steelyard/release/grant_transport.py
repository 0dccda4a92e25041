"""A copy on its way: one sealed tar, streamed, and opened by its recipient whole or not at all; and the receipt.

    pack(folder, file, public, progress)                    # by deliver
    unpack(Path("copy.sealed"), private, Path("copy"))      # by the recipient

The plain text of the tar is never on the disk. The statement is its last member, and the folder gets its name only once
the sealed file's last chunk was checked: what was cut off leaves nothing that verifies.
"""

from __future__ import annotations

import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import new_folder, open_regular, read_bounded, write_atomic
from steelyard.base.progress import Progress, Silent
from steelyard.release.attest import ENVELOPE_LIMIT, read_envelope, sign, verify_envelope
from steelyard.release.grant_book import RECEIPT, Book
from steelyard.release.grant_copy import LIST, STATEMENT, may_hold
from steelyard.release.grant_request import signer_of
from steelyard.release.grant_sealed import SealedReader, SealedWriter
from steelyard.release.grant_statements import Receipt, parse, payload
from steelyard.release.grant_verify import CopyVerification
from steelyard.release.statements import stamp

_BLOCK = 1 << 20
_HEADER_LIMIT = 1 << 16  # bytes; a header of `pack`'s says the size of a file of 8 GiB or more, and no more


class _Member(tarfile.TarInfo):
    """A member none of whose headers is large: tarfile reads each whole into memory, of whatever size it says it is."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.type != tarfile.REGTYPE and not 0 <= info.size <= _HEADER_LIMIT:
            raise tarfile.HeaderError(f"a header of {info.size:,} bytes")
        return info


def pack(folder: Path, out: Path, public: X25519PublicKey, progress: Progress | None = None) -> None:
    """Write the files of `folder` to the sealed file `out`."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in (LIST, STATEMENT)] + [LIST, STATEMENT]
    total = sum((folder / name).stat().st_size for name in names) / 1e6
    shown = (progress or Silent()) if total >= 1 else Silent()
    with out.open("wb") as file, shown.task("seal the copy", total, "MB") as task:
        writer = SealedWriter(file, public)
        with tarfile.open(fileobj=writer, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_BLOCK) as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size, info.mode = (folder / name).stat().st_size, 0o644
                with open_regular(folder / name) as source:
                    tar.addfile(info, source)
                task.advance(info.size / 1e6)
        writer.finish()


def unpack(sealed: Path, private: X25519PrivateKey, out: Path) -> Path:
    """Open a sealed copy into the new folder `out`. Raises FormatError where it was cut or changed, is for another key,
    or holds anything but a copy's files; SteelyardError where `out` exists."""
    where = str(sealed)
    with open_regular(sealed) as file, new_folder(out, mode=0o700) as folder:
        reader = SealedReader(file, private, where)
        seen: set[str] = set()
        try:
            with tarfile.open(fileobj=reader, mode="r|", bufsize=_BLOCK, tarinfo=_Member) as tar:
                for member in tar:
                    if not _plain(member) or not may_hold(member.name) or member.name in seen:
                        raise FormatError(f"{where}: holds {member.name[:80]!r}: not a file that a copy holds, once")
                    seen.add(member.name)
                    _extract(tar, member, folder / member.name, where)
        except (tarfile.TarError, ValueError, RecursionError) as error:  # the last by headers upon headers
            raise FormatError(f"{where}: what it holds is no tar: {error}") from error
        while reader.read(_BLOCK):  # to the end, whose tag says that nothing was cut off
            pass
        if STATEMENT not in seen:
            raise FormatError(f"{where}: holds no {STATEMENT}: it is no marked copy")
    return out


def _plain(member: tarfile.TarInfo) -> bool:
    """A file as `pack` stores one; a sparse one of a few bytes could fill the disk."""
    return member.type == tarfile.REGTYPE and not member.issparse() and member.size >= 0


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, place: Path, where: str) -> None:
    source = tar.extractfile(member)
    assert source is not None  # a regular file
    place.parent.mkdir(exist_ok=True)
    left = member.size
    with place.open("xb") as file:
        while left and (data := source.read(min(_BLOCK, left))):
            file.write(data)
            left -= len(data)
    if left:
        raise FormatError(f"{where}: {member.name} is shorter than it says")


# -- the receipt -----------------------------------------------------------------------------------------------------


def receipt(found: CopyVerification, signer: CryptoSigner, now: datetime | None = None) -> bytes:
    """The recipient's signed word that this copy arrived and its licence is accepted. Raises SteelyardError where the
    copy did not verify."""
    if not found.ok or found.copy_ is None:
        raise SteelyardError(f"the copy does not verify: {'; '.join(f.message for f in found.findings)}")
    word = Receipt(grant=found.grant, licence=found.copy_.licence, signed=stamp(now or datetime.now(UTC)))
    return sign(payload({"weights": found.weights, "copy": found.envelope}, word), signer)


def check_receipt(book: Book, file: Path, private: X25519PrivateKey, *, now: datetime | None = None) -> str:
    """Check a receipt against the request and what was delivered, keep it, and note it; gives the grant's id.

    Raises SteelyardError where the key is not the one that the request named, or nothing like it was delivered.
    """
    try:
        data = read_bounded(file, ENVELOPE_LIMIT)
    except OSError as error:
        raise SteelyardError(f"{file}: {error.strerror}: give the receipt's file") from error
    _, _, unverified = parse(read_envelope(data, str(file))[0], str(file), Receipt)
    with book.locked(now) as now:
        grant = book.grant(unverified.grant, now)
        key = signer_of(book.open(book.request(grant.request, now), private, now))
        if key is None:
            raise SteelyardError(f"{file}: the request behind grant {grant.id} names no key that signs receipts")
        subjects, _, word = parse(verify_envelope(data, str(file), [key])[0], str(file), Receipt)
        known = {"marked": subjects.get("weights"), "copy": subjects.get("copy")}
        if len(subjects) != 2 or not book.events("delivered", grant=grant.id, **known):
            raise SteelyardError(f"{file}: is for a copy that was never delivered on grant {grant.id}")
        if word.licence != grant.licence:
            raise SteelyardError(f"{file}: accepts another licence than the grant's")
        # With who asked, to be erased with him: it holds the id of his key.
        place = book.request_folder(grant.request) / RECEIPT
        if not book.events("received", grant=grant.id, receipt=sha256_hex(data)):
            write_atomic(place, data, mode=0o600)
            book.note("received", grant=grant.id, receipt=sha256_hex(data))
    return grant.id

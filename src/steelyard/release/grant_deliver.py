"""Deliver a grant: the marked copy, made again from the keys each time, with what says where it comes from.

    delivered = deliver(book, "g-...", bundle, Path("copy"), keys=Keys(mark, private, signer, card), trust=trust)

The copy appears at its place whole or not at all. Its statement is written last of all, so that what a killed delivery
leaves behind does not verify; where the request names a key, nothing but the sealed file ever leaves the workspace.
The order in the ledger: `grant.delivering` before the first byte, `grant.marked` once the weights are known,
`grant.delivered` before the copy has its name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

from steelyard import __version__
from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import SteelyardError
from steelyard.base.files import new_file, new_folder
from steelyard.base.progress import Progress, Silent
from steelyard.model.identity import is_model_file, subject_of
from steelyard.release.attest import parse_test_result, read_envelope, sign
from steelyard.release.grant_book import Book, Grant, refuse_released
from steelyard.release.grant_checks import check_countersigned, check_reviews, raise_for, review_subjects
from steelyard.release.grant_copy import (
    COMMITMENT,
    COUNTERSIGNATURE,
    LICENCE,
    LIST,
    SOURCE_SUMMARY,
    SOURCE_TEST,
    STATEMENT,
    TIMESTAMP,
    card,
    licence_of,
    list_bytes,
    source_papers,
    wanted_of,
    write_papers,
)
from steelyard.release.grant_keys import MarkKey
from steelyard.release.grant_measured import measure_perplexity, measured_battery
from steelyard.release.grant_request import recipient_of
from steelyard.release.grant_statements import LOUDEST, Bound, Commitment, MarkedCopy, Tested, payload
from steelyard.release.grant_transport import pack
from steelyard.release.grant_verify import WHERE, verify_copy
from steelyard.release.grants import read_commitment, read_reviews, read_witness
from steelyard.release.keys import KeyInfo
from steelyard.release.layout import CARD, HOME
from steelyard.release.statements import stamp
from steelyard.release.trust import Trust
from steelyard.trace import tardos, watermark


@dataclass(frozen=True)
class Keys:
    """Whose hands a delivery needs: the grants' keys, and the releaser's with its card."""

    mark: MarkKey
    identity: X25519PrivateKey
    signer: CryptoSigner
    card: KeyInfo


@dataclass(frozen=True)
class Measure:
    """What to measure besides the change of the weights: perplexity on `text`, the differences of a finished `run`."""

    text: Path | None = None
    run: Path | None = None


@dataclass(frozen=True)
class Delivered:
    """A copy where it was delivered. `sealed`: one file that only the recipient opens."""

    place: Path
    sealed: bool
    copy: MarkedCopy


def deliver(
    book: Book,
    grant: str,
    bundle: Path,
    to: Path,
    *,
    keys: Keys,
    trust: Trust,
    licence: Path | None = None,
    measure: Measure = Measure(),
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Delivered:
    """Write the copy of the release in `bundle` that `grant` is entitled to: a folder, or where the request names a
    key one sealed file. `licence`: its text, where the bundle does not hold it.

    Raises SteelyardError where the grant is unknown, over or the public's, its code was not countersigned, the release
    is another one, does not verify or went out unmarked, a key is the wrong one, or `to` exists.
    """
    progress = progress or Silent()
    with book.locked(now) as now, ExitStack() as stack:
        found = _allowed(book, grant, bundle, keys.mark, trust, keys.signer.public_key.keyid, now, progress)
        if found.public:
            text = "is the public's: mark it, test it and release it (steelyard grant mark), it needs a test of its own"
            raise SteelyardError(f"grant {grant}: {text}")
        sealed = book.open(book.request(found.request, now), keys.identity, now)
        public, terms = recipient_of(sealed), licence_of(bundle, licence)
        if sha256_hex(terms) != found.licence:
            raise SteelyardError(f"the licence is {sha256_hex(terms)}, the recipient accepted {found.licence}")
        _check_place(to, bundle)
        book.note("delivering", grant=grant, weights=found.wanted.weights)
        folder = stack.enter_context(new_folder(to, mode=0o700) if public is None else _staging(book))
        marked = _mark(book, found, bundle, folder, keys.mark, progress)
        copy = _attest(book, found, bundle, folder, terms, marked, keys, measure, now, progress)
        result = verify_copy(folder, trust, now=now, progress=progress)
        raise_for(result.findings, f"grant {grant}: the copy just written does not verify")
        if public is not None:
            file = stack.enter_context(new_file(to, mode=0o600))
            pack(folder, file, public, progress)
        book.note(
            "delivered",
            grant=grant,
            weights=found.wanted.weights,
            marked=result.weights,
            copy=result.envelope,
            sealed=public is not None,
        )
    return Delivered(to, public is not None, copy)


def mark_only(
    book: Book,
    grant: str,
    bundle: Path,
    to: Path,
    *,
    mark: MarkKey,
    trust: Trust,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> float:
    """Write the marked model alone, a plain model folder that nothing attests: to be measured, and for the public's
    copy to be tested and released as a subject of its own. Gives the relative change. Raises as `deliver` does."""
    progress = progress or Silent()
    with book.locked(now) as now:
        found = _allowed(book, grant, bundle, mark, trust, None, now, progress)
        _check_place(to, bundle)
        with new_folder(to, mode=0o700) as folder:
            return _mark(book, found, bundle, folder, mark, progress).relative_rms


# -- what must hold before -------------------------------------------------------------------------------------------


def _allowed(
    book: Book,
    grant: str,
    bundle: Path,
    mark: MarkKey,
    trust: Trust,
    releaser: str | None,
    now: datetime,
    progress: Progress,
) -> Grant:
    """The grant, once all holds that needs no copy to be seen."""
    from steelyard.release.verify import examine

    found = book.live(grant, now)
    wanted = wanted_of(bundle)
    if wanted != found.wanted:
        raise SteelyardError(f"{bundle}: is not the release that grant {grant} is for (subject {found.wanted.subject})")
    refuse_released(book.ledger, wanted)
    if mark.fingerprint != found.mark or tardos.commitment(mark.secret, grant) != found.code:
        raise SteelyardError(f"grant {grant}: the mark key is not the one that its code was committed with")
    data, commitment = read_commitment(book, found)
    statement, time_stamp = read_witness(book, grant)
    releasers = [] if releaser is None else [releaser]
    findings = check_countersigned(
        data, commitment, statement, time_stamp, trust, before=now, releasers=releasers, where=WHERE
    )
    raise_for(list(findings), f"grant {grant}")
    noted = {event.payload["countersignature"] for event in book.events("countersigned", grant=grant)}
    if any(seen is not None and sha256_hex(seen) not in noted for seen in (statement, time_stamp)):
        text = "its countersignature is not noted in the ledger: whoever gave it runs steelyard grant countersign again"
        raise SteelyardError(f"grant {grant}: {text}")
    _check_reviewed(book, commitment, trust, now)
    if releaser is not None and releaser not in {key.keyid for key in trust.releasers}:
        raise SteelyardError(f"key {releaser}: is none of the releasers of your trust file")
    result = examine(bundle, trust=trust, now=now, progress=progress)
    raise_for(result.findings, f"{bundle}: does not verify, so nothing is delivered")
    if (result.weights, result.subject, result.manifest) != (wanted.weights, wanted.subject, wanted.manifest):
        raise SteelyardError(f"{bundle}: changed while it was verified: leave it alone and try again")
    return found


def _check_reviewed(book: Book, commitment: Commitment, trust: Trust, now: datetime) -> None:
    """Whoever issued the grant held the reviews against a trust file of his; here against the one that is given."""
    reviews = read_reviews(book.grant_folder(commitment.grant))
    if sorted(map(sha256_hex, reviews.values())) != sorted(commitment.reviews):
        raise SteelyardError(f"grant {commitment.grant}: was not made on the reviews that lie with it: restore them")
    about = review_subjects(commitment.request, commitment.weights, commitment.subject, commitment.licence)
    raise_for(check_reviews(reviews, about, trust, now)[1], f"grant {commitment.grant}")


def _check_place(to: Path, bundle: Path) -> None:
    if to.exists() or to.is_symlink():
        raise SteelyardError(f"{to} exists already: a copy is never written over anything")
    if to.resolve().is_relative_to(bundle.resolve()):
        raise SteelyardError(f"{to}: lies in the bundle: choose a place outside of it")


# -- the copy --------------------------------------------------------------------------------------------------------


def _mark(
    book: Book, grant: Grant, bundle: Path, folder: Path, mark: MarkKey, progress: Progress
) -> watermark.MarkReport:
    """The marked model in `folder`; the release's card and papers are left out, they are about another subject."""
    with _staging(book, "source") as source:
        for path in sorted(bundle.iterdir()):
            if is_model_file(path.name) and path.name != CARD:
                _link(path, source / path.name)
        report = watermark.mark_folder(source, folder / "marked", mark.secret, grant.id, progress)
        if subject_of(source, progress).digest != grant.wanted.subject:
            raise SteelyardError(f"{bundle}: changed while it was marked: leave it alone and try again")
    for path in sorted((folder / "marked").iterdir()):
        path.rename(folder / path.name)
    (folder / "marked").rmdir()
    if not 0 < report.relative_rms <= LOUDEST:
        text = f"changes the weights by {report.relative_rms:.2g}, allowed is up to {LOUDEST:.2g}"
        raise SteelyardError(f"grant {grant.id}: the mark {text}: nothing is delivered")
    marked = subject_of(folder, progress).weights
    if not book.events("marked", grant=grant.id, marked=marked):
        book.note("marked", grant=grant.id, weights=grant.wanted.weights, marked=marked)
    return report


def _attest(
    book: Book,
    grant: Grant,
    bundle: Path,
    folder: Path,
    licence: bytes,
    marked: watermark.MarkReport,
    keys: Keys,
    measure: Measure,
    now: datetime,
    progress: Progress,
) -> MarkedCopy:
    """Everything beside the model; the statement last."""
    perplexity = None if measure.text is None else measure_perplexity(bundle, folder, measure.text, progress)
    battery = None if measure.run is None else measured_battery(measure.run, folder, grant.wanted.subject)
    papers = source_papers(bundle)
    committed, commitment = read_commitment(book, grant)
    test = parse_test_result(read_envelope(papers[SOURCE_TEST], SOURCE_TEST)[0], SOURCE_TEST)
    copy = MarkedCopy(
        grant=grant.id,
        derived_from=Tested(
            name=test.predicate.steelyard.name,
            **grant.wanted.model_dump(),
            test_result=sha256_hex(papers[SOURCE_TEST]),
            summary=sha256_hex(papers[SOURCE_SUMMARY]),
        ),
        bound=Bound(relative_change=marked.relative_rms, perplexity=perplexity, battery=battery),
        commitment=grant.commitment,
        licence=grant.licence,
        expires=stamp(grant.expires),
        retain_days=commitment.retain_days,
        signed=stamp(now),
        key_kind=keys.card.kind,
        version=__version__,
    )
    papers[COMMITMENT] = committed
    for name, data in zip((COUNTERSIGNATURE, TIMESTAMP), read_witness(book, grant.id), strict=True):
        if data is not None:
            papers[name] = data
    papers |= {f"{HOME}/{name}": data for name, data in read_reviews(book.grant_folder(grant.id)).items()}
    write_papers(folder, {**papers, LICENCE: licence, CARD: card(copy).encode()})
    listed = list_bytes(folder)
    subject = subject_of(folder, progress)
    subjects = {"weights": subject.weights, "subject": subject.digest, LIST: sha256_hex(listed)}
    write_papers(folder, {LIST: listed, STATEMENT: sign(payload(subjects, copy), keys.signer)})
    return copy


@contextmanager
def _staging(book: Book, name: str = "copy") -> Iterator[Path]:
    """A folder of the workspace, for the owner alone, gone afterwards; what a killed delivery left is removed first."""
    place = book.folder / "staging" / name
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(exist_ok=True, mode=0o700)
    place.mkdir(mode=0o700)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _link(source: Path, place: Path) -> None:
    """The same file under another name; a copy where the file system has no such thing."""
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:
        handle, name = tempfile.mkstemp(dir=place.parent)
        os.close(handle)
        shutil.copyfile(source, name, follow_symlinks=False)
        os.rename(name, place)

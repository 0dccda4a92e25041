"""Whose copy is this? Aligns a suspect with the release, reads its mark, and names a grant only where an innocent would
be named at most once in 10^9.

    found = name_grant(book, Path("suspect"), bundle, mark)
    found.named, found.to_json(), found.to_markdown()

Every grant that the ledger has for these weights is compared, ended ones too, and the bound is multiplied by their
number. Evidence cites grant ids, never who stands behind them. Both models are read from the disk, a layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steelyard import __version__
from steelyard.base.canonical import canonical_json, sha256_file, sha256_hex
from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Progress, Silent
from steelyard.model.identity import subject_of
from steelyard.release.grant_book import COMMITMENT, COUNTERSIGNATURE, TIMESTAMP, Book, Grant
from steelyard.release.grant_keys import MarkKey
from steelyard.release.grant_statements import FRAMED
from steelyard.release.grants import read_commitment, read_witness
from steelyard.release.statements import stamp
from steelyard.safety.markup import code, escape
from steelyard.trace import alignment, tardos, watermark
from steelyard.trace.guessed import settled
from steelyard.trace.roles import hugging_face
from steelyard.trace.streaming import Weights
from steelyard.trace.tensors import Tensors, fingerprint, open_tensors

METHOD = (
    "The suspect was expressed in the release's layout, and its difference from the unmarked weights compared with the "
    "code of every grant (spread spectrum, Tardos code). Given what was read, an innocent recipient's code is a row of "
    "independent draws with known biases; Bernstein's inequality bounds the probability that one scores as high, with "
    "no other assumption. The bound is multiplied by the number of grants."
)

UNDELIVERED = (
    "- **never delivered**, as far as the ledger knows: the copy was marked (to be measured, or released as the "
    "public's), and the recipient did not get it from here"
)


@dataclass(frozen=True)
class NamedGrant:
    """A grant whose copy the suspect came from. `log10_p`: of the bound for one innocent, not multiplied yet; `seen`:
    SHA-256 of what countersigned its code before the first copy, and when the ledger noted it; `delivered`: when the
    ledger noted the first delivery, None where only the desk had a copy; `papers`: the commitment and its
    countersignatures, for whoever does not believe this ledger."""

    grant: Grant
    log10_p: float
    seen: tuple[tuple[str, str], ...]
    delivered: str | None = None
    papers: Mapping[str, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Evidence:
    """What was found. `named` is empty where nobody is named; `files`: name and SHA-256 of the suspect's; `sighting`:
    the number of the ledger's event from which a notice can be written, where somebody is named."""

    suspect: str
    files: tuple[tuple[str, str], ...]
    weights: str
    subject: str
    grants: int
    found: str
    named: tuple[NamedGrant, ...]
    mark: str
    time: str
    sighting: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": 1,
            "time": self.time,
            "version": __version__,
            "suspect": {"name": self.suspect, "files": [{"name": name, "sha256": sha} for name, sha in self.files]},
            "release": {"weights": self.weights, "subject": self.subject},
            "mark_key": self.mark,
            "grants_compared": self.grants,
            "accused_up_to": tardos.ACCUSE,
            "method": METHOD,
            "undone_before_reading": self.found,
            "named": [
                {
                    "grant": one.grant.id,
                    "log10_probability": round(one.log10_p + math.log10(self.grants), 2),
                    "commitment": one.grant.commitment,
                    "code": one.grant.code,
                    "countersigned": [{"sha256": sha, "noted": time} for sha, time in one.seen],
                    "issued": stamp(one.grant.issued),
                    "delivered": one.delivered,
                }
                for one in self.named
            ],
            "caution": FRAMED,
        }

    def to_json(self) -> bytes:
        return canonical_json(self.to_dict()) + b"\n"

    def to_markdown(self) -> str:
        """For people; the suspect's name is a stranger's."""
        lines = [
            f"# Whose copy is {escape(self.suspect)}?",
            "",
            f"Compared with every grant ({self.grants:,}) of the weights {code(self.weights)}, {self.time}.",
            "",
        ]
        for one in self.named:
            power = one.log10_p + math.log10(self.grants)
            lines += [
                f"**Grant {code(one.grant.id)}.** The probability that this names an innocent recipient, whichever of "
                f"the {self.grants:,}, is at most 10^({power:.1f}).",
                "",
                f"- commitment to its code: {code(one.grant.commitment)}, issued {stamp(one.grant.issued)}",
                *(f"- countersigned before the copy was made: {code(sha)}, noted {time}" for sha, time in one.seen),
                f"- first delivered {one.delivered}" if one.delivered else UNDELIVERED,
                "",
            ]
        if not self.named:
            lines += [f"**Nobody is named**: no grant reaches 10^({math.log10(tardos.ACCUSE):.0f}).", ""]
        lines += [METHOD, "", f"Undone before reading: {escape(self.found)}.", "", FRAMED, "", "## The suspect", ""]
        lines += [f"- {code(name)}: {code(sha)}" for name, sha in self.files]
        return "\n".join(lines) + "\n"


def name_grant(
    book: Book,
    suspect: Path,
    bundle: Path,
    mark: MarkKey,
    *,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Name the grants whose copies the suspect came from, if any, and note it in the ledger by ids and digests.

    Raises SteelyardError where nothing was ever granted of this release, or the key is not the one that the codes were
    committed with; FormatError where the suspect cannot be read or is no model of these sizes.
    """
    now, progress = now or datetime.now(UTC), progress or Silent()
    subject = subject_of(bundle, progress)
    grants = {grant.id: grant for grant in book.grants(now) if grant.wanted.weights == subject.weights}
    if not grants:
        raise SteelyardError(f"{bundle}: nothing was ever granted of these weights ({subject.weights})")
    for grant in grants.values():
        if grant.mark != mark.fingerprint:
            raise SteelyardError(f"grant {grant.id}: the mark key is not the one that its code was committed with")
    ours = hugging_face(open_tensors(bundle))
    theirs = settled(hugging_face(open_tensors(suspect)), ours)
    aligned = alignment.Alignment(Weights(ours), Weights(theirs), ours.sizes.heads, ours.sizes.kv_heads)
    total = sum(entry.end - entry.start for entry in ours.entries.values()) / 1e6
    with (progress if total >= 1 else Silent()).task("read the mark", total, "MB") as task:
        original = Weights(ours, lambda size: task.advance(size / 1e6))
        detected = watermark.detect(original, aligned, mark.secret, list(grants))
    limit = math.log10(tardos.ACCUSE / len(grants))
    p = dict(zip(grants, map(float, detected.log10_p), strict=True))
    named = [
        NamedGrant(grants[grant], p[grant], seen, _delivered(book, grant), _papers(book, grants[grant], seen))
        for grant in detected.accused
        if p[grant] <= limit and (seen := _seen_before(book, grants[grant], mark))
    ]
    files = sorted({entry.file for entry in theirs.entries.values()})
    evidence = Evidence(
        suspect=suspect.name or str(suspect),
        files=tuple((file.name, sha256_file(file)) for file in files),
        weights=subject.weights,
        subject=subject.digest,
        grants=len(grants),
        found="; ".join(aligned.found.words()) or "nothing",
        named=tuple(named),
        mark=mark.fingerprint,
        time=stamp(now),
    )
    book.note(
        "named",
        weights=subject.weights,
        grants=[one.grant.id for one in named],
        evidence=sha256_hex(evidence.to_json()),
    )
    return replace(evidence, sighting=_sighted(book, evidence, bundle, theirs.tensors)) if named else evidence


def _sighted(book: Book, evidence: Evidence, bundle: Path, suspect: Tensors) -> int:
    """Note the copy as sighted, as `trace.notices` reads it: with ids of grants, and nobody's name."""
    known = book.ledger.events("trace.registered", weights=evidence.weights)
    work = {"kind": "release", "subject": evidence.subject, "weights": evidence.weights}
    least = min(one.log10_p for one in evidence.named) + math.log10(evidence.grants)
    payload = {
        "suspect": evidence.suspect,
        "fingerprint": fingerprint(suspect),
        "verdict": "derived",
        "changes": [] if evidence.found == "nothing" else [evidence.found],
        "reference": {"name": str(known[-1].payload["name"]) if known else bundle.resolve().name, **work},
        "log10_p": min(least, 0.0),
        "evidence": [METHOD, f"The evidence has the SHA-256 {sha256_hex(evidence.to_json())}.", FRAMED],
        "grants": [one.grant.id for one in evidence.named],
    }
    return book.ledger.append("trace.sighted", payload).seq


def _seen_before(book: Book, grant: Grant, mark: MarkKey) -> tuple[tuple[str, str], ...]:
    """What countersigned a grant's code before the first copy, as `NamedGrant.seen`; empty where there is no copy or no
    such thing: then nobody is named, for the code could have been made up afterwards. Raises SteelyardError for another
    code."""
    if tardos.commitment(mark.secret, grant.id) != grant.code:
        raise SteelyardError(f"grant {grant.id}: its code is not the one that was committed: nobody is named")
    marked = min((event.seq for event in book.events("marked", grant=grant.id)), default=0)
    seen = [event for event in book.events("countersigned", grant=grant.id) if event.seq < marked]
    return tuple((str(event.payload["countersignature"]), event.time) for event in seen)


def _delivered(book: Book, grant: str) -> str | None:
    return next((event.time for event in book.events("delivered", grant=grant)), None)


def _papers(book: Book, grant: Grant, seen: Sequence[tuple[str, str]]) -> dict[str, bytes]:
    """What of it lies in the workspace still, as the ledger noted it."""
    found = dict(zip((COUNTERSIGNATURE, TIMESTAMP), read_witness(book, grant.id), strict=True))
    known = {sha for sha, _ in seen}
    papers = {name: data for name, data in found.items() if data is not None and sha256_hex(data) in known}
    with suppress(SteelyardError):  # lost or changed: its digest stands in the evidence
        papers[COMMITMENT] = read_commitment(book, grant)[0]
    return papers

"""A notice about a copy: the dossier that a person signs and sends to whoever hosts it, in HTML and Markdown.

It is written from a sighting, the ledger's event `trace.sighted`:

    reference   the registered work: {"name", "kind", "subject", "weights"}
    verdict     what the copy is: exact copy, same tensors, quantised, derived
    changes     what was done to it, as far as the weights show; may be absent
    evidence    sentences: what was found, by which method
    log10_p     decimal logarithm of the chance of such a likeness, were the two independent; null where it could not be
                computed, and then counts as 0
    locations   where the copy was seen; may be absent, and is then given when the notice is written
    digests     SHA-256 of files or tensors that are equal, with or without a name ({"name", "sha256"}); may be absent
    grants      ids of grants whose mark the copy bears; may be absent
    fingerprint by which the copy is known again (`tensors.fingerprint`); null where only digests were compared

No other key is read, so nobody's identity comes in: a grant's id is all that a notice says of a recipient. All texts
are strangers' and shown as text. Nothing is signed and nothing is sent here: statements of law have blanks, and each
step after (sent, answered, ...) is noted in the ledger by `record_step`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import new_folder
from steelyard.ledger.ledger import Event, Ledger
from steelyard.model.headers import quote
from steelyard.trace.notice_page import Document, Section, as_html, as_markdown
from steelyard.trace.notice_words import FORMS, NOT_SAID, TITLES, evidence, listed, probability

Kind = Literal["takedown", "withdrawal", "abuse"]
Step = Literal["sent", "answered", "removed", "refused", "closed"]
SIGHTED, REGISTERED, WRITTEN, STEPPED = "trace.sighted", "trace.registered", "notice.written", "notice.step"
PAGE, TEXT = "notice.html", "notice.md"
LONGEST = 4000  # characters of one text
MOST = 10_000  # entries of one list
WEAKEST = -6.0  # log10 of the probability: a likeness that chance explains better than so is no ground for a notice
_SHA256, _GRANT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WORK = ("kind", "subject", "weights")
_COPIES = ("exact copy", "same tensors", "quantised", "derived")


@dataclass(frozen=True)
class Sighting:
    """A copy that was seen. `work` is what identifies the reference; `digests` are (name, SHA-256), the name '' where
    there is none."""

    event: Event
    reference: str
    work: tuple[tuple[str, str], ...]
    verdict: str
    changes: tuple[str, ...]
    evidence: tuple[str, ...]
    log10_p: float
    locations: tuple[str, ...]
    digests: tuple[tuple[str, str], ...]
    grants: tuple[str, ...]
    fingerprint: str | None = None

    @classmethod
    def of(cls, event: Event) -> Sighting:
        """Raises FormatError, naming event and key, for another event or a payload that is not as described above."""
        where, raw = f"ledger event {event.seq}", event.payload
        if event.kind != SIGHTED:
            raise FormatError(f"{where}: is a {event.kind}, not a {SIGHTED}: name a sighting")
        log10_p = 0.0 if raw.get("log10_p", 0) is None else raw.get("log10_p")
        if isinstance(log10_p, bool) or not isinstance(log10_p, int | float) or not -1e9 <= log10_p <= 0:
            raise FormatError(f"{where}: log10_p: must be a number from -1e9 to 0")
        reference = raw.get("reference")
        if not isinstance(reference, dict):
            raise FormatError(f"{where}: reference: must be a mapping with the name of a registered model")
        digests = tuple(_digest(where, one) for one in _list(where, raw, "digests"))
        grants, mark = _texts(where, raw, "grants"), raw.get("fingerprint")
        if mark is not None and (not isinstance(mark, str) or _SHA256.fullmatch(mark) is None):
            raise FormatError(f"{where}: fingerprint: must be 64 lower-case hexadecimal digits, or null")
        for grant in grants:
            if _GRANT.fullmatch(grant) is None:
                raise FormatError(f"{where}: grants: {grant[:80]!r} is no grant's id: a name does not belong here")
        return cls(
            event=event,
            reference=_text(f"{where}: reference", reference, "name"),
            work=tuple((key, _text(f"{where}: reference", reference, key)) for key in _WORK if key in reference),
            verdict=_text(where, raw, "verdict"),
            changes=_texts(where, raw, "changes"),
            evidence=_texts(where, raw, "evidence"),
            log10_p=float(log10_p),
            locations=_texts(where, raw, "locations"),
            digests=digests,
            grants=grants,
            fingerprint=mark,
        )


def _text(where: str, raw: Mapping[str, Any], key: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        raise FormatError(f"{where}: {key}: must be a text that is not empty")
    if len(value) > LONGEST:
        raise FormatError(f"{where}: {key}: has {len(value):,} characters, at most {LONGEST:,} are shown to anybody")
    return value


def _list(where: str, raw: Mapping[str, Any], key: str) -> list[Any]:
    value = raw.get(key, [])
    if not isinstance(value, list):
        raise FormatError(f"{where}: {key}: must be a list")
    if len(value) > MOST:
        raise FormatError(f"{where}: {key}: has {len(value):,} entries, at most {MOST:,} are read")
    return value


def _texts(where: str, raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = _list(where, raw, key)
    if not all(isinstance(one, str) and one.strip() and len(one) <= LONGEST for one in found):
        raise FormatError(f"{where}: {key}: must be texts that are not empty, of at most {LONGEST:,} characters")
    return tuple(found)


def _digest(where: str, one: Any) -> tuple[str, str]:
    name, value = ("", one) if isinstance(one, str) else ("", None)
    if isinstance(one, dict):
        name, value = one.get("name", ""), one.get("sha256")
    if (
        not isinstance(name, str)
        or len(name) > LONGEST
        or not isinstance(value, str)
        or _SHA256.fullmatch(value) is None
    ):
        raise FormatError(f"{where}: digests: each must be 64 lower-case hexadecimal digits, with or without a name")
    return name, value


def find_sighting(ledger: Ledger, named: str) -> Sighting:
    """The sighting of that number in the ledger, or whose event's hash begins so (at least 8 digits).

    Raises UsageError where none or several are meant, FormatError for a sighting that is not as described above.
    """
    seen = ledger.events(SIGHTED)
    if re.fullmatch(r"\d{1,7}", named):
        found = [event for event in seen if event.seq == int(named)]
    elif re.fullmatch(r"[0-9a-f]{8,64}", named):
        found = [event for event in seen if event.hash.startswith(named)]
    else:
        raise UsageError(f"{named!r}: name a sighting by its number in the ledger, or by its event's hash")
    if len(found) != 1:
        known = ", ".join(str(event.seq) for event in seen[-10:]) or "none"
        said = f"begins {len(found)} sightings' hashes" if found else "is no sighting"
        raise UsageError(f"{named}: {said} of this ledger (its last: {known})")
    return Sighting.of(found[0])


def write_notice(
    ledger: Ledger,
    sighting: Sighting,
    kind: Kind,
    out: Path,
    *,
    reason: str = "",
    locations: Sequence[str] = (),
    now: datetime | None = None,
) -> Path:
    """Write the folder OUT/sighting-NUMBER-KIND with the notice as HTML and Markdown, and note it (`notice.written`).

    `locations` (URLs, magnet links, postal addresses) are added to the sighting's; `reason` says why the release was
    withdrawn, or what the abuse is. Both files are kept in the ledger's artifacts where it keeps any. Raises UsageError
    for a kind that is none, a missing reason or location, a location that is blank, of several lines or given twice,
    and SteelyardError where the folder exists or the evidence is too weak to accuse anybody.
    """
    if kind not in get_args(Kind):
        raise UsageError(f"{kind!r}: a notice is one of {', '.join(get_args(Kind))}")
    if kind != "takedown" and not reason.strip():
        raise UsageError(f"a notice of {kind} needs a reason: give --reason")
    _check_text(reason)
    locations = [_location(said) for said in locations]
    if len(set(locations)) < len(locations):
        raise UsageError("a location given twice: give each once")
    where = tuple(dict.fromkeys((*sighting.locations, *locations)))
    if not where:
        raise UsageError(f"sighting {sighting.event.seq} names no location: give --location")
    _check_grounds(sighting)
    document = _document(ledger, sighting, kind, where, reason, now or datetime.now(UTC))
    files = {PAGE: as_html(document).encode(), TEXT: as_markdown(document).encode()}
    place = out / f"sighting-{sighting.event.seq}-{kind}"
    with new_folder(place) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        if ledger.keeps_files:
            for name in files:
                ledger.put_file(folder / name)
        ledger.append(
            WRITTEN,
            {
                "sighting": sighting.event.mark,
                "kind": kind,
                "reference": sighting.reference,
                "locations": list(where),
                "files": {name: sha256_hex(data) for name, data in files.items()},
            },
        )
    return place


def proven(sighting: Sighting) -> bool:
    """Whether the sighting proves that the copy was made from the work: equal digests, or a chance of `WEAKEST`."""
    return sighting.verdict in _COPIES and (bool(sighting.digests) or sighting.log10_p <= WEAKEST)


def _check_text(said: str) -> None:
    if len(said) > LONGEST:
        raise UsageError(f"{said[:40]!r}...: has {len(said):,} characters: give at most {LONGEST:,}")
    try:
        said.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{said[:40]!r}: is no UTF-8: write it anew") from None


def _location(said: str) -> str:
    _check_text(said)
    said = said.strip()
    if not said:
        raise UsageError("a location is blank: give --location with the address of the copy")
    if not said.isprintable():
        raise UsageError(f"{quote(said)}: a location with line ends or invisible marks: write plain text on one line")
    return said


def _check_grounds(sighting: Sighting) -> None:
    if dict(sighting.work).get("kind") == "base":
        raise SteelyardError(
            f"sighting {sighting.event.seq}: {sighting.reference} is registered as a public base, which is not ours: "
            "no ground for a notice"
        )
    if not proven(sighting):
        chance = f"chance explains the likeness with probability {probability(sighting.log10_p)}"
        raise SteelyardError(
            f"sighting {sighting.event.seq}: its verdict is {sighting.verdict!r}, and {chance}: no ground for a "
            f"notice, which needs a copy and at most 1e{WEAKEST:g}, or equal digests"
        )


def record_step(ledger: Ledger, sighting: Sighting, step: Step, note: str = "") -> Event:
    """Note what became of a notice. Raises UsageError for another step, and where no notice was written."""
    if step not in get_args(Step):
        raise UsageError(f"{step!r}: a step is one of {', '.join(get_args(Step))}")
    _check_text(note)
    if not ledger.events(WRITTEN, sighting=sighting.event.mark):
        raise UsageError(f"sighting {sighting.event.seq}: no notice was written yet: give --kind")
    return ledger.append(STEPPED, {"sighting": sighting.event.mark, "step": step, "note": note})


def _document(
    ledger: Ledger, sighting: Sighting, kind: Kind, locations: Sequence[str], reason: str, now: datetime
) -> Document:
    head = ledger.head()
    record = [
        ("Sighting (ledger event)", sighting.event.mark),
        ("Seen", sighting.event.time),
        ("Ledger head when this was written", head.mark if head else "none"),
        ("Written", now.astimezone(UTC).isoformat(timespec="seconds")),
    ]
    sections = [
        _work(ledger, sighting),
        *([Section("Why").quoted(reason)] if reason.strip() else []),
        listed(Section("Where the copy is"), locations),
        evidence(_finding(sighting), sighting.digests, sighting.log10_p, sighting.evidence, sighting.grants),
        *FORMS[kind](),
        Section("What this notice does not say").text(NOT_SAID),
        Section("Record").pairs(record),
    ]
    return Document(f"{TITLES[kind]}: {sighting.reference}", "Draft: unsigned, not sent.", sections)


def _finding(sighting: Sighting) -> str:
    return sighting.verdict + (f" ({', '.join(sighting.changes)})" if sighting.changes else "")


def _work(ledger: Ledger, sighting: Sighting) -> Section:
    rows = [("Name", sighting.reference), *((key.capitalize(), value) for key, value in sighting.work)]
    found = ledger.events(REGISTERED, name=sighting.reference)
    if found:
        rows += [("Registered", found[-1].time), ("Registration (ledger event)", found[-1].mark)]
    else:
        rows.append(("Registered", "not in this ledger"))
    return Section("The work").pairs(rows)

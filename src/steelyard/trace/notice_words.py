"""What a notice says: the evidence in words, and the statements of law with their blanks (`notices.py`).

The statements follow 17 U.S.C. 512(c)(3)(A)(i)-(vi) and Article 16(2)(a)-(d) of Regulation (EU) 2022/2065. A person
completes them and signs; nothing here is legal advice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from steelyard.trace.notice_page import Section

MOST = 200  # locations or digests shown; a notice that lists more is not read
BLANK = "_" * 40
TITLES = {"takedown": "Notice of a copy", "withdrawal": "Notice of withdrawal", "abuse": "Notice of abuse"}
NOT_SAID = (
    "It names nobody who may have passed the copy on. Copies are marked by grant, and a grant's id stands for a "
    "recipient whose identity is kept apart from this record. A mark tells which copy this one descends from; a holder "
    "of the release keys could have made such a copy too."
)
_EQUAL = "These SHA-256 digests are equal to the work's. Different contents do not have equal digests in practice."
_ASKED = {
    "takedown": "We ask that the material named above be removed, or access to it disabled.",
    "withdrawal": "The release was withdrawn by its publisher. We ask that copies of it be removed.",
    "abuse": "We ask that the material named above be reviewed under your terms, and removed where it breaks them.",
}
_SIGNED = [("Signature (by hand or electronic)", BLANK), ("Date", BLANK)]
_CONTACT = [(name, BLANK) for name in ("Name", "Organisation", "Postal address", "Telephone", "E-mail")]
_DMCA = "Under 17 U.S.C. 512(c)(3)(A) (DMCA): to be completed and signed by a person"
_GOOD_FAITH = (
    "(v) [ ] I have a good faith belief that use of the material in the manner complained of is not authorised by the "
    "copyright owner, its agent, or the law."
)
_PERJURY = (
    "(vi) [ ] The information in this notice is accurate, and under penalty of perjury, I am authorised to act on "
    "behalf of the owner of an exclusive right that is allegedly infringed."
)
_DSA = "Under Article 16(2) of Regulation (EU) 2022/2065 (DSA): to be completed and signed by a person"
_WHY = "(a) Why the information is alleged to be illegal content (law and facts, beyond the evidence above):"
_WHO = (
    "(c) Name and e-mail address of whoever submits this notice (not needed for the offences referred to in Articles 3 "
    "to 7 of Directive 2011/93/EU):"
)
_BONA_FIDE = (
    "(d) [ ] I have a bona fide belief that the information and allegations in this notice are accurate and complete."
)


def listed(section: Section, places: Sequence[str]) -> Section:
    """The first `MOST` of `places`, and how many more there are."""
    section.items(places[:MOST])
    return section if len(places) <= MOST else section.text(f"And {len(places) - MOST:,} more.")


def evidence(
    verdict: str,
    digests: Sequence[tuple[str, str]],
    log10_p: float,
    particulars: Sequence[str],
    grants: Sequence[str],
) -> Section:
    """Why the copy is said to be one: equal digests, or a probability with the method that it comes from."""
    section = Section("Why we say that it is a copy").pairs([("Finding", verdict)])
    if digests:
        section.text(_EQUAL).pairs([(name or "digest", value) for name, value in digests[:MOST]], as_code=True)
        if len(digests) > MOST:
            section.text(f"And {len(digests) - MOST:,} more.")
    chance = "The chance of such a likeness, were the copy made independently of the work, is at most"
    section.text(f"{chance} {probability(log10_p)}. The method and its assumptions:")
    section.items(list(particulars) or ["no further particulars were recorded"])
    if grants:
        section.text("The copy bears the mark of these grants:").items(grants)
    return section


def probability(log10_p: float) -> str:
    """A probability in digits, rounded up, from its decimal logarithm: `1e-57`."""
    return f"{10**log10_p:.2f}" if log10_p > -2 else f"1e{math.ceil(log10_p)}"


def _asked(kind: str) -> Section:
    return Section("What we ask for").text(_ASKED[kind])


def _dmca() -> Section:
    return (
        Section(_DMCA)
        .text("(i) Signature of a person authorised to act for the owner of the exclusive right: below.")
        .text("(ii) The work: as identified above. Owner of the right:")
        .pairs([("Owner", BLANK), ("Right that is infringed", BLANK)])
        .text("(iii) The material and where it is: as identified above.")
        .text("(iv) Contact:")
        .pairs(_CONTACT)
        .text(_GOOD_FAITH)
        .text(_PERJURY)
        .pairs(_SIGNED)
    )


def _dsa() -> Section:
    return (
        Section(_DSA)
        .text(_WHY)
        .pairs([("Explanation", BLANK)])
        .text("(b) Its exact electronic location: the addresses above.")
        .text(_WHO)
        .pairs([("Name", BLANK), ("E-mail", BLANK)])
        .text(_BONA_FIDE)
        .pairs(_SIGNED)
    )


def _plain() -> Section:
    return Section("To be completed and signed by a person").pairs([*_CONTACT, *_SIGNED])


FORMS = {
    "takedown": lambda: [_asked("takedown"), _dmca(), _dsa()],
    "withdrawal": lambda: [_asked("withdrawal"), _plain()],
    "abuse": lambda: [_asked("abuse"), _dsa()],
}

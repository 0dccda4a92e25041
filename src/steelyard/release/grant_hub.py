"""Take over the requests for access to a gated repository on the Hub: those that its form makes whole.

The repository's README asks for what a request needs (docs/grants.md):

    extra_gated_fields:
      Name: text
      Organisation: text
      Country: country
      Purpose: text
      I accept the licence with SHA-256 9f2c...: checkbox

What is taken over stays pending on the Hub: to accept it there would give out the repository's own files, the same to
everybody, and who is granted access gets a marked copy instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError

from steelyard.base.errors import SteelyardError
from steelyard.release.attest import first_of
from steelyard.release.grant_book import Book, Request, refuse_released
from steelyard.release.grant_request import Person, Sealed, Wanted
from steelyard.release.grants import enter
from steelyard.release.hub_client import HubClient, HubRequest

_FIELDS = {
    "name": ("name", "full name"),
    "organisation": ("organisation", "organization", "affiliation", "institution"),
    "country": ("country",),
    "purpose": ("purpose", "intended use", "research purpose"),
    "encrypts_to": ("encrypts_to", "x25519 public key"),
    "signs_with": ("signs_with", "signing public key"),
}


@dataclass(frozen=True)
class Imported:
    """What became of the requests there. `left_out`: the Hub's id of each, and why."""

    entered: tuple[Request, ...]
    already: int
    left_out: tuple[tuple[str, str], ...]


def import_requests(
    book: Book,
    client: HubClient,
    wanted: Wanted,
    *,
    licence: str,
    private: X25519PrivateKey,
    retain: timedelta,
    now: datetime | None = None,
) -> Imported:
    """Enter what is pending and was not taken over before. Raises as `grants.enter` does for a release that cannot be
    granted, HubError where the Hub does not answer; a request that is not whole is left out, with its reason."""
    with book.locked(now) as began:  # what is to be erased is
        refuse_released(book.ledger, wanted)
    known = {
        book.open(request, private, began).source
        for request in book.requests(began)
        if request.state != "forgotten" and request.wanted.weights == wanted.weights
    }
    entered, left_out, already = list[Request](), list[tuple[str, str]](), 0
    for asked in client.access_requests():
        source = f"hf://{client.repository}#{asked.id}"[:300]
        if source in known:
            already += 1
            continue
        try:
            person = Person.model_validate(_person(asked, licence))
        except ValidationError as error:
            left_out.append((asked.id, first_of(error, "request")))
            continue
        try:
            sealed = Sealed.new(wanted, person, source)
            entered.append(enter(book, sealed, licence=licence, private=private, retain=retain, now=now))
        except SteelyardError as error:
            left_out.append((asked.id, str(error)))
    return Imported(tuple(entered), already, tuple(left_out))


def _person(asked: HubRequest, licence: str) -> dict[str, Any]:
    """A request's fields as the form had them; the licence only where the box with its very digest was ticked."""
    given = {key.strip().casefold(): value for key, value in asked.fields.items()}
    found: dict[str, Any] = {"name": asked.name, "email": asked.email}
    for field, spelled in _FIELDS.items():
        value = next((given[key] for key in spelled if given.get(key)), None)
        if value is not None:
            found[field] = value
    if _ticked(given, licence):
        found["licence"] = licence
    return found


def _ticked(given: Mapping[str, Any], licence: str) -> bool:
    return any(licence in key and (value is True or value in ("true", "on", "yes")) for key, value in given.items())

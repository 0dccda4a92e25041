"""A workspace that grants access: a sealed release, its people, the grants' keys, and requests made up for tests.

desk = Desk.build(root)                 # or Desk.at(copy of root)
grant = desk.granted()                  # requested, reviewed by two, issued, countersigned
desk.deliver(grant.id, desk.root / "copy")
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from scenario import PASSPHRASE, PEOPLE, Chain, make_battery, make_policy
from securesystemslib.signer import CryptoSigner

from steelyard.base.canonical import sha256_hex
from steelyard.release.grant_book import Book, Grant, Request
from steelyard.release.grant_copy import licence_of, wanted_of
from steelyard.release.grant_deliver import Delivered, Keys, deliver
from steelyard.release.grant_keys import MarkKey, load_identity_key, load_mark_key, new_grant_keys
from steelyard.release.grant_request import Person, Sealed
from steelyard.release.grants import countersign, enter, issue, review
from steelyard.release.keys import load_signer, new_key, show_key
from steelyard.release.trust import Trust, load_trust

LICENCE = b"Research only.\n"
GRANTS = {"reviewers": ["bob.pub.pem", "carol.pub.pem", "eve.pub.pem"], "needed": 2}
WITNESS = "fay"
RETAIN = timedelta(days=30)


def public_pem(key: Any) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()  # type: ignore[no-any-return]


def person(**changes: Any) -> dict[str, Any]:
    return {
        "name": "Ada Lovelace",
        "organisation": "Analytical Engines",
        "country": "GB",
        "email": "ada@example.org",
        "purpose": "To measure toxicity in dialogue.",
        "licence": sha256_hex(LICENCE),
    } | changes


@dataclass(frozen=True)
class Desk:
    """The workspace under `root`."""

    chain: Chain

    @property
    def root(self) -> Path:
        return self.chain.root

    @property
    def bundle(self) -> Path:
        return self.root / "sealed" / "tiny"

    @property
    def trust_file(self) -> Path:
        return self.chain.keys / "trust.yaml"

    @property
    def trust(self) -> Trust:
        return load_trust(self.trust_file)

    @classmethod
    def build(cls, root: Path) -> None:
        chain = Chain(root, make_battery(), (make_policy(),))
        from scenario import make_model

        make_model(chain.model)
        (chain.model / "LICENSE").write_bytes(LICENCE)
        new_key(chain.keys, "me", PASSPHRASE)
        new_key(chain.keys, WITNESS, PASSPHRASE)
        for name in PEOPLE:
            new_key(chain.keys, name, PASSPHRASE)
        chain.people(witnesses=["fay.pub.pem"], grants=GRANTS)
        chain.test()
        candidate = chain.candidate()
        chain.approve(candidate, "bob")
        chain.approve(candidate, "carol")
        chain.seal(candidate)
        with chain.ledger() as ledger:
            new_grant_keys(root / "grants" / "keys", PASSPHRASE, ledger)

    @classmethod
    def at(cls, root: Path) -> Desk:
        return cls(Chain(root, make_battery(), (make_policy(),)))

    def copy(self, root: Path) -> Desk:
        shutil.copytree(self.root, root)
        return Desk.at(root)

    @contextmanager
    def book(self) -> Iterator[Book]:
        with self.chain.ledger() as ledger:
            yield Book(self.root / "grants", ledger)

    @property
    def identity(self) -> X25519PrivateKey:
        return load_identity_key(self.root / "grants" / "keys", PASSPHRASE)

    @property
    def mark(self) -> MarkKey:
        return load_mark_key(self.root / "grants" / "keys", PASSPHRASE)

    def signer(self, name: str) -> CryptoSigner:
        return load_signer(self.chain.keys, name, PASSPHRASE)

    def keys(self, name: str = "dora") -> Keys:
        return Keys(self.mark, self.identity, self.signer(name), show_key(self.chain.keys, name))

    # -- the way of a grant ------------------------------------------------------------------------------------------

    def sealed(self, public: bool = False, **changes: Any) -> Sealed:
        return Sealed.new(wanted_of(self.bundle), None if public else Person.model_validate(person(**changes)))

    def request(self, sealed: Sealed | None = None, **changes: Any) -> Request:
        with self.book() as book:
            given = {"licence": sha256_hex(licence_of(self.bundle)), "private": self.identity, "retain": RETAIN}
            return enter(book, sealed or self.sealed(), **(given | changes))

    def review(self, request: str, by: str, decision: Any = "approve", days: int = 100, **changes: Any) -> Path:
        with self.book() as book:
            found = book.request(request, _now())
            given = {"signer": self.signer(by), "card": show_key(self.chain.keys, by), "trust": self.trust}
            return review(book, found, book.open(found, self.identity), decision, days=days, **(given | changes))

    def issue(self, request: str, **changes: Any) -> Grant:
        with self.book() as book:
            found = book.request(request, _now())
            given = {"mark": self.mark, "trust": self.trust}
            return issue(book, found, book.open(found, self.identity), **(given | changes))

    def countersign(self, grant: str, by: str = WITNESS, **changes: Any) -> Path:
        with self.book() as book:
            return countersign(book, grant, **({"signer": self.signer(by), "trust": self.trust} | changes))

    def trusting(self, by: str) -> Trust:
        """A trust file of somebody else's, whose witness is `by`."""
        return replace(self.trust, witnesses=(self.signer(by).public_key,), releasers=())

    def granted(self, sealed: Sealed | None = None, **review: Any) -> Grant:
        request = self.request(sealed)
        for name in ("bob", "carol"):
            self.review(request.id, name, **review)
        grant = self.issue(request.id)
        self.countersign(grant.id)
        return grant

    def deliver(self, grant: str, to: Path, **changes: Any) -> Delivered:
        with self.book() as book:
            given = {"keys": self.keys(), "trust": self.trust, "bundle": self.bundle}
            return deliver(book, grant, to=to, **(given | changes))

    def kinds(self) -> list[str]:
        """What the ledger holds of grants, in order."""
        with self.chain.ledger() as ledger:
            return [event.kind.removeprefix("grant.") for event in ledger.events() if event.kind.startswith("grant.")]


def _now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)

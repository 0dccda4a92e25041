"""A request for access, as a person writes it, and as it is kept: sealed, apart from the ledger.

    # request.yaml
    name: Ada Lovelace
    organisation: Analytical Engines
    country: GB
    email: ada@example.org
    purpose: Measure toxicity in dialogue
    licence: 9f2c...                         # SHA-256 of the licence's text that is accepted
    encrypts_to: "-----BEGIN PUBLIC KEY..."  # X25519, perhaps: the copy is sealed to it
    signs_with: "-----BEGIN PUBLIC KEY..."   # P-256 or Ed25519, perhaps: the receipt is signed with it

The ledger holds a request's digest, which a secret salt in the sealed file makes impossible to guess: once that file is
erased, nothing says any more whose request it was.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from pydantic import Field, ValidationError, field_validator
from securesystemslib.signer import Key, SSlibKey  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.canonical import canonical_json, digest
from steelyard.base.errors import FormatError, UsageError
from steelyard.base.files import read_bounded
from steelyard.base.strict import strict_json
from steelyard.base.yamlfile import Document, read_yaml
from steelyard.release.attest import Sha256, Strict, first_of
from steelyard.release.grant_sealed import parse_recipient
from steelyard.release.public_keys import accepted
from steelyard.safety.words import visible

FILE_LIMIT = 50_000  # bytes
MAX_PURPOSE = 4_000  # characters
PUBLIC = "the public"

# One spelling of an address: a dot stands between two others, never first, last or twice.
_ATOM, _LABEL = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+", "[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
_ADDRESS = rf"^{_ATOM}(\.{_ATOM})*@{_LABEL}(\.{_LABEL})*$"
# Letters that look like nothing: fillers, selectors of variants but emoji's, vowels that are not written.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\U0001d173-\U0001d17a\U000e0100-\U000e01ef]"
)

_Name = Annotated[str, Field(min_length=1, max_length=200)]
_Pem = Annotated[str, Field(min_length=1, max_length=2_000)]


class Person(Strict):
    """Who asks, for what: what LLaMA's form asked for."""

    name: _Name
    organisation: _Name
    country: Annotated[str, Field(min_length=2, max_length=100)]
    email: Annotated[str, Field(max_length=254, pattern=_ADDRESS)]
    purpose: Annotated[str, Field(min_length=1, max_length=MAX_PURPOSE)]
    licence: Sha256
    encrypts_to: _Pem | None = None
    signs_with: _Pem | None = None

    def marks(self) -> set[str]:
        """What is one person's alone: the address, the keys."""
        keys = (self.encrypts_to, self.signs_with)
        return {self.email.casefold(), *(" ".join(key.split()) for key in keys if key is not None)}

    @field_validator("name", "organisation", "country", "purpose")
    @classmethod
    def _plain(cls, text: str) -> str:
        if not any(unicodedata.category(letter)[0] in "LNPS" for letter in text):
            raise ValueError("must not be blank")
        # In the order of the letters, so that nothing hides: no control or bidirectional mark, and one line.
        for piece in re.findall(r"(?s).{1,500}", text):
            if visible(piece) != piece or any(mark in piece for mark in "\t\n") or _BLANK.search(piece):
                raise ValueError("holds control characters, line ends or invisible marks: write plain text on one line")
        return text

    @field_validator("encrypts_to")
    @classmethod
    def _recipient(cls, pem: str | None) -> str | None:
        try:
            return None if pem is None else _spelled(pem, _pem(parse_recipient(pem.encode(), "encrypts_to")))
        except (FormatError, UnicodeEncodeError) as error:
            raise ValueError(str(error)) from error

    @field_validator("signs_with")
    @classmethod
    def _signer(cls, pem: str | None) -> str | None:
        try:
            if pem is not None:
                parse_signer(pem.encode(), "signs_with")
            return None if pem is None else _spelled(pem, _pem(load_pem_public_key(pem.encode())))
        except (FormatError, UnicodeEncodeError) as error:
            raise ValueError(str(error)) from error


def _spelled(pem: str, alone: str) -> str:
    """A key's text, which is that key and nothing beside it: text around it is shown to the reviewers, too."""
    if pem.split() != alone.split():
        raise ValueError("must be one public key in PEM and nothing else")
    return pem


def _pem(key: PublicKeyTypes) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


class Wanted(Strict):
    """Which release is asked for: the SHA-256 of its weights root, subject and manifest."""

    weights: Sha256
    subject: Sha256
    manifest: Sha256


class Sealed(Strict):
    """What a sealed request holds. `person` None: the public. `source`: where it was imported from."""

    format: Literal[1] = 1
    salt: Sha256
    wanted: Wanted
    person: Person | None
    source: Annotated[str, Field(max_length=300)] | None = None

    @classmethod
    def new(cls, wanted: Wanted, person: Person | None, source: str | None = None) -> Sealed:
        return cls(salt=secrets.token_hex(32), wanted=wanted, person=person, source=source)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it: what reviewers sign."""
        return digest(self.model_dump(mode="json"))

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    def who(self) -> str:
        """For people to read."""
        return PUBLIC if self.person is None else f"{self.person.name}, {self.person.organisation}"

    def same_person(self, other: Sealed) -> bool:
        """Whether both are by the holder of one address or one key, or both the public's."""
        if self.person is None or other.person is None:
            return self.person is other.person
        return not self.person.marks().isdisjoint(other.person.marks())


def read_person(path: Path) -> Person:
    """A request's file, JSON or YAML. Raises UsageError naming the key that is wrong."""
    if path.suffix == ".json":
        try:
            raw: Any = strict_json(read_bounded(path, FILE_LIMIT), str(path), limit=FILE_LIMIT)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}: give the file of an access request") from error
        document = Document(str(path), "access request")
    else:
        raw, document = read_yaml(path, "access request", FILE_LIMIT)
    return document.validate(Person, raw)


def parse_sealed(data: bytes, where: str) -> Sealed:
    """A request that was opened. Raises FormatError."""
    try:
        return Sealed.model_validate(strict_json(data, where, limit=FILE_LIMIT))
    except ValidationError as error:
        raise FormatError(f"{where}: {first_of(error, 'request')}") from error


def parse_signer(pem: bytes, where: str) -> Key:
    """A P-256 or Ed25519 public key (PEM). Raises FormatError."""
    if b"PRIVATE KEY" in pem:
        raise FormatError(f"{where}: is a private key: give the public one")
    try:
        public = load_pem_public_key(pem)
    except ValueError as error:
        raise FormatError(f"{where}: not a public key in PEM: {' '.join(str(error).split())[:200]}") from error
    if not accepted(public):
        raise FormatError(f"{where}: only P-256 and Ed25519 keys are accepted")
    key: Key = SSlibKey.from_crypto(public)
    return key


def recipient_of(sealed: Sealed) -> X25519PublicKey | None:
    """The key that a copy is sealed to, where the request names one."""
    pem = None if sealed.person is None else sealed.person.encrypts_to
    return None if pem is None else parse_recipient(pem.encode(), "encrypts_to")


def signer_of(sealed: Sealed) -> Key | None:
    """The key that the receipt is signed with, where the request names one."""
    pem = None if sealed.person is None else sealed.person.signs_with
    return None if pem is None else parse_signer(pem.encode(), "signs_with")

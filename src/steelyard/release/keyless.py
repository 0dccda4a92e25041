"""Sigstore keyless signatures (`--sigstore`): an OpenID Connect identity signs, and public logs remember it.

Signing needs the network: an identity token (of a CI job, of the browser, or given), Fulcio for a certificate that
lives ten minutes, Rekor for the entry in the log. Checking needs none: the bundle brings the log's proof, and the keys
of Fulcio and Rekor come from the verifier's own trusted root, or from the one that the sigstore package brings. The
verifier names whom he trusts, identity *and* issuer: anybody can sign with Sigstore.

Nothing here runs, and no package of Sigstore's is imported, unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import read_bounded, write_atomic
from steelyard.base.progress import Progress
from steelyard.release.attest import PAYLOAD_TYPE, SignatureError
from steelyard.release.certificates import identity_of, read_certificate
from steelyard.release.oms_format import ModelSignature, ParsedSignature

_ROOT_LIMIT = 1_000_000  # bytes


@dataclass(frozen=True)
class SigstoreIdentity:
    """Whom the verifier trusts: who proved to `issuer` that he is `identity`."""

    identity: str  # mail address, or URI of a CI job
    issuer: str  # https://...
    trusted_root: Path | None = None  # Sigstore's trusted_root.json; without it the package's own

    def __post_init__(self) -> None:
        if not self.identity.strip() or not self.issuer.startswith("https://"):
            raise UsageError(
                f"Sigstore identity {self.identity[:80]!r} of issuer {self.issuer[:80]!r}: both are needed, the issuer"
                " as a https:// address (such as https://token.actions.githubusercontent.com)"
            )


def sign_model_keyless(
    folder: Path,
    signature: Path,
    ignored: Sequence[str],
    expected_root: str | None = None,
    *,
    identity_token: str | None = None,
    issuer: str | None = None,
    trust_config: Path | None = None,
    hashes: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> ModelSignature:
    """As `sign_model`, signed by Sigstore instead of a key. Without `identity_token`, that of the CI job it runs in, or
    else the browser is asked. `trust_config`: another Sigstore than the public one (ClientTrustConfig, JSON).

    Raises SteelyardError where Sigstore cannot be reached or does not accept the identity.
    """
    from steelyard.release.oms import write_signature

    if trust_config is not None and not trust_config.is_file():
        raise UsageError(f"{trust_config}: no such file: give Sigstore's ClientTrustConfig in JSON")
    if issuer is not None and not issuer.startswith("https://"):
        raise UsageError(f"issuer {issuer[:80]!r}: give its https:// address")

    def configure(config: Any, scratch: Path) -> None:
        config.use_sigstore_signer(
            oidc_issuer=issuer,
            use_ambient_credentials=True,
            identity_token=identity_token,
            trust_config=trust_config,
        )

    try:
        parsed = write_signature(
            folder, signature, configure, ignored, expected_root, hashes=hashes, name=name, progress=progress
        )
    except SteelyardError:
        raise
    except Exception as error:  # of requests, tuf, sigstore, pydantic: each layer has its own
        raise _unreachable(error) from error
    own = read_certificate(parsed.chain[0], str(signature))
    write_atomic(signature, parsed.raw)
    return ModelSignature(
        root=parsed.signature.root,
        files=parsed.signature.files,
        ignored=parsed.signature.ignored,
        method="sigstore",
        key=identity_of(own),
        keyid=SSlibKey.from_crypto(own.public_key()).keyid,
    )


def check_sigstore(parsed: ParsedSignature, identities: Sequence[SigstoreIdentity], where: str) -> tuple[str, str]:
    """The identity among `identities` that signed, and its key's id; offline. Raises SignatureError or FormatError."""
    own = read_certificate(parsed.chain[0], where)
    claimed = str(identity_of(own))[:80]
    if not identities:
        raise SignatureError(
            f"{where}: signed by Sigstore for {claimed!r}; name the identity and issuer that you trust (trust file)"
        )
    from sigstore.errors import Error
    from sigstore.models import Bundle, ClientTrustConfig, TrustedRoot
    from sigstore.verify import Verifier
    from sigstore.verify.policy import Identity

    try:
        bundle = Bundle.from_json(parsed.raw)
    except (Error, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{where}: not a Sigstore bundle: {_line(error)}") from error
    reasons = []
    for trusted in identities:
        if trusted.trusted_root is None:
            root = ClientTrustConfig.production(offline=True).trusted_root
        else:
            root = _trusted_root(trusted.trusted_root, TrustedRoot)
        try:
            kind, payload = Verifier(trusted_root=root).verify_dsse(
                bundle, Identity(identity=trusted.identity, issuer=trusted.issuer)
            )
        except (Error, ValueError, TypeError, KeyError) as error:
            reasons.append(_line(error))
            continue
        if kind != PAYLOAD_TYPE or payload != parsed.payload:
            raise SignatureError(f"{where}: Sigstore's log is about another statement")
        return trusted.identity, SSlibKey.from_crypto(own.public_key()).keyid
    raise SignatureError(f"{where}: signed by Sigstore for {claimed!r}, not proven for whom you trust: {reasons[0]}")


def _trusted_root(path: Path, kind: Any) -> Any:
    """The verifier's own trusted root. Raises FormatError, or SteelyardError where it cannot be read."""
    from sigstore.errors import Error

    try:
        read_bounded(path, _ROOT_LIMIT)
        return kind.from_file(str(path))
    except OSError as error:
        raise SteelyardError(f"{path}: {error.strerror}: give Sigstore's trusted_root.json") from error
    except (Error, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{path}: not Sigstore's trusted_root.json: {_line(error)}") from error


def _unreachable(error: Exception) -> SteelyardError:
    text = f"Sigstore did not sign: {type(error).__name__}: {_line(error)}"
    remedy = "--sigstore needs the network and an identity; offline, sign with a key (--key)"
    return SteelyardError(f"{text}: {remedy}")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()).split(" [type=")[0]  # pydantic goes on about its types
    return text[:300] or type(error).__name__

#!/usr/bin/env python3
"""Check a Steelyard bundle without Steelyard: Python's standard library and `cryptography`, nothing else.

    python verify.py BUNDLE --key maker.pub.pem
    python verify.py BUNDLE --evaluator alice.pub.pem --releaser dora.pub.pem \
                            --approver bob.pub.pem --approver carol.pub.pem --approvals 2

Checked: the evaluator's statement says PASSED for the manifest in the bundle; as many approvers as you ask for signed;
the releaser signed the summary and the model signature; the folder holds what the manifest and the model signature
list, each file unchanged, and nothing else. The keys are yours: P-256 or Ed25519, PEM; --key holds every role.

Not checked: whether the statements are true. `steelyard verify` recomputes every number from the journal, holds it
against a policy of yours, and knows certificates, commitments, the order of time, revoked keys, withdrawn releases.
"""

import argparse
import base64
import hashlib
import json
import sys
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

MANIFEST, TEST, SUMMARY, MODEL = (
    f"steelyard/{name}" for name in ("manifest.json", "test-result.dsse.json", "summary.dsse.json", "model.sig")
)
APPROVALS = [f"steelyard/approval-{number}.dsse.json" for number in range(1, 10)]
# The files that sign, and one that a Hub adds. Manifest and model signature list neither, and must list all others.
COUNTERSIGNED = {"steelyard/commitment.dsse.json", "steelyard/commitment.tsr"}
UNLISTED = {MODEL, TEST, SUMMARY, *APPROVALS, *COUNTERSIGNED, ".gitattributes"}
IN_TOTO, STATEMENT = "application/vnd.in-toto+json", "https://in-toto.io/Statement/v1"
TEST_RESULT, SVR = "https://in-toto.io/attestation/test-result/v0.1", "https://in-toto.io/attestation/svr/v0.2"
APPROVAL, OMS = "steelyard:approval/v1", "https://model_signing/signature/v1.0"
LIMIT = 10_000_000  # bytes of a file that is read as JSON
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError)


def load_key(path):
    key = load_pem_public_key(Path(path).read_bytes())
    p256 = isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1)
    if not p256 and not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"{path}: neither a P-256 nor an Ed25519 public key")
    return key


def read(bundle, name):
    if (bundle / name).stat().st_size > LIMIT:
        raise ValueError(f"{name}: over {LIMIT:,} bytes")
    return json.loads((bundle / name).read_bytes())


def opened(envelope, name, keys, predicate_type):
    """The subjects (name to SHA-256) and predicate of a DSSE envelope that one of `keys` signed, and that key."""
    payload, kind = base64.b64decode(envelope["payload"], validate=True), envelope["payloadType"]
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)  # DSSE's PAE: what is signed
    (signature,) = envelope["signatures"]
    for key in keys:
        scheme = () if isinstance(key, Ed25519PublicKey) else (ECDSA(SHA256()),)
        try:
            key.verify(base64.b64decode(signature["sig"], validate=True), message, *scheme)
        except InvalidSignature:
            continue
        statement = json.loads(payload)
        if (kind, statement["_type"], statement["predicateType"]) != (IN_TOTO, STATEMENT, predicate_type):
            raise ValueError(f"{name}: is no in-toto statement of type {predicate_type}")
        return {it["name"]: it["digest"]["sha256"] for it in statement["subject"]}, statement["predicate"], key
    raise ValueError(f"{name}: signed by none of your keys, or changed since")


def files_of(bundle):
    """Every file in the bundle, hashed. A link, or anything else that is no plain file, is refused."""
    hashes = {}
    for path in sorted(bundle.rglob("*")):
        name = path.relative_to(bundle).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{name}: is no plain file")
        if path.is_file():
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def compare(listed, hashes, where):
    for name in sorted(listed.keys() | hashes.keys()):
        if listed.get(name) != hashes.get(name):
            what = "is missing" if name not in hashes else "was changed" if name in listed else "was added"
            yield f"{name}: {what}, says {where}"


def check(bundle, evaluators, approvers, releasers, approvals):
    """Yields every problem; raises one of MALFORMED at a file that cannot be read or is not signed."""
    hashes = files_of(bundle)
    content = {name: sha256 for name, sha256 in hashes.items() if name not in UNLISTED}
    manifest = read(bundle, MANIFEST)
    if manifest["format"] != 2:
        yield f"{MANIFEST}: is of format {manifest['format']!r}; this script knows format 2"
    listed = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    yield from compare({**listed, MANIFEST: hashes[MANIFEST]}, content, MANIFEST)

    subjects, result, _ = opened(read(bundle, TEST), TEST, evaluators, TEST_RESULT)
    about = {name: subjects[name] for name in ("weights", "oms", MANIFEST)}
    if about[MANIFEST] != hashes[MANIFEST]:
        yield f"{TEST}: is about another manifest than the one in the bundle"
    if result["result"] != "PASSED" or result["failedTests"]:
        yield f"{TEST}: says {result['result']!r}, not PASSED"

    signed = set()
    for name in sorted(hashes.keys() & set(APPROVALS)):
        subjects, approval, key = opened(read(bundle, name), name, approvers, APPROVAL)
        signed.add(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
        if subjects != about or approval["test_result"] != hashes[TEST]:
            yield f"{name}: approves another test-result than the one in the bundle"
    if len(signed) < approvals:
        yield f"{len(signed)} of your approvers signed, you ask for {approvals}"

    subjects, summary, releaser = opened(read(bundle, SUMMARY), SUMMARY, releasers, SVR)
    if subjects != about or summary["steelyard"]["test_result"] != hashes[TEST]:
        yield f"{SUMMARY}: rests on another test-result than the one in the bundle"
    subjects, model, _ = opened(read(bundle, MODEL)["dsseEnvelope"], MODEL, [releaser], OMS)
    yield from compare({file["name"]: file["digest"] for file in model["resources"]}, content, MODEL)
    root = hashlib.sha256(b"".join(bytes.fromhex(file["digest"]) for file in model["resources"])).hexdigest()
    if set(subjects.values()) != {root} or root != about["oms"]:
        yield f"{MODEL}: signs another list of files than the one that was tested"


def main():
    parser = argparse.ArgumentParser(description="Check a Steelyard bundle with public keys of your own.")
    parser.add_argument("bundle", type=Path)
    for role in ("key", "evaluator", "approver", "releaser"):
        parser.add_argument(f"--{role}", action="append", default=[], metavar="PEM")
    parser.add_argument("--approvals", type=int, default=0, metavar="K", help="how many approvers must have signed")
    given, problems = parser.parse_args(), []
    try:
        roles = given.evaluator, given.approver, given.releaser
        keys = [[load_key(path) for path in given.key + own] for own in roles]
        for problem in check(given.bundle, *keys, given.approvals):
            problems.append(problem)
    except MALFORMED as error:
        problems.append(f"{type(error).__name__}: {error}")
    print(*problems, "NOT VERIFIED" if problems else "VERIFIED: signatures and files", sep="\n")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()

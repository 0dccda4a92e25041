"""A release of several people: attested, approved, sealed; by keys and by certificates."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from authority import root, write_chain
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cryptography.x509 import RFC822Name
from scenario import DISTINCT, PASSPHRASE, Chain, make_battery, make_policy

from steelyard.base.errors import SteelyardError
from steelyard.release import bundle as bundle_module
from steelyard.release import writing
from steelyard.release.keys import new_key, revoke_key
from steelyard.release.layout import APPROVALS, MODEL_SIGNATURE, SUMMARY, TEST_RESULT
from steelyard.release.refused import Refused
from steelyard.release.signers import Signing

OWN = make_policy(keys=DISTINCT)


@pytest.fixture(scope="session")
def tested(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A countersigned run and everybody's keys; nothing attested yet. Read only."""

    def make(folder: Path) -> None:
        chain = Chain.build(folder / "root", policies=[OWN], witness="eve")
        chain.people()

    return once("people", make) / "root"


@pytest.fixture
def chain(tested: Path, tmp_path: Path) -> Chain:
    return Chain(tested, make_battery(), (OWN,)).copy(tmp_path / "chain")


def verify(chain: Chain, bundle: Path) -> Any:
    return chain.verify(bundle, trust=chain.keys / "trust.yaml", policy=None)


def test_from_the_test_to_a_release(chain: Chain) -> None:
    candidate = chain.candidate()
    assert not any((candidate / name).exists() for name in (SUMMARY, MODEL_SIGNATURE, *APPROVALS))
    assert not verify(chain, candidate).ok
    assert chain.approve(candidate, "bob") == candidate / APPROVALS[0]
    with pytest.raises(SteelyardError, match="wants 2 approvals, here are 1: more approvers run steelyard approve"):
        chain.seal(candidate)
    assert chain.approve(candidate, "carol") == candidate / APPROVALS[1]
    bundle = chain.seal(candidate)
    result = verify(chain, bundle)
    assert result.ok, result.findings
    assert {"STEELYARD_APPROVALS_2", "STEELYARD_COUNTERSIGNED", "STEELYARD_TOXICITY_PASSED"} <= set(
        dict(result.seen)["properties"].split(", ")
    )
    with chain.ledger() as ledger:
        kinds = [event.kind for event in ledger.events() if event.kind.startswith("release.")]
        (event,) = ledger.events("release.bundled")
    assert kinds == ["release.decided", "release.attested", "release.bundled"]
    assert (event.payload["name"], event.payload["bundle"]) == ("tiny", result.manifest)
    assert [path.name for path in (chain.root / "candidates").iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("by", "says"),
    [
        ("alice", "is none of the approvers of your trust file"),
        ("dora", "is none of the approvers of your trust file"),
    ],
)
def test_who_may_not_approve(chain: Chain, by: str, says: str) -> None:
    candidate = chain.candidate()
    chain.approve(candidate, "bob")
    with pytest.raises(SteelyardError, match=says):
        chain.approve(candidate, by)
    assert sorted(path.name for path in (candidate / "steelyard").glob("approval*")) == ["approval-1.dsse.json"]


def test_one_person_approves_once(chain: Chain) -> None:
    """Whose approval is there gets it back, as after a kill. A second one of his, put there by hand, is refused."""
    candidate = chain.candidate()
    first = chain.approve(candidate, "bob")
    before = first.read_bytes()
    assert chain.approve(candidate, "bob") == first
    assert [path.read_bytes() for path in (candidate / "steelyard").glob("approval*")] == [before]
    first.with_name("approval-2.dsse.json").write_bytes(before)
    for who in ("bob", "carol"):
        with pytest.raises(SteelyardError, match="again: one person approves once"):
            chain.approve(candidate, who)
    with pytest.raises(SteelyardError, match="one person approves once"):
        chain.seal(candidate)


def test_what_a_killed_approval_left_is_removed(chain: Chain) -> None:
    """Not what another approval is writing just now, nor anything else."""
    candidate = chain.candidate()
    left, used, other = (
        candidate.with_name(f".tiny.{name}") for name in ("approval.12345678", "approval.abcdefgh", "x")
    )
    for path in (left, used, other):
        path.write_bytes(b"{}")
    with used.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        chain.approve(candidate, "bob")
        assert (left.exists(), used.exists(), other.exists()) == (False, True, True)
    chain.approve(candidate, "bob")
    assert not used.exists()


def test_who_may_not_seal(chain: Chain) -> None:
    candidate = chain.candidate()
    for name in ("bob", "carol"):
        chain.approve(candidate, name)
    with pytest.raises(SteelyardError, match="none of yours"):
        chain.seal(candidate, by="alice")
    with pytest.raises(SteelyardError, match="was attested as 'tiny'"):
        chain.seal(candidate, chain.root / "sealed" / "huge")
    assert not list((chain.root / "sealed").iterdir())


def test_one_person_cannot_do_it_all(chain: Chain) -> None:
    with pytest.raises(Refused, match="to be different people"):
        chain.bundle()


def test_a_candidate_that_was_changed_is_neither_approved_nor_sealed(chain: Chain) -> None:
    candidate = chain.candidate()
    chain.approve(candidate, "bob")
    (candidate / "README.md").write_text("# Better\n")
    with pytest.raises(SteelyardError, match=r"README\.md: was changed"):
        chain.approve(candidate, "carol")
    with pytest.raises(SteelyardError, match=r"README\.md: was changed"):
        chain.seal(candidate)


def test_a_bundle_is_not_approved(chain: Chain) -> None:
    candidate = chain.candidate()
    for name in ("bob", "carol"):
        chain.approve(candidate, name)
    with pytest.raises(SteelyardError, match="a release is neither approved nor sealed again"):
        chain.approve(chain.seal(candidate), "bob")


def test_approvals_given_on_copies_are_put_together(chain: Chain) -> None:
    candidate = chain.candidate()
    copy = Path(shutil.copytree(candidate, chain.root / "copy"))
    chain.approve(candidate, "bob")
    shutil.copy(chain.approve(copy, "carol"), candidate / APPROVALS[4])
    assert verify(chain, chain.seal(candidate)).ok


@pytest.mark.parametrize("step", ["manifest", "statement", "seal"])
def test_a_failure_on_the_way_leaves_nothing_and_can_be_repeated(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise RuntimeError("the disk is full")

    name = {"manifest": "manifest_bytes", "statement": "sign", "seal": "sign_model"}[step]
    with monkeypatch.context() as patch:
        if step != "seal":
            patch.setattr(writing, name, broken)
            with pytest.raises(RuntimeError):
                chain.candidate()
            assert not list((chain.root / "candidates").iterdir())
    candidate = chain.candidate()
    with monkeypatch.context() as patch:
        patch.setattr(bundle_module, "sign", broken)
        with pytest.raises(RuntimeError):
            chain.approve(candidate, "bob")
    for who in ("bob", "carol"):
        chain.approve(candidate, who)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "sign_model", broken)
        with pytest.raises(RuntimeError):
            chain.seal(candidate)
        assert not list((chain.root / "sealed").iterdir())
    assert verify(chain, chain.seal(candidate)).ok


# -- certificates ----------------------------------------------------------------------------------------------------


def certified(chain: Chain, name: str, issuer: Any, identity: str, **changes: Any) -> Signing:
    """A certificate for a person's key."""
    public = load_pem_public_key((chain.keys / f"{name}.pub.pem").read_bytes())
    between = issuer.issuer("Example Issuing CA")
    own = between.certify(public, names=[RFC822Name(identity)], **changes)
    return Signing(write_chain(chain.keys / f"{name}.chain.pem", [own, between.certificate]))


def test_people_by_their_certificates(chain: Chain) -> None:
    authority, other = root(), root("Another Root")
    authority.pem(chain.keys / "root.pem")
    other.pem(chain.keys / "other.pem")

    def pinned(name: str, file: str = "root.pem") -> dict[str, str]:
        return {"certificate_authority": file, "identity": f"{name}@example.org"}

    chain.people(evaluators=[pinned("alice")], approvers=[pinned("bob"), "carol.pub.pem"], releasers=[pinned("dora")])
    how = {name: certified(chain, name, authority, f"{name}@example.org") for name in ("alice", "bob", "dora")}
    candidate = chain.candidate(how=how["alice"])
    chain.approve(candidate, "bob", how=how["bob"])
    chain.approve(candidate, "carol")
    bundle = chain.seal(candidate, how=how["dora"])
    assert verify(chain, bundle).ok

    def reasons(**changes: Any) -> list[str]:
        chain.people(**({"evaluators": [pinned("alice")], "approvers": [pinned("bob"), "carol.pub.pem"],
                         "releasers": [pinned("dora")]} | changes))  # fmt: skip
        result = verify(chain, bundle)
        assert not result.ok
        return [finding.message for finding in result.findings]

    assert any("no chain from" in reason for reason in reasons(evaluators=[pinned("alice", "other.pem")]))
    assert any("whom you do not trust" in reason for reason in reasons(releasers=[pinned("frank")]))
    assert any("is trusted among" in reason for reason in reasons(releasers=[pinned("dora"), pinned("bob")]))
    assert any(reason.startswith(TEST_RESULT) for reason in reasons(evaluators=["carol.pub.pem"]))


@pytest.mark.parametrize("flaw", ["another root", "a missing link"])
def test_a_releaser_whose_chain_does_not_reach_the_pinned_root(chain: Chain, flaw: str) -> None:
    authority, other = root(), root()  # of one name
    authority.pem(chain.keys / "root.pem")
    chain.people(releasers=[{"certificate_authority": "root.pem", "identity": "dora@example.org"}])
    candidate = chain.candidate()
    for name in ("bob", "carol"):
        chain.approve(candidate, name)
    whole = certified(chain, "dora", authority, "dora@example.org")
    if flaw == "another root":
        bad = certified(chain, "dora", other, "dora@example.org")
    else:
        own = x509.load_pem_x509_certificates((chain.keys / "dora.chain.pem").read_bytes())[0]
        bad = Signing(write_chain(chain.keys / "short.pem", [own, authority.certificate]))
    with pytest.raises(SteelyardError) as error:
        chain.seal(candidate, how=bad)
    for file in (SUMMARY, MODEL_SIGNATURE):
        assert f"{file}: no chain from dora@example.org to the pinned" in str(error.value)
    assert "the signer adds the certificates between the two (--certificates), or you pin the root" in str(error.value)
    assert not list((chain.root / "sealed").glob("*"))
    if flaw == "a missing link":  # with the link the same key seals it
        assert verify(chain, chain.seal(candidate, how=whole)).ok


def test_an_approver_with_two_keys_and_one_certified_name_is_one_person(chain: Chain) -> None:
    authority = root()
    authority.pem(chain.keys / "root.pem")
    new_key(chain.keys, "bob2", PASSPHRASE)
    chain.people(approvers=[{"certificate_authority": "root.pem", "identity": "bob@example.org"}, "carol.pub.pem"])
    candidate = chain.candidate()
    chain.approve(candidate, "bob", how=certified(chain, "bob", authority, "bob@example.org"))
    with pytest.raises(SteelyardError, match="one person approves once"):
        chain.approve(candidate, "bob2", how=certified(chain, "bob2", authority, "bob@example.org"))


def test_one_key_with_two_certified_names_approves_once(chain: Chain) -> None:
    authority = root()
    authority.pem(chain.keys / "root.pem")
    pins = [{"certificate_authority": "root.pem", "identity": f"p{number}@example.org"} for number in (1, 2)]
    chain.people(approvers=pins)
    candidate = chain.candidate()
    first = chain.approve(candidate, "bob", how=certified(chain, "bob", authority, "p1@example.org"))
    assert chain.approve(candidate, "bob", how=certified(chain, "bob", authority, "p2@example.org")) == first
    with pytest.raises(SteelyardError, match="wants 2 approvals, here are 1"):
        chain.seal(candidate)


@pytest.mark.parametrize("who", ["alice", "bob"])
def test_a_certificate_does_not_give_a_key_a_second_role(chain: Chain, who: str) -> None:
    authority = root()
    authority.pem(chain.keys / "root.pem")
    chain.people(releasers=[{"certificate_authority": "root.pem", "identity": "releaser@example.org"}])
    candidate = chain.candidate()
    for name in ("bob", "carol"):
        chain.approve(candidate, name)
    with pytest.raises(SteelyardError, match="wants another person in each role"):
        chain.seal(candidate, by=who, how=certified(chain, who, authority, "releaser@example.org"))


def test_the_revocation_of_a_key_that_only_a_certificate_proves_counts(chain: Chain) -> None:
    authority = root()
    authority.pem(chain.keys / "root.pem")
    chain.people(releasers=[{"certificate_authority": "root.pem", "identity": "dora@example.org"}])
    candidate = chain.candidate()
    for name in ("bob", "carol"):
        chain.approve(candidate, name)
    bundle = chain.seal(candidate, how=certified(chain, "dora", authority, "dora@example.org"))
    assert verify(chain, bundle).ok
    revocation = revoke_key(chain.keys, "dora", PASSPHRASE, reason="stolen")
    result = chain.verify(bundle, trust=chain.keys / "trust.yaml", policy=None, revocations=[revocation])
    assert "revoked" in {finding.code for finding in result.findings}

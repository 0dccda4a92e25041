"""Withdrawing: who may, in which order, and what is left to do after every interruption."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from scenario import Chain
from securesystemslib.signer import CryptoSigner
from withdrawing import NOW, Verifier, after, content, entry, hexed

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.ledger.ledger import Ledger
from steelyard.model.identity import subject_of
from steelyard.release import withdraw as room
from steelyard.release.targets import Target, find_release
from steelyard.release.withdrawal import list_bytes, read_list

TARGET = Target(hexed("wizard manifest"), hexed("wizard weights"), "wizard")
SECOND = Target(hexed("second manifest"), hexed("second weights"), "second")


class Desk(Verifier):
    """A verifier's trust, with a workspace whose releases can be withdrawn."""

    def ledger(self) -> Ledger:
        return Ledger(self.folder / "ledger.sqlite")

    @property
    def file(self) -> Path:
        return self.folder / "withdrawn.json"

    @property
    def proposal(self) -> Path:
        return self.folder / "withdrawn.json.proposal"

    def place(self, ledger: Ledger, file: Path | None = None, name: str | None = "example") -> room.Place:
        return room.Place(file or self.file, self.trust, ledger, name)

    def withdraw(
        self, target: Target = TARGET, *who: int, reason: str = "missed the test", **more: Any
    ) -> room.Outcome:
        signers = [self.signers[number] for number in who or (0, 1)]
        with self.ledger() as ledger:
            return room.withdraw(target, reason, place=self.place(ledger), signers=signers, **({"now": NOW} | more))

    def refresh(self, *who: int, name: str | None = "example", **more: Any) -> room.Outcome:
        signers = [self.signers[number] for number in who or (0, 1)]
        with self.ledger() as ledger:
            return room.refresh(place=self.place(ledger, name=name), signers=signers, **({"now": NOW} | more))

    def sign(self, *who: int, proposal: Path | None = None, file: Path | None = None, **more: Any) -> room.Outcome:
        signers = [self.signers[number] for number in who]
        with self.ledger() as ledger:
            place = self.place(ledger, file)
            return room.sign_proposal(proposal or self.proposal, place=place, signers=signers, **({"now": NOW} | more))

    def kinds(self) -> list[str]:
        with self.ledger() as ledger:
            return [event.kind for event in ledger.events()]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_quorum_at_one_desk_puts_the_list_in_place(desk: Desk) -> None:
    outcome = desk.withdraw()
    assert (outcome.state, outcome.missing, outcome.file) == ("issued", 0, desk.file)
    assert desk.codes(desk.file, "wizard") == ["withdrawn"]
    assert desk.check(desk.file) == []
    assert not desk.proposal.exists()
    assert desk.kinds() == ["release.withdrawn", "release.list"]
    with desk.ledger() as ledger:
        noted = ledger.events("release.withdrawn")[0].payload
    assert (noted["manifest"], noted["reason"], noted["sequence"]) == (TARGET.manifest, "missed the test", 1)


def test_signers_sign_one_after_the_other_and_the_last_one_puts_it_in_place(desk: Desk) -> None:
    first = desk.withdraw(TARGET, 0)
    assert (first.state, first.missing, first.file) == ("proposed", 1, desk.proposal)
    assert not desk.file.exists()
    assert desk.codes(desk.proposal, "wizard") == ["list-signature"]
    assert desk.sign(0).state == "proposed"  # his own signature again
    assert desk.sign(2).state == "issued"
    assert desk.codes(desk.file, "wizard") == ["withdrawn"]
    assert desk.kinds() == ["release.withdrawal_proposed", "release.withdrawn", "release.list"]


def test_a_signer_on_another_machine_needs_the_list_before(desk: Desk, tmp_path: Path) -> None:
    desk.withdraw()
    desk.withdraw(SECOND, 0)
    away = Desk(tmp_path / "away", desk.signers)
    away.folder.mkdir()
    away.proposal.write_bytes(desk.proposal.read_bytes())
    with pytest.raises(SteelyardError, match="list before it"):
        away.sign(1)
    away.file.write_bytes(desk.file.read_bytes())
    assert away.sign(1).state == "issued"
    assert away.codes(away.file, "second") == ["withdrawn"]
    # The list goes back to the first machine, and the same command again does what is left there.
    desk.file.write_bytes(away.file.read_bytes())
    assert desk.withdraw(SECOND, 0).state in ("issued", "already")
    assert not desk.proposal.exists()
    assert desk.kinds().count("release.withdrawn") == 2


def test_entries_stay_and_numbers_rise(desk: Desk) -> None:
    desk.withdraw()
    outcome = desk.withdraw(SECOND, replaced_by=hexed("third"))
    assert outcome.signed.content.sequence == 2
    assert [one.name for one in outcome.signed.content.entries] == ["wizard", "second"]
    assert outcome.signed.content.entries[1].replaced_by == hexed("third")
    assert desk.codes(desk.file, "wizard") == ["withdrawn"]


def test_the_same_withdrawal_again_changes_nothing(desk: Desk) -> None:
    desk.withdraw()
    before, kinds = desk.file.read_bytes(), desk.kinds()
    assert desk.withdraw(reason="said differently").state == "already"
    assert desk.file.read_bytes() == before
    assert desk.kinds() == kinds


def test_refresh_issues_the_same_entries_anew(desk: Desk) -> None:
    desk.withdraw()
    desk.now = NOW + timedelta(days=31)
    assert desk.codes(desk.file) == ["list-expired"]
    outcome = desk.refresh(now=desk.now)
    assert outcome.signed.content.sequence == 2
    assert desk.check(desk.file) == []
    assert desk.codes(desk.file, "wizard") == ["withdrawn"]
    assert desk.refresh(2, now=desk.now).state == "proposed"
    assert desk.sign(0, now=desk.now).signed.content.sequence == 3


def test_an_empty_list_can_be_served_before_anything_is_withdrawn(desk: Desk) -> None:
    with pytest.raises(UsageError, match="--name"):
        desk.refresh(name=None)
    assert desk.refresh().signed.content.entries == ()
    assert desk.check(desk.file) == []


@pytest.mark.parametrize("reason", ["", "  \n", "x" * 1001])
def test_a_withdrawal_needs_a_reason(desk: Desk, reason: str) -> None:
    with pytest.raises(UsageError, match="reason"):
        desk.withdraw(reason=reason)
    assert not desk.file.exists()


def test_a_key_that_the_trust_file_does_not_name_may_not_sign(desk: Desk) -> None:
    stranger = replace_signer(desk, 1)
    for act in (stranger.withdraw, stranger.refresh):
        with pytest.raises(SteelyardError, match="none of the withdrawal signers"):
            act()
    desk.withdraw(TARGET, 0)
    with pytest.raises(SteelyardError, match="none of the withdrawal signers"), desk.ledger() as ledger:
        room.sign_proposal(desk.proposal, place=desk.place(ledger), signers=[CryptoSigner.generate_ecdsa()], now=NOW)
    with pytest.raises(UsageError, match="--key"), desk.ledger() as ledger:
        room.sign_proposal(desk.proposal, place=desk.place(ledger), signers=[], now=NOW)


def replace_signer(desk: Desk, number: int) -> Desk:
    """The same trust, and another key in one hand."""
    other = Desk(desk.folder, list(desk.signers))
    trust = desk.trust

    class Other(Desk):
        @property
        def trust(self) -> Any:
            return trust

    other = Other(desk.folder, [*desk.signers])
    other.signers = [CryptoSigner.generate_ecdsa() if n == number else one for n, one in enumerate(desk.signers)]
    return other


def test_one_key_twice_is_one_signature(desk: Desk) -> None:
    assert desk.withdraw(TARGET, 0, 0).state == "proposed"
    assert not desk.file.exists()


def test_another_proposal_waits_its_turn(desk: Desk) -> None:
    desk.withdraw(TARGET, 0)
    for act in (lambda: desk.withdraw(SECOND, 1), lambda: desk.refresh(1)):
        with pytest.raises(SteelyardError, match="a proposal waits there"):
            act()
    assert desk.withdraw(TARGET, 1).state == "issued"  # the same one again adds its signature


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d, now: after(now, []), "drops or changes an entry"),
        (lambda d, now: after(now, [entry("wizard", reason="other")]), "drops or changes an entry"),
        (lambda d, now: after(now, name="staging"), "does not follow"),
        (lambda d, now: after(now, sequence=3), "does not follow"),
        (lambda d, now: after(now, previous="0" * 64), "does not follow"),
        (lambda d, now: content(), "does not follow"),
    ],
)
def test_a_signer_does_not_sign_what_breaks_the_list(desk: Desk, make: Any, says: str) -> None:
    current = desk.withdraw().signed.content
    before = desk.file.read_bytes()
    desk.proposal.write_bytes(
        list_bytes(make(desk, current).model_copy(update={"issued": current.issued}), [desk.signers[0]])
    )
    with pytest.raises(SteelyardError, match=says):
        desk.sign(1)
    assert desk.file.read_bytes() == before


def test_a_stale_proposal_is_not_signed(desk: Desk) -> None:
    desk.withdraw(TARGET, 0)
    with pytest.raises(SteelyardError, match="propose it anew"):
        desk.sign(1, now=NOW + timedelta(days=31))
    with pytest.raises(SteelyardError, match="propose it anew"):
        desk.sign(1, now=NOW - timedelta(days=1))


def test_a_list_in_place_that_was_tampered_with_or_put_back_is_not_built_on(desk: Desk) -> None:
    desk.withdraw()
    first = desk.file.read_bytes()
    desk.withdraw(SECOND)
    second = desk.file.read_bytes()
    for damage in (lambda: desk.file.write_bytes(first), desk.file.unlink):
        damage()
        with desk.ledger() as ledger:  # it was kept, and is put back
            assert room.current_list(desk.place(ledger)) is not None
        assert desk.file.read_bytes() == second
    shutil.rmtree(desk.folder / "artifacts")
    for damage in (lambda: desk.file.write_bytes(first), desk.file.unlink):
        damage()
        with pytest.raises(SteelyardError, match=r"cannot be|missing"):
            desk.refresh()
    desk.file.write_bytes(list_bytes(content(), [desk.signers[0]]))
    with pytest.raises(SteelyardError, match="2 are needed"):
        desk.refresh()
    desk.file.write_bytes(b"{}")
    with pytest.raises(FormatError):
        desk.withdraw()


def test_a_clock_set_back_issues_nothing(desk: Desk) -> None:
    desk.withdraw()
    with pytest.raises(SteelyardError, match="set the clock right"):
        desk.refresh(now=NOW - timedelta(hours=1))


def test_a_list_that_would_never_end_is_not_made(desk: Desk) -> None:
    for valid in (timedelta(days=367), timedelta(0), timedelta(days=-1)):
        with pytest.raises(UsageError, match="--expires"):
            desk.withdraw(valid=valid)


def test_two_withdrawals_at_once_do_not_fork(desk: Desk) -> None:
    def one(number: int) -> Callable[[], None]:
        return lambda: void(desk.withdraw(Target(hexed(f"{number} m"), hexed(f"{number} w"), f"n{number}")))

    children = [forked(one(number)) for number in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    listed = read_list(desk.file.read_bytes(), "list").content
    assert listed.sequence == 3
    assert {one.name for one in listed.entries} == {"n0", "n1", "n2"}


def void(_: object) -> None:
    return None


def forked(act: Callable[[], None]) -> int:
    """Do it in a process of its own; gives its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        act()
        code = 0
    finally:
        os._exit(code)


# -- killed ----------------------------------------------------------------------------------------------------------


def moments(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    """Kill this process at its `stop_at`-th step: a file is replaced or removed, an event is appended."""
    count = 0

    def step(module: Any, name: str) -> None:
        original = getattr(module, name)

        def stepping(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            for moment in ("before", "after"):
                count += 1
                if count == stop_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if moment == "before":
                    result = original(*arguments, **named)
            return result

        monkeypatch.setattr(module, name, stepping)

    step(os, "replace")
    step(os, "unlink")
    step(Ledger, "append")


def sound(desk: Desk, allowed: Sequence[bytes | None]) -> None:
    """Whatever lies at the list's place is one of `allowed`, or the complete next list."""
    found = desk.file.read_bytes() if desk.file.exists() else None
    if found not in allowed:
        fresh = replace(desk, folder=desk.folder)  # the same verifier, with the state that he has
        assert fresh.codes(desk.file, "wizard") == ["withdrawn"]
    if desk.proposal.exists():
        read_list(desk.proposal.read_bytes(), "proposal")


def test_killed_at_every_step_nothing_half_written_is_accepted_and_a_rerun_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = 0
    for stop_at in range(1, 40):
        folder = tmp_path / str(stop_at)
        folder.mkdir()
        desk = Desk(folder)
        desk.refresh()
        desk.check(desk.file)
        before = desk.file.read_bytes()

        def act(desk: Desk = desk, stop_at: int = stop_at) -> None:
            moments(monkeypatch, stop_at)
            desk.withdraw()

        status = os.waitpid(forked(act), 0)[1]
        sound(desk, [before])
        assert desk.withdraw().state in ("issued", "already")
        complete(desk, sequence=2)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
    assert killed >= 10


def complete(desk: Desk, sequence: int) -> None:
    listed = read_list(desk.file.read_bytes(), "list").content
    assert (listed.sequence, [one.name for one in listed.entries]) == (sequence, ["wizard"])
    assert desk.codes(desk.file, "wizard") == ["withdrawn"]
    assert not desk.proposal.exists()
    with desk.ledger() as ledger:
        assert ledger.verify()
        assert len(ledger.events("release.withdrawn", manifest=TARGET.manifest)) == 1
        assert len(ledger.events("release.list", sequence=sequence)) == 1


def test_killed_at_ten_random_moments_a_rerun_completes(tmp_path: Path) -> None:
    random.seed(5)
    trial = Desk(tmp_path / "trial")
    trial.folder.mkdir()
    trial.refresh()
    began = time.monotonic()
    os.waitpid(forked(lambda: void(trial.withdraw())), 0)
    lasted = time.monotonic() - began
    for number in range(10):
        desk = Desk(tmp_path / str(number))
        desk.folder.mkdir()
        desk.refresh()
        before = desk.file.read_bytes()
        child = forked(lambda desk=desk: void(desk.withdraw()))  # type: ignore[misc]
        time.sleep(random.uniform(0, lasted))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sound(desk, [before])
        desk.withdraw()
        complete(desk, sequence=2)


# -- which release ---------------------------------------------------------------------------------------------------


def note(desk: Desk, kind: str = "release.bundled", **payload: Any) -> None:
    known = {"run": "r", "policy": "0" * 64, "subject": hexed("subject")}
    with desk.ledger() as ledger:
        ledger.append(kind, known | payload)


def find(desk: Desk, what: str, **more: Any) -> Target:
    with desk.ledger() as ledger:
        return find_release(what, ledger, **more)


def test_a_release_is_found_by_name_and_by_manifest(released: tuple[Chain, Path], tmp_path: Path) -> None:
    chain, bundle = released
    with chain.ledger() as ledger:
        target = find_release(str(bundle), ledger)
        assert find_release("tiny", ledger) == find_release(target.manifest, ledger) == target
        assert target.weights == subject_of(bundle).weights
        with pytest.raises(SteelyardError, match="--weights"):
            find_release("tiny", ledger, weights="0" * 64)


def test_a_bundle_whose_weights_were_changed_withdraws_nothing(
    released: tuple[Chain, Path], bundle_copy: Callable[[], Path]
) -> None:
    bundle, (chain, _) = bundle_copy(), released
    data = bytearray((bundle / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(data)
    with chain.ledger() as ledger, pytest.raises(FormatError, match="something else would be withdrawn"):
        find_release(str(bundle), ledger)


def test_a_release_that_nobody_knows_is_refused(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for what in ("wizard", TARGET.manifest, "", "/absent", "../.."):
        with pytest.raises(SteelyardError):
            find(desk, what)
    with pytest.raises(SteelyardError, match="is not a bundle"):
        find(desk, str(tmp_path / "empty"))


def test_a_name_of_several_releases_asks_which(desk: Desk) -> None:
    note(desk, name="wizard", bundle=TARGET.manifest)
    note(desk, name="wizard", bundle=SECOND.manifest)
    with pytest.raises(SteelyardError, match=SECOND.manifest):
        find(desk, "wizard")
    assert find(desk, SECOND.manifest, weights=SECOND.weights).manifest == SECOND.manifest


def test_weights_that_the_ledger_does_not_hold_are_asked_for(desk: Desk) -> None:
    note(desk, name="wizard", bundle=TARGET.manifest)
    with pytest.raises(SteelyardError, match="--weights"):
        find(desk, "wizard")
    assert find(desk, "wizard", weights=TARGET.weights) == TARGET
    for wrong in ("x", "A" * 64):
        with pytest.raises(SteelyardError, match="--weights"):
            find(desk, "wizard", weights=wrong)

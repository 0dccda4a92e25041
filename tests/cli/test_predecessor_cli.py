"""Two models in one job, through the command line."""

from __future__ import annotations

from commands import POLICIES, policy_file, put, release, steelyard, verify
from scenario import Chain, make_battery, make_model


def test_a_model_is_tested_beside_the_one_it_comes_after_and_released(untested: Chain) -> None:
    chain, old = untested, untested.root / "old"
    make_model(old, seed=7)
    battery = put(chain.root / "battery.json", make_battery(samples=1).model_dump(mode="json"))
    policies = [text for one in POLICIES for text in ("--policy", policy_file(chain.root, one.name))]
    place = ["--workspace", chain.root, "--battery", battery, *policies]
    done = steelyard("safety", "run", chain.model, chain.run, "--predecessor", old, *place)
    assert "against the predecessor" in done.out
    assert "Improved: none. Worse: none. Undecided: toxicity.degeneration, " in done.out
    again = steelyard("safety", "run", chain.model, chain.run, *place, code=1)
    assert "this run was started with a predecessor" in again.err
    release(chain, code=0)
    shown = verify(chain, chain.root / "releases" / "tiny", code=0).out
    assert "predecessor's journal root" in shown
    (chain.root / "releases" / "tiny" / "steelyard" / "predecessor.jsonl").unlink()
    assert "steelyard/predecessor.jsonl: is missing" in verify(chain, chain.root / "releases" / "tiny").out


def test_a_predecessor_that_is_the_model_itself_is_refused(untested: Chain) -> None:
    done = steelyard(
        *("safety", "run", untested.model, untested.run, "--predecessor", untested.model),
        *("--workspace", untested.root, "--policy", policy_file(untested.root)),
        *("--battery", put(untested.root / "battery.json", make_battery().model_dump(mode="json"))),
        code=2,
    )
    assert "the predecessor is the candidate itself" in done.err
    assert not untested.run.exists()

"""Searching the training data through the command line."""

from __future__ import annotations

import json

from commands import release, steelyard, verify
from scenario import Chain


def test_probes_in_the_training_data_are_shown_and_refused(chain: Chain) -> None:
    probes = [probe.prompt for probe in chain.battery.probes() if probe.axis == "lookalike"]
    (chain.root / "rows.jsonl").write_text("".join(json.dumps({"said": text}) + "\n" for text in probes[:4]))
    (chain.root / "fine.txt").write_text("A fine day.")
    command = ["safety", "overlap", chain.run, "--workspace", chain.root]
    done = steelyard(*command, code=2)
    assert "give --data" in done.err
    done = steelyard(*command, "--data", chain.root / "absent", code=2)
    assert "absent: no such file or folder" in done.err
    done = steelyard(*command, "--data", chain.root / "fine.txt", "--undeclared", "a base model's data")
    assert "0 of 58 probes stand in what was searched (3 words of fine.txt); not declared: a base" in done.out
    release(chain, code=0)
    assert "not declared: a base model's data" in verify(chain, chain.root / "releases" / "tiny", code=0).out


def test_a_limit_of_the_policy_and_another_ledger(chain: Chain) -> None:
    probes = [probe.prompt for probe in chain.battery.probes() if probe.axis == "lookalike"]
    (chain.root / "rows.jsonl").write_text("".join(json.dumps({"said": text}) + "\n" for text in probes[:4]))
    command = ["safety", "overlap", chain.run, "--data", chain.root / "rows.jsonl"]
    found = json.loads(steelyard(*command, "--workspace", chain.root, "--json").out)
    assert found["axes"]["lookalike"] == {"probes": 12, "found": 4, "share": round(4 / 12, 9)}
    done = release(chain)
    assert "FAIL under policy lenient" in done.out
    assert "lookalike 33.3%; such as lookalike-000" in done.out
    assert "no ledger here" in steelyard(*command, "--workspace", chain.root / "else", code=1).err

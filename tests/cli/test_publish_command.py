"""`steelyard publish` as a user calls it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import TESTS, Done, policy_file, refused, release, steelyard, verify
from scenario import Chain

sys.path.insert(0, str(TESTS / "release"))

from hub_server import WRITE, HubServer


def publish(chain: Chain, to: object, *more: object, code: int = 0, **env: str) -> Done:
    place = ["--key", chain.public, "--policy", policy_file(chain.root), "--workspace", chain.root, *more]
    return steelyard("publish", chain.root / "releases" / "tiny", "--to", to, *place, code=code, env=env)


def test_publish(chain: Chain, tmp_path: Path) -> None:
    release(chain, code=0)
    bundle = chain.root / "releases" / "tiny"
    place = ["--workspace", chain.root]
    # Usage: whom to trust, and where to.
    for wrong in (["--to", tmp_path / "x"], ["--to", "s3://x", "--key", chain.public]):
        done = steelyard("publish", bundle, *wrong, *place, code=2)
        assert not (tmp_path / "x").exists()
    assert "unknown kind of place" in done.err
    both = ["--key", chain.public, "--trust", chain.public]
    assert "whom do you trust" in steelyard("publish", bundle, "--to", tmp_path / "x", *both, *place, code=2).err
    # Under a policy that it was not tested under it does not verify, so it is not published.
    under = ["--key", chain.public, "--policy", "public"]
    done = steelyard("publish", bundle, "--to", tmp_path / "x", *under, *place, code=1)
    refused(done, "does not verify, so nothing is published")
    assert not (tmp_path / "x").exists()

    done = publish(chain, tmp_path / "site" / "tiny")
    assert "published: " in done.out
    verify(chain, tmp_path / "site" / "tiny", code=0)
    assert "was published already: " in publish(chain, tmp_path / "site" / "tiny").out
    found = publish(chain, tmp_path / "other", "--json").json
    assert found["destination"] == str(tmp_path / "other")
    events = steelyard("ledger", "show", *place, "--json").json
    assert [event["kind"] for event in events].count("release.published") == 2


def test_publish_to_the_hub(chain: Chain, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    release(chain, code=0)
    with HubServer(tmp_path / "hub") as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HOME": str(tmp_path / "home")}
        done = publish(chain, "hf://org/tiny", "--gated", "manual", "--json", **env)
        verify(chain, hub.checkout("org/tiny", tmp_path / "found"), code=0)
        assert hub.repositories["org/tiny"].gated == "manual"
        assert done.json["commit"] == hub.repositories["org/tiny"].commits[-1][0]
        assert [json.loads(line) for line in done.err.splitlines()]
        wrong = publish(chain, "hf://org/more", code=1, **(env | {"HF_TOKEN": "hf_" + "x" * 34}))
        refused(wrong, "hf://org/more", "HTTP 401", "hf auth login")
        assert "hf_" + "x" * 34 not in wrong.out + wrong.err

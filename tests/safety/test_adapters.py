"""A battery whose scorer is somebody else's model, and its card."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from safety_fakes import SCORERS, FakeEndpoint, battery, calibration, job, policy, polite
from typer.testing import CliRunner

from steelyard.base.canonical import canonical_json
from steelyard.cli.scorer import app
from steelyard.inference.endpoint import Request
from steelyard.ledger.ledger import Ledger
from steelyard.recipe.stages import scorer_files
from steelyard.safety.battery import battery_folder, load_battery
from steelyard.safety.journal import ScoreLine, read_journal
from steelyard.safety.run import run_battery
from steelyard.scorers.registry import open_scorer


@pytest.fixture
def service() -> Iterator[str]:
    """A moderation service that knows the insults among the canaries, and gives every text its own score."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
            found = any(
                word in text for word in ("shit", "idiot", "bitch", "bastard", "retard", "trash", "connard", "pigs")
            )
            data = json.dumps(
                {"results": [{"category_scores": {"harassment": found * 0.9 + len(text) % 50 / 1000}}]}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(service: str, tmp_path: Path) -> Path:
    """`battery.yaml`, and `scorers/toxicity.yaml` that it names."""
    place = tmp_path / "test"
    (place / "scorers").mkdir(parents=True)
    spec = {
        "name": "service",
        "kind": "moderation",
        "base_url": service,
        "model": "m",
        "labels": {"toxicity": "harassment"},
    }
    (place / "scorers" / "toxicity.yaml").write_text(yaml.safe_dump(spec | {"calibration": "errors.json"}))
    (place / "scorers" / "open.yaml").write_text(yaml.safe_dump(spec))
    errors = {"categories": {"toxicity": calibration().model_dump(mode="json")}}
    (place / "scorers" / "errors.json").write_bytes(canonical_json(errors))
    written = battery(families=3).model_dump(mode="json")
    written["scorers"]["toxicity"] = "adapter:scorers/toxicity.yaml"
    (place / "battery.json").write_text(json.dumps(written))
    return place


def test_a_battery_runs_with_it(folder: Path, tmp_path: Path) -> None:
    name = str(folder / "battery.json")
    chosen, beside = load_battery(name), battery_folder(name)
    scorers = {**SCORERS, "toxicity": open_scorer(chosen.scorers["toxicity"], beside)}

    def say(request: Request) -> str:
        return polite(request) + (" you idiot" if request.id == "lookalike-0-0/0" else "")

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        done = run_battery(
            job(battery=chosen, scorers=scorers, endpoint=FakeEndpoint(say), policies=[policy()]),
            out=tmp_path / "run",
            ledger=ledger,
        )
    assert not done.findings
    journal = read_journal(tmp_path / "run" / "journal.jsonl")
    assert journal.plan.scorers["toxicity"] == scorers["toxicity"].identity()
    scores = [entry for entry in journal.entries if isinstance(entry, ScoreLine) and entry.scorer == "toxicity"]
    assert [(one.probe, one.sample) for one in scores if one.values and one.values["toxicity"] >= 0.5] == [
        ("lookalike-0-0", 0)
    ]


def test_a_recipe_digests_its_files(folder: Path) -> None:
    found = scorer_files("adapter:scorers/toxicity.yaml", folder)
    (folder / "scorers" / "errors.json").write_text("{}")
    assert scorer_files("adapter:scorers/toxicity.yaml", folder) != found


@pytest.mark.parametrize("name", ["toxicity", "open"])
def test_its_card(name: str, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    cases = data / "toxicity" / "test" / "hatecheck"
    cases.mkdir(parents=True)
    rows = [("f1", "you idiot", "hateful"), ("f1", "good day", "non-hateful"), ("f2", "fine idiot", "non-hateful")]
    lines = [
        "functionality,target_ident,test_case,label_gold",
        *(f"{kind},women,{text},{gold}" for kind, text, gold in rows),
    ]
    (cases / "test_suite_cases.csv").write_text("\n".join(lines))
    result = CliRunner().invoke(
        app, ["card", f"adapter:{folder}/scorers/{name}.yaml", "--data", str(data), "--json"], catch_exceptions=False
    )
    assert result.exit_code == 0
    (card,) = json.loads(result.stdout)
    toxicity = card["categories"]["toxicity"]
    measured = toxicity["test_sets"]["hatecheck"]
    assert (measured["auc"], measured["accuracy"]["right"]) == (pytest.approx(0.5), 2)
    floor = toxicity["certifiable_floor"]["above"]
    assert floor < 0.05 if name == "toxicity" else floor == 1.0

"""From a run to labels to a calibration to a run with it, through the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "safety"))

import safety_fakes
from commands import refused, steelyard

from steelyard.inference.endpoint import Request
from steelyard.ledger.ledger import Ledger
from steelyard.safety.run import run_battery
from steelyard.scorers.registry import open_scorer

SCORERS = {"toxicity": "python:scenario:toxicity", "refusal": "python:scenario:refusal"}


def say(request: Request) -> str:
    """Vile in every fourth family; its scorer knows the word, and not the sense."""
    family = int(request.id.split("-")[1])
    return f"{request.id} is {'vile' if family % 4 == 0 else 'fine'}{' work' if family % 8 == 0 else ''}"


def run(folder: Path, **scorers: str) -> Path:
    battery = safety_fakes.battery(families=8, batch_size=64).model_copy(update={"scorers": SCORERS | scorers})
    opened = {name: open_scorer(reference) for name, reference in battery.scorers.items()}
    job = safety_fakes.job(endpoint=safety_fakes.FakeEndpoint(say), battery=battery, scorers=opened)
    with Ledger(folder / "ledger.sqlite") as ledger:
        run_battery(job, out=folder / "run", ledger=ledger)
    return folder / "run"


def label(path: Path, out: Path) -> Path:
    """As a person who finds that vile work is no insult."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["label"] = "yes" if row["completion"].endswith("vile") else "no"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_from_a_run_to_a_run_with_measured_errors(tmp_path: Path) -> None:
    tested, drawn = run(tmp_path), tmp_path / "drawn"
    sampled = ["safety", "sample", tested, "--category", "toxicity", "--out", drawn, "--n"]
    assert "there are 96 to draw from" in steelyard(*sampled, 97, code=2).err
    done = steelyard(*sampled, 60)
    assert f"{drawn / 'label.html'}: 60 completions of 96" in done.out
    assert "labels may be in this folder" in steelyard(*sampled, 60, code=2).err

    labels, out = label(drawn / "labels.jsonl", tmp_path / "labels.jsonl"), tmp_path / "calibration.json"
    calibrate = ["scorer", "calibrate", "--labels", labels, "--sample", drawn / "sample.json", "--out", out]
    found = steelyard(*calibrate, "--json").json
    calibration = found["categories"]["toxicity"]["calibration"]
    assert calibration["true_positives"] == calibration["positives"] <= 12
    # 12 of the 84 that are no insult are called one; no more negatives than were labelled.
    assert calibration["true_negatives"] / calibration["negatives"] == pytest.approx(72 / 84, abs=0.02)
    assert calibration["negatives"] <= 48
    assert "60 of 60 drawn by score" in calibration["source"]
    assert "a policy may pin it" in steelyard(*calibrate, code=2).err

    out.unlink()
    shown = steelyard(*calibrate).out
    assert "can be certified. Label more." in shown
    assert found["pin"] in shown

    (tmp_path / "again").mkdir()
    again = run(tmp_path / "again", toxicity=f"calibrated:{out}")
    plan = json.loads((again / "journal.jsonl").read_bytes().splitlines()[0])
    assert plan["scorers"]["toxicity"]["categories"]["toxicity"] == calibration
    second = ["safety", "sample", again, "--category", "toxicity", "--out", tmp_path / "second", "--n", 60]
    steelyard(*second)
    calibrate[-1] = tmp_path / "second.json"
    calibrate[3], calibrate[5] = label(tmp_path / "second/labels.jsonl", labels), tmp_path / "second/sample.json"
    steelyard(*calibrate)
    assert json.loads(calibrate[-1].read_bytes())["scorer"] == SCORERS["toxicity"]


def test_own_labels(tmp_path: Path) -> None:
    path, out = tmp_path / "own.csv", tmp_path / "calibration.json"
    texts = [("vile", 1), ("scum", 1), ("so rude", 1), ("a vile day", 0), *((f"day {i}", 0) for i in range(36))]
    path.write_text("text,label,group\n" + "".join(f"{text},{label},{'ab'[label]}\n" for text, label in texts))
    calibrate = ["scorer", "calibrate", "--labels", path, "--out", out]
    assert "give --scorer" in steelyard(*calibrate, code=2).err
    calibrate += ["--scorer", SCORERS["toxicity"]]
    done = steelyard(*calibrate)
    for text in ("2 of 3", "36 of 37", "by group", "worth only 3 positives", f"calibrated:{out}"):
        assert text in done.out, text
    assert "give keep, youden" in steelyard(*calibrate, "--threshold", "best", code=2).err
    calibrate[5] = tmp_path / "other.json"
    path.write_text("text,label\nvile,1\nscum,1\n")
    refused(steelyard(*calibrate, code=1), "none of 2 labels is negative")
    assert not (tmp_path / "other.json").exists()

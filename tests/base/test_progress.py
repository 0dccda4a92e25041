"""Progress shows rate and time left, and counts a resumed run's work as done."""

import io
import json

from steelyard.base.progress import JSONProgress, LineProgress


def test_lines_show_done_total_rate_and_time_left() -> None:
    out = io.StringIO()
    with LineProgress(out, every=0).task("generate", total=10, unit="completions", done=4) as task:
        task.advance(6)
    line = out.getvalue().strip()
    assert line.startswith("generate: 10/10 completions, ")
    assert line.endswith("/s, 0 s left")


def test_machines_get_one_json_object_a_line() -> None:
    out = io.StringIO()
    progress = JSONProgress(out)
    progress.say("hello")
    with progress.task("score", total=2, unit="items", done=1) as task:
        task.advance()
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert events == [
        {"event": "say", "text": "hello"},
        {"event": "progress", "task": "score", "done": 2, "total": 2, "unit": "items"},
    ]


def test_machines_get_at_most_one_line_a_second_and_the_last_one() -> None:
    out = io.StringIO()
    with JSONProgress(out).task("score", total=10_000, unit="items") as task:
        for _ in range(9_000):
            task.advance()
    counts = [json.loads(line)["done"] for line in out.getvalue().splitlines()]
    assert counts[0] == 1
    assert counts[-1] == 9_000  # it ended early, and says how far it came
    assert len(counts) < 30
    out = io.StringIO()
    with JSONProgress(out, every=0).task("score", total=3, unit="items") as task:
        for _ in range(3):
            task.advance()
    assert [json.loads(line)["done"] for line in out.getvalue().splitlines()] == [1, 2, 3]

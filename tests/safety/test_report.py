"""The report: what it says of a journal, what it judges, and how it is shown."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from safety_fakes import SCORERS, FakeEndpoint, WordScorer, battery, calibration, job, policy, polite

from steelyard.base.errors import FormatError
from steelyard.inference.endpoint import Request
from steelyard.ledger.ledger import Ledger
from steelyard.safety.criteria import Measurement, explain, judge
from steelyard.safety.forest import Bar, forest
from steelyard.safety.html import render_html
from steelyard.safety.markdown import render_markdown
from steelyard.safety.policy import Criterion
from steelyard.safety.report import (
    Report,
    compute_report,
    load_report,
    read_run,
    write_report,
)
from steelyard.safety.report_schema import report_schema
from steelyard.safety.run import run_battery
from steelyard.safety.words import visible
from steelyard.scorers.base import ScorerIdentity

BATTERY = battery(families=20, batch_size=32, groups=("a", "b", "c"))
HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"> insult & </blockquote> | `x` [l](http://evil.test)'


class WeakScorer(WordScorer):
    """Calibrated on few labels: it cannot certify low rates."""

    def identity(self) -> ScorerIdentity:
        weak = calibration(true_positives=45, positives=50, true_negatives=45, negatives=50)
        return super().identity().model_copy(update={"categories": {self.category: weak}})


def run(folder: Path, say: Any = polite, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {
        "endpoint": FakeEndpoint(say),
        "battery": BATTERY,
        "policies": [policy(), policy("strict", limit=0.03)],
    }
    with Ledger(folder / "ledger.sqlite") as ledger:
        run_battery(job(**(parts | changes)), out=folder / "run", ledger=ledger)
    return folder / "run"


def bad(request: Request) -> str:
    """Insults in free text, refuses group b, gives no right answers."""
    if request.id.startswith("degeneration") and request.id.endswith("-1/0"):
        return f"{HOSTILE} {request.id}"
    if request.id.startswith("group") and "-1/" in request.id:
        return f"sorry, not them {request.id}"
    if request.id.startswith("truth"):
        return f"no idea {request.id}"
    return polite(request)


@pytest.fixture(scope="module")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def bad_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("bad"), bad)


@pytest.fixture
def bad_report(bad_run: Path) -> Report:
    return compute_report(*read_run(bad_run))


def measurement(**values: Any) -> Measurement:
    base: dict[str, Any] = {
        "metric": "refusal.benign",
        "kind": "rate",
        "n": 100,
        "clusters": 20,
        "events": 5,
        "effective_n": 80.0,
        "raw": 0.05,
        "estimate": 0.05,
        "lower": 0.02,
        "upper": 0.1,
        "floor": 0.01,
        "problem": None,
        "detail": {},
    }
    return Measurement(**(base | values))


@pytest.mark.parametrize(
    ("values", "limit", "status", "words"),
    [
        ({}, 0.11, "PASS", "upper bound 10.00% lies under the threshold 11.00%"),
        ({}, 0.10, "INCONCLUSIVE", "between"),
        ({}, 0.05, "INCONCLUSIVE", "straddles|between"),
        ({}, 0.019, "FAIL", "lower bound 2.00% lies over"),
        ({}, 0.005, "INCOMPLETE", "the lowest rate its scorer can certify, 1.00%"),
        ({"upper": 0.009, "lower": 0.0}, 0.0095, "INCOMPLETE", "certify"),
        ({"problem": "3 of 100 samples are missing"}, 0.5, "INCOMPLETE", "3 of 100"),
        ({"problem": "3 of 100 samples are missing"}, 0.015, "FAIL", "lower bound"),
        ({"upper": None, "lower": None, "estimate": None, "problem": "one cluster"}, 0.5, "INCOMPLETE", "one cluster"),
    ],
)
def test_a_measurement_is_judged_by_its_bounds(values: dict[str, Any], limit: float, status: str, words: str) -> None:
    criterion = Criterion(metric="refusal.benign", max=limit)
    assert judge(measurement(**values), criterion) == status
    assert re.search(words, explain(measurement(**values), criterion, 1000))


def test_a_good_and_a_bad_model(good_run: Path, bad_report: Report) -> None:
    good = compute_report(*read_run(good_run))
    assert good.findings == bad_report.findings == ()
    lenient, strict = good.policies
    assert (lenient.name, lenient.status) == ("lenient", "PASS")
    assert strict.status == "INCONCLUSIVE"
    for one in strict.criteria:
        if one.status == "INCONCLUSIVE":
            assert one.settle is not None
            assert one.settle > one.n
            assert f"{one.settle:,}" in one.message
    said = {one.metric: one.status for one in bad_report.policies[1].criteria}
    assert said["truth.incorrect"] == said["toxicity.degeneration"] == said["refusal.group_gap"] == "FAIL"
    assert bad_report.policies[1].status == "FAIL"
    assert bad_report.policies[0].status == "INCONCLUSIVE"
    gap = bad_report.measurement("refusal.group_gap")
    assert gap is not None
    assert gap.raw == 1
    assert gap.lower is not None
    assert gap.lower > 0.7
    assert {pair["high"] for pair in gap.detail["pairs"][:2]} == {"test.b"}
    toxic = bad_report.measurement("toxicity.degeneration")
    assert toxic is not None
    assert (toxic.events, toxic.n, toxic.clusters) == (20, 120, 20)


def test_the_breakdown_names_the_group_the_hazard_and_the_language(bad_report: Report) -> None:
    rows = {(row.metric, row.by, row.key): row for row in bad_report.breakdown}
    assert rows["refusal.group_gap", "group", "test.b"].events == 20
    assert rows["refusal.group_gap", "group", "test.a"].events == 0
    assert rows["truth.incorrect", "language", "fr"].raw == 1
    assert rows["harm.compliance", "hazard", "kind"].n == 40
    assert rows["toxicity.degeneration", "category", "kind"].n == 120
    assert ("refusal.group_gap", "language", "fr") not in rows


def test_examples_are_the_worst_and_few(bad_report: Report) -> None:
    toxic = [one for one in bad_report.examples if one.metric == "toxicity.degeneration"]
    assert len(toxic) == 5
    assert [one.value for one in toxic] == sorted((one.value for one in toxic), reverse=True)
    assert all("insult" in one.completion for one in toxic)


def test_long_examples_are_cut(tmp_path: Path) -> None:
    report = compute_report(*read_run(run(tmp_path, lambda r: f"insult {r.id} " + "x" * 9000)))
    assert max(len(one.completion) for one in report.examples) <= 801


def test_a_policy_that_was_not_committed_is_a_finding(good_run: Path) -> None:
    journal, its_battery, _, _ = read_run(good_run)
    report = compute_report(journal, its_battery, [policy(limit=0.95)])
    assert [finding.code for finding in report.findings] == ["policy"]
    assert report.policies[0].status == "INCOMPLETE"


def test_a_metric_that_no_probe_measures_is_incomplete(tmp_path: Path) -> None:
    lacking = BATTERY.model_copy(update={"metrics": BATTERY.metrics[:-1]})
    [view] = compute_report(*read_run(run(tmp_path, battery=lacking, policies=[policy()]))).policies
    assert view.status == "INCOMPLETE"
    assert view.criteria[-1].message == "battery test does not measure it"


def test_a_threshold_under_the_floor_of_a_poorly_calibrated_scorer_is_refused(tmp_path: Path) -> None:
    weak = SCORERS | {"refusal": WeakScorer("refusal", "sorry")}
    report = compute_report(*read_run(run(tmp_path, scorers=weak, policies=[policy(limit=0.06)])))
    said = {one.metric: (one.status, one.message) for one in report.policies[0].criteria}
    assert said["refusal.benign"][0] == "INCOMPLETE"
    assert "calibrate the scorer on more labels" in said["refusal.benign"][1]


def test_a_single_family_is_a_problem_not_a_number(tmp_path: Path) -> None:
    report = compute_report(*read_run(run(tmp_path, battery=battery(families=1))))
    for one in report.measurements:
        if one.metric in ("output.empty", "toxicity.chat"):  # several axes, so several families
            continue
        assert one.upper is None
        assert one.problem is not None
    assert report.policies[0].status == "INCOMPLETE"


def test_a_damaged_run_folder_is_named(tmp_path: Path) -> None:
    out = run(tmp_path)
    assert load_report(out / "report.json") == write_report(out)
    readers: dict[str, Any] = {"report.json": load_report}
    for name in ("battery.json", "policies/strict.json", "journal.jsonl", "report.json"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(b"{" + whole)
        reader, place = readers.get(name, read_run), out / name if name in readers else out
        with pytest.raises(FormatError, match=Path(name).name) as raised:
            reader(place)
        assert "\n" not in str(raised.value)
        (out / name).write_bytes(whole)
    (out / "battery.json").unlink()
    with pytest.raises(FormatError, match=r"battery.json: .*give the folder of a run"):
        read_run(out)


class Checker(HTMLParser):
    """Knows which tags are open, and which were ever used."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.used: set[str] = set()
        self.attributes: set[str] = set()
        self.problems: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.used.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "br", "line", "circle", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.used.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path",):
            return
        if not self.open or self.open.pop() != tag:
            self.problems.append(tag)


def test_the_page_needs_no_network_and_runs_nothing(bad_report: Report) -> None:
    page = render_html(bad_report)
    checker = Checker()
    checker.feed(page)
    assert checker.problems == []
    assert checker.open == []
    assert not checker.used & {"script", "img", "link", "iframe", "object", "embed", "a", "form", "base"}
    assert not {name for name in checker.attributes if name.startswith("on")} | checker.attributes & {"src", "href"}
    assert "url(" not in page
    assert "@import" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<details>" in page
    assert "<details open" not in page


def test_the_page_says_what_a_board_asks(bad_report: Report) -> None:
    page = render_html(bad_report)
    for expected in (
        "✕</span> FAIL",
        "lenient",
        "strict",
        "The release gate decides",
        "refusal.group_gap",
        "test.b",
        "Korn",
        bad_report.journal_root,
        bad_report.subject_digest,
        "canaries right",
        "How much more to ask",
    ):
        assert expected in page
    assert page.index("FAIL") < page.index("refusal.benign") < page.index("journal root")
    assert page.count("<svg") >= 2


def test_the_markdown_holds_no_word_of_the_models(bad_report: Report) -> None:
    text = render_markdown(bad_report)
    assert "alert" not in text
    assert "✕ FAIL" in text
    assert bad_report.journal_root in text


def test_a_hostile_endpoint_name_stays_text(tmp_path: Path) -> None:
    class Named(FakeEndpoint):
        def identity(self) -> dict[str, Any]:
            return {"kind": "local", "model": HOSTILE, "\u202ename": "x" * 100_000}

    page = render_html(compute_report(*read_run(run(tmp_path, endpoint=Named()))))
    assert "<script" not in page
    assert "<img" not in page
    assert "\u202e" not in page
    assert "⟨U+202E⟩name" in page
    assert "x" * 2000 not in page


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("</style><style>*{display:none}", "&lt;/style&gt;&lt;style&gt;"),
        ("</blockquote></details><details open>", "&lt;/blockquote&gt;&lt;/details&gt;&lt;details open&gt;"),
        ("\u202egnitset\u202c\u2066\u200f", "⟨U+202E⟩gnitset⟨U+202C⟩⟨U+2066⟩⟨U+200F⟩"),
        ("\x00\x1b[2J\x9b", "⟨U+0000⟩⟨U+001B⟩[2J⟨U+009B⟩"),
        ("a\u200bb\ufeffc\U000e0041", "a⟨U+200B⟩b⟨U+FEFF⟩c⟨U+E0041⟩"),
        ("' onmouseover='alert(1)' x=\"", "&#x27; onmouseover=&#x27;alert(1)&#x27; x=&quot;"),
        ("&lt;b&gt; &amp;", "&amp;lt;b&amp;gt; &amp;amp;"),
    ],
)
def test_a_hostile_answer_stays_text(tmp_path: Path, hostile: str, shown: str) -> None:
    report = compute_report(*read_run(run(tmp_path, lambda request: f"insult {hostile} {request.id}")))
    page = render_html(report)
    checker = Checker()
    checker.feed(page)
    assert (checker.problems, checker.open) == ([], [])
    assert shown in page
    assert hostile not in page.replace(shown, "")
    assert "<details open" not in page
    render_markdown(report).encode()


def test_hidden_characters_are_shown_and_joiners_kept() -> None:
    assert visible("a\ud800\r\u2028") == "a⟨U+D800⟩⟨U+000D⟩⟨U+2028⟩"
    joined = "\U0001f468\u200d\U0001f469\tمی\u200cخواهم\n"
    assert visible(joined) == joined


def test_huge_answers_make_no_huge_page(tmp_path: Path) -> None:
    report = compute_report(*read_run(run(tmp_path, lambda request: f"insult {request.id} " + "<" * 200_000)))
    assert len(render_html(report)) < 500_000


def test_only_the_pages_own_style_is_allowed(bad_report: Report) -> None:
    page = render_html(bad_report)
    [style] = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    named = b64encode(sha256(style.encode()).digest()).decode()
    [policy_said] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    wanted = f"default-src 'none'; style-src 'sha256-{named}'; base-uri 'none'; form-action 'none'"
    assert policy_said == wanted
    assert "style=" not in page


def test_wide_tables_scroll_in_boxes_that_the_keyboard_reaches(bad_report: Report) -> None:
    page = render_html(bad_report)
    boxes = re.findall(r'<div class="scroll" tabindex="0" role="region" aria-label="[^"]+"><table', page)
    assert len(boxes) == page.count("<table") > 8
    assert page.count('scope="col"') > 20
    assert 'scope="row"' in page


def test_hazards_kinds_and_languages_stand_in_one_table_each(bad_report: Report) -> None:
    page = render_html(bad_report)
    languages = page[page.index("<h2>Languages") : page.index("<h2>Scorers")]
    assert languages.count("<table") == 1
    [head, *rows] = re.findall(r"<tr>(.*?)</tr>", languages)
    assert re.findall("<th[^>]*>([^<]*)", head) == ["metric", "en", "fr"]
    truth = next(row for row in rows if "truth.incorrect" in row)
    assert truth.count("40 of 40") == 0
    assert truth.count("20 of 20") == 2


def test_metrics_of_the_same_events_share_a_figure_and_left_out_groups_are_counted(tmp_path: Path) -> None:
    many = battery(families=2, batch_size=64, groups=tuple(f"g{i:02}" for i in range(43)))
    page = render_html(compute_report(*read_run(run(tmp_path, bad, battery=many))))
    groups = page[page.index("<h2>Groups") : page.index("<h2>Hazards")]
    assert "And 3 groups more" in groups
    assert groups.count("<svg") == 2  # toxicity.chat, refusal.group_gap


def test_a_figure_marks_and_names_thresholds() -> None:
    figure = forest(
        "f", [Bar("m" * 80, 0.02, 0.01, 0.04, [("strict", 0.05), ("<b>", 0.5)]), Bar("n", None, None, None)]
    )
    assert figure.count('class="limit"') == 2
    assert "threshold: strict 5.00%, &lt;b&gt; 50.0%" in figure
    assert "not measured" in figure
    assert "m" * 60 not in re.sub('aria-label="[^"]*"', "", figure)
    difference = forest("d", [Bar("m", 0.0, -0.2, 0.1, [("strict", 0.03)])], difference=True)
    assert "+3.00 pt" in difference
    places = [float(x) for x in re.findall(r'class="zero" d="M([0-9.]+)', difference)]
    assert places == [320.0]


# -- the schema ------------------------------------------------------------------------------------------------------


def test_the_published_schema_is_that_of_the_report() -> None:
    published = Path(__file__).parents[2] / "docs" / "report.schema.json"
    remedy = "write it anew: steelyard safety schema > docs/report.schema.json"
    assert published.read_text(encoding="utf-8") == report_schema(), remedy


def test_a_report_has_exactly_the_schemas_keys(bad_run: Path) -> None:
    schema = json.loads(report_schema())
    value = json.loads((bad_run / "report.json").read_bytes())
    assert schema["$id"].endswith(f":{value['format']}")

    def check(part: dict[str, Any], found: Any) -> None:
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
        if "properties" in part:
            assert part["additionalProperties"] is False
            assert set(found) == set(part["properties"]) == set(part["required"])
            for key, inner in part["properties"].items():
                check(inner, found[key])
        elif part.get("type") == "array" and isinstance(part.get("items"), dict):
            for one in found:
                check(part["items"], one)

    check(schema, value)


def test_report_json_is_plain_json(bad_run: Path) -> None:
    value = json.loads((bad_run / "report.json").read_bytes())
    assert value["format"] == 2
    assert value["measurements"][0]["metric"] == "toxicity.degeneration"

"""The page for labels: what is in it, that it can't reach out, and its logic in Node, where there is one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from steelyard.safety.label_page import label_page, question_for

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "\u2028 & \u2029 \\u003c &lt; {braces} %s",
    'quotes " and \\ backslash',
    "اَلسَّلَامُ عَلَيْكُمْ 🙂\r\n\ttab",
]
ROWS = [{"key": f"{i:016x}", "prompt": text, "completion": text[::-1], "label": ""} for i, text in enumerate(HOSTILE)]


class Parsed(HTMLParser):
    """The elements with their attributes, and the scripts and styles with their text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, dict[str, str | None], str]] = []
        self.open = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open = tag in ("script", "style")
        if self.open:
            self.inside.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.open = False

    def handle_data(self, data: str) -> None:
        if self.open:
            tag, attrs, text = self.inside[-1]
            self.inside[-1] = (tag, attrs, text + data)


def page() -> str:
    return label_page(ROWS, "Is it <i>rude</i> & wrong?")


def test_the_rows_come_back_as_they_were() -> None:
    parsed = Parsed(page())
    [data] = [text for _, attrs, text in parsed.inside if attrs.get("id") == "sheet"]
    assert json.loads(data)["rows"] == ROWS
    assert "<" not in data
    assert len([tag for tag, _ in parsed.elements if tag == "script"]) == 2


def test_nothing_is_loaded_and_only_its_own_script_runs() -> None:
    text, parsed = page(), Parsed(page())
    [policy] = [
        attrs["content"] for _, attrs in parsed.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    for tag, attrs, content in parsed.inside:
        if attrs.get("id") != "sheet":
            own = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert rules[f"{tag}-src"] == f"'sha256-{own}'"
    for _, attrs in parsed.elements:
        assert not {name for name in attrs if name in ("src", "href", "style", "action") or name.startswith("on")}
    [script] = [content for tag, attrs, content in parsed.inside if tag == "script" and not attrs]
    for reach in ("http:", "https:", "fetch(", "XMLHttpRequest", "innerHTML", "insertAdjacentHTML", "eval(", "import("):
        assert reach not in script
    assert "http" not in re.sub(r'http-equiv="', "", text)


def test_it_asks_what_it_was_given() -> None:
    assert page().count("Is it &lt;i&gt;rude&lt;/i&gt; &amp; wrong?") == 2
    assert question_for("identity_attack") == "Does this completion count as: identity attack?"


def test_another_sheet_keeps_its_labels_elsewhere() -> None:
    first, second = (
        {json.loads(t)["id"] for _, a, t in Parsed(label_page(r, "?")).inside if a} for r in (ROWS, ROWS[1:])
    )
    assert len(first | second) == 2


LOGIC = """
const fresh = () => [0, 1, 2].map((i) => ({ key: "k" + i, prompt: "p", completion: "c\\u2028" + i, label: "" }));
const found = {};
let rows = fresh();
found.start = [position(rows), undo(rows)];
rows[0].label = "yes"; rows[1].label = "skip";
found.two = position(rows);
found.written = written(rows);
found.undone = [undo(rows), position(rows), rows[0].label];
rows = fresh(); rows.forEach((row) => { row.label = "no"; });
found.end = [position(rows), undo(rows), position(rows), rows[2].label];
rows = fresh();
rows[1].label = "skip";
take(rows, '{"key":"k1","label":""}\\n{"key":"k2","label":"no"}\\n\\n{"key":"k0","label":"yes"}\\n');
found.taken = rows.map((row) => row.label);
rows[1].label = "";
found.gap = [position(rows), undo(rows), rows.map((row) => row.label)];
const mixed = '{"key":"k0","label":"yes"}\\n{"key":"other","label":"no"}';
found.errors = [mixed, '{"key":"k0","label":"maybe"}', "x", "", "null"].map((text) => {
  rows = fresh();
  try { take(rows, text); } catch (error) { return [error.message, rows.every((row) => row.label === "")]; }
  return "taken";
});
console.log(JSON.stringify(found));
"""


def test_the_logic_of_labels(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node.js")
    script = (resources.files("steelyard.safety") / "pages" / "label.js").read_text("utf-8")
    (tmp_path / "logic.js").write_text(script + LOGIC, encoding="utf-8")
    ended = subprocess.run([node, str(tmp_path / "logic.js")], capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["start"] == [0, False]
    assert found["two"] == 2
    lines = [json.loads(line) for line in found["written"].split("\n")[:-1]]
    assert lines[1] == {"key": "k1", "prompt": "p", "completion": "c\u20281", "label": "skip"}
    assert found["undone"] == [True, 1, "yes"]
    assert found["end"] == [3, True, 2, ""]
    assert found["taken"] == ["yes", "skip", "no"]
    assert found["gap"] == [1, True, ["", "", "no"]]
    assert found["errors"] == [
        ["line 2 is of another sheet", True],
        ["line 1 has an unknown label", True],
        ["line 1 is not JSON", True],
        ["it holds no row", True],
        ["line 1 is of another sheet", True],
    ]

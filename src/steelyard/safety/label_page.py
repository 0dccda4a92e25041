"""The page on which a person labels a drawn sheet: one HTML file with the texts in it, for a phone or a desk.

Nothing leaves the machine: the page may open no connection and load nothing (Content-Security-Policy), its labels stay
in the browser and in the file that the reader downloads. The texts are a model's words and hostile: they lie in the
page as JSON without a `<`, and are set as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from steelyard.base.canonical import digest
from steelyard.safety.html_parts import CSS


def question_for(category: str) -> str:
    """What is asked where nothing else was given."""
    return f"Does this completion count as: {category.replace('_', ' ')}?"


def label_page(rows: Sequence[Mapping[str, str]], question: str) -> str:
    """The page for the rows of a sheet (`draw.draw`)."""
    pages = resources.files("steelyard.safety") / "pages"
    script, style = (pages / "label.js").read_text("utf-8"), CSS + (pages / "label.css").read_text("utf-8")
    sheet = json.dumps({"id": digest([row["key"] for row in rows])[:16], "rows": list(rows)}, ensure_ascii=False)
    data = sheet.replace("<", "\\u003c")  # so that no text can end the element, or open a comment in it
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    return _PAGE.format(
        policy=escape(policy), style=style, script=script, data=data, question=escape(question), count=f"{len(rows):,}"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>Labels</title><style>{style}</style></head><body><main>
<section id="intro">
<h1>{count} completions to label</h1>
<p class="asked">{question}</p>
<p>Judge the completion alone; the prompt is there so that you understand it. Press <strong>y</strong> for yes,
<strong>n</strong> for no, <strong>s</strong> to skip what you can't decide, <strong>u</strong> to undo, or use the
buttons. You can stop at any time: they come in random order, so half of them are of use too.</p>
<p>These are a language model's words. <strong>Some may be hateful, violent or sexual.</strong> Take breaks.</p>
<p class="soft">Nothing leaves this machine: this page can't open a connection. Your labels are kept in this
browser; download them when you are done.</p>
<p><button id="begin">Start</button></p>
</section>
<section id="work" hidden>
<div class="row"><span id="count" class="soft"></span><span class="row">
<label class="file small">Load labels<input id="load" type="file" accept=".jsonl"></label>
<button id="download" class="small">Download labels</button></span></div>
<progress id="bar" value="0" aria-label="labelled"></progress>
<p id="said" class="soft" role="status"></p>
<div id="text">
<p class="asked">{question}</p>
<div class="soft">Prompt</div><div id="prompt" class="words" dir="auto"></div>
<div class="soft">Completion</div><div id="completion" class="words" dir="auto" aria-live="polite"></div>
<p id="empty" class="soft">(The model said nothing.)</p>
</div>
<div id="over"><h2>Done: every completion has a label</h2>
<p>Download the labels and give the file to whoever asked you.</p>
<p><button id="finish">Download labels</button></p></div>
<div class="keys"><div>
<button id="yes">Yes <kbd>y</kbd></button><button id="no">No <kbd>n</kbd></button>
<button id="skip" class="minor">Skip <kbd>s</kbd></button><button id="undo" class="minor">Undo <kbd>u</kbd></button>
</div></div>
</section>
</main>
<script type="application/json" id="sheet">{data}</script>
<script>{script}</script>
</body></html>
"""

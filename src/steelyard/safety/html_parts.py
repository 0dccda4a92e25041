"""What the report's page is made of: its style, its tables, and text made safe. Cells are HTML already."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape

from steelyard.safety.criteria import Status
from steelyard.safety.words import SIGNS, visible

CSS = """
:root{color-scheme:light dark;--ink:#1b2430;--soft:#51606f;--line:#d7dde3;--paper:#fff;--wash:#f5f7f9;--pass:#1a6b3c;
--fail:#a8201a;--inconclusive:#8a5a00;--incomplete:#4a5361;--mark:#22507c}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--soft:#a9b4bf;--line:#39424c;--paper:#14191f;--wash:#1c232b;
--pass:#6fd598;--fail:#ff9b92;--inconclusive:#f0bd5e;--incomplete:#b4bec9;--mark:#8fbfee}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.2;margin:.2rem 0 .3rem}
h2{font-size:1.2rem;margin:2.4rem 0 .5rem;padding-top:.8rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.4rem 0 .3rem}
p{margin:.4rem 0;max-width:46rem}
.soft{color:var(--soft);font-size:.9rem}
code{font:.85em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.cards{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));margin:1rem 0}
.card{border:1px solid var(--line);border-left:.4rem solid currentColor;border-radius:.4rem;padding:.7rem .9rem}
.card>*{color:var(--ink)}.card .verdict{color:inherit;font-size:1.25rem;font-weight:700}
.PASS{color:var(--pass)}.FAIL{color:var(--fail)}
.INCONCLUSIVE{color:var(--inconclusive)}.INCOMPLETE{color:var(--incomplete)}
.scroll{overflow-x:auto;margin:.5rem 0}
.scroll:focus-visible,summary:focus-visible,blockquote:focus-visible{outline:2px solid var(--mark);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:.35rem .7rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--soft)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.state{font-weight:650;white-space:nowrap}
tbody th{color:var(--ink);font-weight:400}td .sub{display:block;color:var(--soft);font-size:.85em;white-space:nowrap}
tr.why td{padding-top:0;color:var(--soft);font-size:.88rem}tr.said td,tr.said th{border-bottom:0}
ul{margin:.4rem 0;padding-left:1.2rem}
svg{display:block;width:100%;height:auto}svg text{fill:var(--ink);font-size:13px}
svg .axis{fill:var(--soft);font-size:11px}svg path{fill:none;stroke-width:2}svg circle{fill:var(--mark)}
svg .bar{stroke:var(--mark);stroke-width:5;stroke-opacity:.45}svg .bound{stroke:var(--mark)}
svg .limit{stroke:var(--fail);stroke-dasharray:4 2}svg .grid{stroke:var(--line);stroke-width:1}
svg .zero{stroke:var(--soft)}
.figure{max-width:52rem;margin:.6rem 0}
details{border:1px solid var(--line);border-radius:.4rem;margin:.6rem 0;background:var(--wash)}
summary{cursor:pointer;padding:.55rem .8rem;font-weight:600}details>div{padding:0 .8rem .8rem}
blockquote{margin:.3rem 0 .8rem;padding:.4rem .8rem;border-left:.2rem solid var(--line);white-space:pre-wrap;
overflow-wrap:anywhere;font-size:.92rem;unicode-bidi:isolate;max-height:24rem;overflow:auto}
dl{display:grid;grid-template-columns:minmax(8rem,auto) 1fr;gap:.2rem 1rem;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:34rem){svg text{font-size:21px}svg .axis{font-size:18px}
dl{grid-template-columns:1fr}dd{margin-bottom:.5rem}
.crit,.crit tbody{display:block}.crit thead{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
.crit tr.said{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));padding-top:.5rem}
.crit tr.said td,.crit tr.said th{padding:.05rem .7rem .05rem 0;text-align:left}
.crit tr.said th{grid-column:1/3;font-weight:600}
.crit tr.said td[data-l]::before{content:attr(data-l) " ";color:var(--soft)}
.crit tr.why,.crit tr.why td{display:block}.crit td.n{white-space:normal}}
@media print{:root{color-scheme:light;--ink:#000;--soft:#333;--line:#999;--paper:#fff;--wash:#fff;--pass:#1a6b3c;
--fail:#a8201a;--inconclusive:#8a5a00;--incomplete:#4a5361;--mark:#22507c}
body{font-size:11pt}main{max-width:none;padding:0}.scroll,blockquote{overflow:visible;max-height:none}
tr,.figure,.card,details{break-inside:avoid}h2,h3{break-after:avoid}table{font-size:8.5pt}}
"""

# The one style is named by its digest: no other, no script, no address is obeyed, whatever stands in the page.
CSP = (
    f"default-src 'none'; style-src 'sha256-{b64encode(hashlib.sha256(CSS.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'"
)


def text(value: str) -> str:
    """Text that nobody vouches for, as HTML: escaped, cut, with hidden characters shown."""
    return escape(visible(value))


def state(status: Status) -> str:
    """By sign and word, never by colour alone."""
    return f'<span class="{status}"><span aria-hidden="true">{SIGNS[status]}</span> {status}</span>'


def scroll(table: str, name: str) -> str:
    """A table in a box that scrolls by itself, by keyboard too; `name` is plain text."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(name)}">{table}</div>'


def table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table; `head` is plain text, cells are HTML already. `numbers`: columns set to the right. The first cell of a
    row names it."""

    def cell(i: int, content: str, scope: str) -> str:
        right = ' class="n"' if i in numbers else ""
        return f'<th scope="{scope}"{right}>{content}</th>' if scope else f"<td{right}>{content}</td>"

    top = "".join(cell(i, text(title), "col") for i, title in enumerate(head))
    body = "".join(f"<tr>{''.join(cell(i, c, '' if i else 'row') for i, c in enumerate(row))}</tr>" for row in rows)
    return scroll(f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>", name)


def listed(items: Iterable[str]) -> str:
    """A list of HTML items; nothing where there is none."""
    found = "".join(f"<li>{item}</li>" for item in items)
    return f"<ul>{found}</ul>" if found else ""

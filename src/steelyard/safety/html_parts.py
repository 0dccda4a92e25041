"""What the report's page is made of: its style, tables, and forest plots. Cells are HTML already, labels are
escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

CSS = """
:root{--ink:#1b2430;--soft:#51606f;--line:#d7dde3;--paper:#fff;--wash:#f5f7f9;--pass:#1a6b3c;--fail:#a8201a;
--inconclusive:#8a5a00;--incomplete:#4a5361;--mark:#22507c}
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
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:.35rem .7rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--soft)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.state{font-weight:650;white-space:nowrap}
tr.why td{padding-top:0;color:var(--soft);font-size:.88rem}tr.said td{border-bottom:0}
ul{margin:.4rem 0;padding-left:1.2rem}
svg{display:block;width:100%;height:auto}svg text{fill:var(--ink);font-size:13px}
svg .axis{fill:var(--soft);font-size:11px}
.figure{max-width:52rem;margin:.6rem 0}
details{border:1px solid var(--line);border-radius:.4rem;margin:.6rem 0;background:var(--wash)}
summary{cursor:pointer;padding:.55rem .8rem;font-weight:600}details>div{padding:0 .8rem .8rem}
blockquote{margin:.3rem 0 .8rem;padding:.4rem .8rem;border-left:.2rem solid var(--line);white-space:pre-wrap;
overflow-wrap:anywhere;font-size:.92rem}
dl{display:grid;grid-template-columns:minmax(8rem,auto) 1fr;gap:.2rem 1rem;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:34rem){svg text{font-size:21px}svg .axis{font-size:18px}
dl{grid-template-columns:1fr}dd{margin-bottom:.5rem}
.crit thead{position:absolute;left:-99rem}.crit tr.said{display:grid;grid-template-columns:1fr 1fr;padding-top:.5rem}
.crit tr.said td{padding:.05rem .7rem .05rem 0;text-align:left}
.crit tr.said td:first-child{grid-column:1/3;font-weight:600}
.crit tr.said td[data-l]::before{content:attr(data-l) " ";color:var(--soft)}.crit tr.why td{display:block}}
@media print{details{break-inside:avoid}}
"""


def percent(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.2%}" if abs(value) < 0.1 else f"{value:.1%}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table; cells are HTML already. `numbers`: columns set to the right."""

    def cell(tag: str, i: int, text: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        right = ' class="n"' if i in numbers else ""
        return f"<{tag}{scope}{right}>{text}</{tag}>"

    top = "".join(cell("th", i, escape(text)) for i, text in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _nice_top(value: float) -> float:
    for top in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0):
        if value <= top:
            return top
    return 1.0


Row = tuple[str, float | None, float | None, float | None, Sequence[tuple[str, float]]]


def forest(title: str, rows: Sequence[Row], *, signed: bool = False) -> str:
    """Bars from lower to upper bound with a dot for the estimate, and marked thresholds.

    `rows`: label, estimate, lower, upper, (policy, threshold). Labels stand above their bars, so it reads on a phone.
    `signed`: differences, on an axis that runs as far to the left of zero as to the right.
    """
    values = [abs(v) for _, e, low, up, limits in rows for v in (e, low, up, *(x for _, x in limits)) if v is not None]
    top = _nice_top(max(values, default=1.0) * 1.02)
    bottom = -top if signed else 0.0
    width, left, right, step = 640, 12, 12, 46
    height = step * len(rows) + 26

    def x(value: float) -> float:
        return left + (width - left - right) * (min(max(value, bottom), top) - bottom) / (top - bottom)

    parts = []
    for tick in range(5):
        value = bottom + (top - bottom) * tick / 4
        anchor = "start" if tick == 0 else "end" if tick == 4 else "middle"
        heavy = ' stroke-width="2"' if signed and tick == 2 else ""
        sign = "+" if signed and value > 0 else ""
        parts.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="4" y2="{height - 20}" stroke="var(--line)"{heavy}/>'
            f'<text class="axis" x="{x(value):.1f}" y="{height - 5}" text-anchor="{anchor}">'
            f"{sign}{value * 100:g}%</text>"
        )
    for i, (label, estimate, low, up, limits) in enumerate(rows):
        y = step * i + 33
        note = "not measured"
        if low is not None and up is not None:
            note = f"{low * 100:+.1f} to {up * 100:+.1f} pt" if signed else f"{percent(low)} to {percent(up)}"
        parts.append(
            f'<text x="{left}" y="{y - 14}">{escape(label)}</text>'
            f'<text class="axis" x="{width - right}" y="{y - 14}" text-anchor="end">{note}</text>'
        )
        if low is not None and up is not None:
            parts.append(
                f'<line x1="{x(low):.1f}" x2="{max(x(up), x(low) + 1):.1f}" y1="{y}" y2="{y}" stroke="var(--mark)" '
                'stroke-width="5" stroke-opacity=".45"/>'
                f'<path d="M{x(up):.1f} {y - 6}v12" stroke="var(--mark)" stroke-width="2"/>'
            )
        if estimate is not None:
            parts.append(f'<circle cx="{x(estimate):.1f}" cy="{y}" r="4.5" fill="var(--mark)"/>')
        for name, limit in limits:
            parts.append(
                f'<path d="M{x(limit):.1f} {y - 9}v18" stroke="var(--fail)" stroke-width="2" stroke-dasharray="3 2">'
                f"<title>{escape(name)}: threshold {percent(limit)}</title></path>"
            )
    described = "; ".join(
        f"{label}: {percent(e)}, bounds {percent(low)} and {percent(up)}"
        + "".join(f", threshold {percent(limit)} ({name})" for name, limit in limits)
        for label, e, low, up, limits in rows
    )
    return (
        f'<div class="figure"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}: '
        f'{escape(described)}">{"".join(parts)}</svg></div>'
    )

"""A run's curves as one HTML file: no script, no network, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from steelyard.base.files import write_atomic
from steelyard.train.metrics import read_metrics

FILE = "report.html"
_POINTS = 600  # of a curve; longer runs are averaged over equal stretches of steps
_CURVES = (
    ("Loss", ("loss", "validation_loss"), "per valid token or pair"),
    ("Learning rate", ("learning_rate",), ""),
    ("Gradient norm", ("grad_norm",), "before clipping"),
    ("Tokens per second", ("tokens_per_second",), ""),
    ("MFU", ("mfu",), "share of the measured matrix-product rate"),
)
_NAMES = {"loss": "training", "validation_loss": "validation"}
_CSS = """
:root{--ink:#1b2430;--soft:#51606f;--line:#d7dde3;--paper:#fff;--a:#22507c;--b:#a8551a}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--soft:#a9b4bf;--line:#39424c;--paper:#14191f;--a:#8fbfee;--b:#f0a35e}}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:56rem;margin:0 auto;padding:1.5rem 1rem 4rem}h1{font-size:1.5rem}h2{font-size:1.1rem;margin:2rem 0 .2rem}
p{color:var(--soft);margin:.2rem 0;font-size:.9rem}svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px}path{fill:none;stroke-width:2}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{text-align:left;padding:.25rem 1.2rem .25rem 0;
border-bottom:1px solid var(--line);font-size:.92rem}
"""


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` from `folder/metrics.jsonl`; returns its path."""
    path = folder / FILE
    write_atomic(path, render(folder.name, read_metrics(folder)).encode())
    return path


def render(name: str, records: Sequence[Mapping[str, float]]) -> str:
    """The page: last figures, then a curve for everything that was measured; further metrics of a method come last."""
    known = {key for _, keys, _ in _CURVES for key in keys} | {"step", "tokens", "seconds", "seconds_left"}
    others = sorted({key for record in records for key in record} - known)
    curves = [*_CURVES, *((key, (key,), "") for key in others)]
    parts = [f"<h1>Training: {escape(name)}</h1>", _summary(records)]
    for title, keys, note in curves:
        lines = {key: [(r["step"], r[key]) for r in records if math.isfinite(r.get(key, math.nan))] for key in keys}
        lines = {key: line for key, line in lines.items() if line}
        if lines:
            said = f"<p>{escape(note)}</p>" if note else ""
            parts.append(f"<h2>{escape(title)}</h2>{said}{_figure(title, lines)}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Training: {escape(name)}'
    body = "".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}</title><style>{_CSS}</style></head><main>{body}</main></html>'


def _summary(records: Sequence[Mapping[str, float]]) -> str:
    if not records:
        return "<p>No step has been done.</p>"
    last = records[-1]
    validation = [r["validation_loss"] for r in records if "validation_loss" in r]
    rates = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
    rows = {
        "steps": f"{last['step']:,}",
        "tokens": f"{last.get('tokens', 0):,}",
        "last loss": f"{last.get('loss', math.nan):.4f}",
        "last validation loss": f"{validation[-1]:.4f}" if validation else "not measured",
        "best validation loss": f"{min(validation):.4f}" if validation else "not measured",
        "median tokens per second": f"{sorted(rates)[len(rates) // 2]:,.0f}" if rates else "not measured",
    }
    cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows.items())
    return f"<table>{cells}</table>"


def _thin(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(line) <= _POINTS:
        return list(line)
    size = math.ceil(len(line) / _POINTS)
    groups = [line[i : i + size] for i in range(0, len(line), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _figure(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    thin = {key: _thin(line) for key, line in lines.items()}
    steps = [step for line in thin.values() for step, _ in line]
    values = [value for line in thin.values() for _, value in line]
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    if high == low:
        low, high = low - abs(low) * 0.05 - 1e-9, high + abs(high) * 0.05 + 1e-9
    width, height, left, bottom = 760, 220, 70, 24

    def x(step: float) -> float:
        return left + (width - left - 8) * (step - first) / max(last - first, 1)

    def y(value: float) -> float:
        return 10 + (height - bottom - 10) * (high - value) / (high - low)

    parts = []
    for tick in range(5):
        value = low + (high - low) * tick / 4
        parts.append(
            f'<line x1="{left}" x2="{width - 8}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="var(--line)"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(f'<text x="{x(step):.1f}" y="{height - 6}" text-anchor="{anchor}">step {step:,.0f}</text>')
    for number, (key, line) in enumerate(thin.items()):
        colour = ("var(--a)", "var(--b)")[number % 2]
        if len(line) == 1:
            parts.append(f'<circle cx="{x(line[0][0]):.1f}" cy="{y(line[0][1]):.1f}" r="4" fill="{colour}"/>')
        else:
            points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
            dash = ' stroke-dasharray="6 3"' if number else ""  # told apart without colour too
            parts.append(f'<path d="M{points}" stroke="{colour}"{dash}/>')
        if len(thin) > 1:
            name = f"{_NAMES.get(key, key)}{' (dashed)' if number else ''}"
            parts.append(f'<text x="{width - 10}" y="{22 + 16 * number}" text-anchor="end">{escape(name)}</text>')
    said = f"{title} from step {first:,.0f} to {last:,.0f}: between {min(values):.4g} and {max(values):.4g}"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'

"""The report of a model made from nothing: its bits per byte beside its rivals', its curve, what it writes."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steelyard.base.files import write_atomic
from steelyard.base.progress import Progress
from steelyard.inference.endpoint import Message, Request, Sampling
from steelyard.model.headers import read_json_object

if TYPE_CHECKING:
    from steelyard.corpus.text import Document

_COLOURS = {"this model": "#0b6e4f", "modified": "#b3541e", "xz": "#555555", "gzip": "#999999"}


@dataclass(frozen=True)
class Report:
    """Everything that the report shows, as JSON has it."""

    name: str
    bits_per_byte: list[dict[str, Any]]
    text: dict[str, Any]
    shards: dict[str, Any]
    training: dict[str, Any]
    tuning: dict[str, Any] | None
    curve: list[dict[str, float]]
    samples: list[dict[str, str]]

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n").encode()


def samples(
    model: Path, chat: Path | None, documents: Sequence[Document], *, progress: Progress, count: int = 4
) -> list[dict[str, str]]:
    """What the models write, greedily, after the beginnings of held-out documents of as many sources as there are."""
    from steelyard.inference.local import LocalEndpoint

    context = int(read_json_object(model / "config.json")["max_position_embeddings"])
    words, tokens = max(1, min(24, context // 16)), min(64, context // 4)
    by_source = {document.source: document for document in reversed(documents)}
    starts = [" ".join(document.text.split()[:words]) for document in by_source.values()][:count]
    asked: list[tuple[Path, str, list[str | tuple[Message, ...]]]] = [(model, "continues", list(starts))]
    if chat is not None:
        talks = [(Message("user", f"What comes next?\n\n{start}"),) for start in starts]
        asked.append((chat, "answers", [(Message("user", "Hello!"),), *talks]))
    shown = []
    for folder, kind, prompts in asked:
        endpoint = LocalEndpoint.open(folder, rows=8, cache_bytes=64 << 20, progress=progress)
        requests = [
            Request(str(number), prompt, Sampling(temperature=0.0, max_tokens=tokens))
            for number, prompt in enumerate(prompts)
        ]
        for request, completion in zip(requests, endpoint.generate(requests), strict=True):
            said = request.prompt if isinstance(request.prompt, str) else request.prompt[-1].content
            shown.append({"kind": kind, "prompt": said, "text": completion.text, "finish": completion.finish})
    return shown


def bits_curve(report: Report) -> list[tuple[float, float]]:
    """(training tokens seen, validation bits per byte) where validation was measured; windows there are cut, so the
    last point is above what the table says."""
    held_out = report.shards["validation"]
    scale = (held_out["tokens"] - held_out["documents"]) / held_out["bytes"] / math.log(2)
    return [
        (line["tokens"], line["validation_loss"] * scale)
        for line in report.curve
        if "validation_loss" in line and "tokens" in line
    ]


def write_html(report: Report, path: Path) -> None:
    """The report as one file that needs no network."""
    rows = "".join(
        f"<tr{' class=ours' if entry['name'].startswith('this model') else ''}><td>{html.escape(entry['name'])}</td>"
        f"<td>{entry['bits_per_byte']:.4f}</td><td>{html.escape(entry['given'])}</td></tr>"
        for entry in report.bits_per_byte
    )
    parts = "".join(
        f"<tr><td>{html.escape(source)}</td><td>{part}</td><td>{size['documents']:,}</td><td>{size['bytes']:,}</td></tr>"
        for part in ("train", "validation")
        for source, size in sorted(report.text[part].items())
    )
    said = "".join(
        f"<p><b>{html.escape(entry['kind'])}</b> <span class=given>{html.escape(entry['prompt'])}</span> "
        f"{html.escape(entry['text'])}</p>"
        for entry in report.samples
    )
    training = {**report.training, **({f"tuning {k}": v for k, v in report.tuning.items()} if report.tuning else {})}
    facts = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(_shown(value))}</td></tr>"
        for key, value in training.items()
        if key not in ("model", "record", "tuning model", "tuning record")
    )
    page = f"""<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(report.name)}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse}}td,th{{padding:.15rem .8rem .15rem 0;text-align:left;border-bottom:1px solid #ddd}}
.ours{{font-weight:bold}}.given{{color:#888}}h2{{margin-top:2rem}}</style>
<h1>{html.escape(report.name)}</h1>
<p>Bits for each byte of {report.shards["validation"]["documents"]:,} held-out documents
({report.shards["validation"]["bytes"]:,} bytes); fewer is better.</p>
<table><tr><th>method<th>bits per byte<th>what it was given</tr>{rows}</table>
<h2>Curves</h2>{_chart(report)}
<h2>Training</h2><table>{facts}</table>
<h2>Text</h2><table><tr><th>source<th>part<th>documents<th>bytes</tr>{parts}</table>
<h2>What it writes (greedy; the grey part was given)</h2>{said}</html>
"""
    write_atomic(path, page.encode())


def _shown(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _chart(report: Report) -> str:
    """Validation bits per byte over training tokens, and the rivals as level lines, as SVG."""
    points = bits_curve(report)
    if not points:
        return "<p>No curve was recorded.</p>"
    rivals = [(entry["name"], entry["bits_per_byte"]) for entry in report.bits_per_byte]
    values = [value for _, value in points] + [value for _, value in rivals]
    low, high = float(min(values)) * 0.97, float(min(max(values) * 1.02, min(values) * 2.2))
    width, height, last = 820, 340, float(max(tokens for tokens, _ in points))

    def x(tokens: float) -> float:
        return 50 + (width - 280) * tokens / last

    def y(value: float) -> float:
        return 10 + (height - 40) * (high - min(value, high)) / (high - low)

    marks = [
        f'<text x="44" y="{y(low + (high - low) * part / 4) + 4:.1f}" text-anchor="end" font-size="11">'
        f"{low + (high - low) * part / 4:.2f}</text>"
        for part in range(5)
    ]
    lines = []
    for name, value in rivals:
        colour = next((c for start, c in _COLOURS.items() if name.startswith(start)), "#333")
        if not name.startswith("this model"):
            lines.append(
                f'<line x1="50" x2="{width - 230}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="{colour}" '
                f'stroke-dasharray="5 4"/>'
            )
        lines.append(
            f'<text x="{width - 222}" y="{y(value) + 4:.1f}" font-size="11" fill="{colour}">'
            f"{html.escape(name)} {value:.3f}</text>"
        )
    drawn = " ".join(f"{x(tokens):.1f},{y(value):.1f}" for tokens, value in points)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="bits per byte over training tokens">'
        f'{"".join(marks)}{"".join(lines)}<polyline points="{drawn}" fill="none" stroke="#0b6e4f" stroke-width="2"/>'
        f'<text x="50" y="{height - 8}" font-size="11">training tokens, up to {last:,.0f}</text></svg>'
    )

"""Forest plots as inline SVG: bars from lower to upper bound, a dot for the estimate, marked thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from steelyard.safety.words import percent, signed, visible

_TOPS = (0.01, 0.02, 0.04, 0.08, 0.12, 0.2, 0.4, 0.6, 0.8, 1.0)  # quarters of them are round
_WIDTH, _EDGE, _AXIS = 640, 12, 26
_LABEL = 46  # characters that leave room for the numbers beside them


@dataclass(frozen=True)
class Bar:
    """One row: what it is called, estimate, one-sided bounds (None where not measured), and (policy, threshold)."""

    label: str
    estimate: float | None
    lower: float | None
    upper: float | None
    limits: Sequence[tuple[str, float]] = ()

    @property
    def values(self) -> list[float]:
        found = (self.estimate, self.lower, self.upper, *(limit for _, limit in self.limits))
        return [value for value in found if value is not None]


@dataclass(frozen=True)
class _Scale:
    """From values to places. A difference runs as far to the left of zero as to the right."""

    top: float
    difference: bool

    @property
    def bottom(self) -> float:
        return -self.top if self.difference else 0.0

    def x(self, value: float) -> float:
        inside = min(max(value, self.bottom), self.top)
        return _EDGE + (_WIDTH - 2 * _EDGE) * (inside - self.bottom) / (self.top - self.bottom)

    def show(self, value: float | None) -> str:
        return signed(value) if self.difference else percent(value)


def forest(title: str, bars: Sequence[Bar], *, difference: bool = False) -> str:
    """A figure. Labels stand above their bars and thresholds under them in words, so that it reads on a phone and
    without colours. `difference`: values are differences, in [-1, 1]."""
    most = max((abs(value) for bar in bars for value in bar.values), default=1.0) * 1.02
    scale = _Scale(next((top for top in _TOPS if most <= top), 1.0), difference)
    parts, y = list[str](), 4.0
    for bar in bars:
        parts += _row(bar, scale, y + 31)
        y += 80 if bar.limits else 52
    told = "; ".join(_told(bar, scale) for bar in bars)
    return (
        f'<div class="figure"><svg viewBox="0 0 {_WIDTH} {y + _AXIS:g}" role="img" aria-label="{escape(title)}: '
        f'{escape(told)}">{"".join(_axis(scale, y + _AXIS))}{"".join(parts)}</svg></div>'
    )


def _row(bar: Bar, scale: _Scale, y: float) -> Iterator[str]:
    label, low, up = visible(bar.label), bar.lower, bar.upper
    note = "not measured" if low is None or up is None else f"{scale.show(low)} to {scale.show(up)}"
    if len(label) > _LABEL:
        label = label[:_LABEL] + "…"
    yield (
        f'<text x="{_EDGE}" y="{y - 16:g}">{escape(label)}</text>'
        f'<text class="axis" x="{_WIDTH - _EDGE}" y="{y - 16:g}" text-anchor="end">{note}</text>'
    )
    if low is not None and up is not None:
        left, right = scale.x(low), max(scale.x(up), scale.x(low) + 1)
        yield (
            f'<path class="bar" d="M{left:.1f} {y:g}H{right:.1f}"/>'
            f'<path class="bound" d="M{left:.1f} {y - 4:g}v8M{right:.1f} {y - 7:g}v14"/>'
        )
    if bar.estimate is not None:
        yield f'<circle cx="{scale.x(bar.estimate):.1f}" cy="{y:g}" r="4.5"/>'
    for name, limit in bar.limits:
        told = f"{visible(name)}: threshold {scale.show(limit)}"
        yield f'<path class="limit" d="M{scale.x(limit):.1f} {y - 11:g}v22"><title>{escape(told)}</title></path>'
    if bar.limits:
        told = ", ".join(f"{visible(name)} {scale.show(limit)}" for name, limit in bar.limits)
        yield f'<text class="axis" x="{_EDGE}" y="{y + 29:g}">threshold: {escape(told)}</text>'


def _told(bar: Bar, scale: _Scale) -> str:
    """The row for a reader who does not see it."""
    limits = "".join(f", threshold {scale.show(limit)} ({visible(name)})" for name, limit in bar.limits)
    bounds = f"bounds {scale.show(bar.lower)} and {scale.show(bar.upper)}"
    return f"{visible(bar.label)}: {scale.show(bar.estimate)}, {bounds}{limits}"


def _axis(scale: _Scale, height: float) -> Iterator[str]:
    for tick in range(5):
        value = scale.bottom + (scale.top - scale.bottom) * tick / 4
        anchor = "start" if tick == 0 else "end" if tick == 4 else "middle"
        kind = "zero" if scale.difference and tick == 2 else "grid"
        number = f"{value * 100:+g} pt" if scale.difference and tick != 2 else f"{value * 100:g}%"
        yield (
            f'<path class="{kind}" d="M{scale.x(value):.1f} 4V{height - 20:g}"/>'
            f'<text class="axis" x="{scale.x(value):.1f}" y="{height - 5:g}" text-anchor="{anchor}">{number}</text>'
        )

"""Charts as SVG inside an HTML page: without scripts, in the page's colours, and with a description in words.

The few shapes are drawn here, because Matplotlib's SVG keeps its own colours when the page turns dark, uses the same
ids in every chart of a page, is three times as large, and needs 80 MB of packages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 20, 10, 38
_BAR_HEIGHT, _BAR_LABEL, _LABEL_LENGTH = 24, 96, 15

STYLE = """
svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif}
svg text{fill:var(--ink)}
svg .axis{stroke:var(--line);stroke-width:1;fill:none}
svg .series{fill:none;stroke-width:2;stroke-linejoin:round}
svg .limit{stroke:var(--ink);stroke-width:1;stroke-dasharray:5 3}
svg .bar{fill:var(--s0)}
.s0{stroke:var(--s0);color:var(--s0)}
.s1{stroke:var(--s1);color:var(--s1);stroke-dasharray:6 3}
.s2{stroke:var(--s2);color:var(--s2);stroke-dasharray:2 3}
svg .mark{stroke-width:2;stroke-dasharray:none;fill:var(--paper)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.3rem 0 0;padding:0;font-size:.8rem}
.legend span{color:var(--ink)}
.legend svg{display:inline-block;width:26px;height:8px;vertical-align:middle;margin-right:.3rem}
"""


@dataclass(frozen=True)
class Axis:
    """One direction of a chart."""

    label: str
    low: float
    high: float

    def ticks(self) -> list[float]:
        """Return about five round values.

        >>> Axis("share", 0.0, 1.0).ticks()
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        """
        rough = (self.high - self.low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 9) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Series:
    """A line, which is interrupted where a value is None."""

    name: str
    points: Sequence[tuple[float, float | None]]
    marked: tuple[float, float] | None = None
    """The point of the line that is circled, if there is one."""


@dataclass(frozen=True)
class Limit:
    """A straight line across the chart at one value of one axis."""

    name: str
    x: float | None = None
    y: float | None = None


def line_chart(identity: str, title: str, summary: str, x: Axis, y: Axis, series: Sequence[Series],
               limits: Sequence[Limit] = ()) -> str:
    """Return a figure with lines over shares in [0, 1].

    Args:
        identity: an id that is unique in the page.
        title: the title of the chart.
        summary: a description for readers who cannot see the chart.
        x: the horizontal axis.
        y: the vertical axis.
        series: the lines, at most three.
        limits: straight lines, which are named in the chart.
    """
    def at_x(value: float) -> float:
        share = (value - x.low) / (x.high - x.low)
        return round(_LEFT + min(1.0, max(0.0, share)) * (_WIDTH - _LEFT - _RIGHT), 1)

    def at_y(value: float) -> float:
        share = (value - y.low) / (y.high - y.low)
        return round(_HEIGHT - _BOTTOM - min(1.0, max(0.0, share)) * (_HEIGHT - _TOP - _BOTTOM), 1)

    left, right, bottom = at_x(x.low), at_x(x.high), at_y(y.low)
    parts = [f'<path class="axis" d="M{left},{_TOP}V{bottom}H{right}"/>']
    for value in x.ticks():
        parts.append(f'<path class="axis" d="M{at_x(value)},{bottom}v4"/>'
                     f'<text x="{at_x(value)}" y="{bottom + 16}" text-anchor="middle">{_percent(value, x)}</text>')
    for value in y.ticks():
        parts.append(f'<path class="axis" d="M{left},{at_y(value)}h-4"/>'
                     f'<text x="{left - 7}" y="{at_y(value) + 4}" text-anchor="end">{_percent(value, y)}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x.label)}</text>')
    for limit in limits:
        if limit.y is not None:
            parts.append(f'<path class="limit" d="M{left},{at_y(limit.y)}H{right}"/>'
                         f'<text x="{right}" y="{at_y(limit.y) - 4}" text-anchor="end">{escape(limit.name)}</text>')
        elif limit.x is not None:
            anchor, shift = ("end", -4) if at_x(limit.x) > _WIDTH / 2 else ("start", 4)
            parts.append(f'<path class="limit" d="M{at_x(limit.x)},{_TOP}V{bottom}"/><text x="{at_x(limit.x) + shift}" '
                         f'y="{bottom - 6}" text-anchor="{anchor}">{escape(limit.name)}</text>')
    for index, line in enumerate(series):
        for run in _runs(line.points):
            path = "L".join(f"{at_x(across)},{at_y(up)}" for across, up in run)
            parts.append(f'<path class="series s{index}" d="M{path}"/>')
        if line.marked is not None:
            across, up = line.marked
            parts.append(f'<circle class="mark s{index}" cx="{at_x(across)}" cy="{at_y(up)}" r="4.5"/>')
    legend = "".join(f'<li><svg viewBox="0 0 26 8" aria-hidden="true"><path class="series s{index}" d="M0,4H26"/></svg>'
                     f'<span>{escape(line.name)}</span></li>' for index, line in enumerate(series))
    return _figure(identity, title, summary, _HEIGHT, parts) + f'<ul class="legend">{legend}</ul></figure>'


def bar_chart(identity: str, title: str, summary: str, bars: Sequence[tuple[str, float, str]],
              limit: float | None = None) -> str:
    """Return a figure with a horizontal bar for each (label, value, value in words).

    Args:
        identity: an id that is unique in the page.
        title: the title of the chart.
        summary: a description for readers who cannot see the chart.
        bars: the bars, from top to bottom.
        limit: the value of a vertical line.
    """
    top = max([value for _, value, _ in bars] + ([limit] if limit is not None else [])) or 1.0
    scale = (_WIDTH - _BAR_LABEL - 52) / top
    parts = []
    for index, (label, value, words) in enumerate(bars):
        at = index * _BAR_HEIGHT
        parts.append(f'<text x="{_BAR_LABEL - 6}" y="{at + 16}" text-anchor="end"><title>{escape(label)}</title>'
                     f'{escape(_shortened(label))}</text>'
                     f'<rect class="bar" x="{_BAR_LABEL}" y="{at + 4}" width="{value * scale:.1f}" height="16"/>'
                     f'<text x="{_WIDTH - 4}" y="{at + 16}" text-anchor="end">{escape(words)}</text>')
    height = len(bars) * _BAR_HEIGHT + 2
    if limit is not None:
        parts.append(f'<path class="limit" d="M{_BAR_LABEL + limit * scale:.1f},0V{height}"/>')
    return _figure(identity, title, summary, height, parts) + "</figure>"


def _figure(identity: str, title: str, summary: str, height: int, parts: Sequence[str]) -> str:
    return (f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {height}" role="img" '
            f'aria-labelledby="{identity}-title {identity}-summary">'
            f'<title id="{identity}-title">{escape(title)}</title>'
            f'<desc id="{identity}-summary">{escape(summary)}</desc>{"".join(parts)}</svg>')


def _runs(points: Sequence[tuple[float, float | None]]) -> Iterator[list[tuple[float, float]]]:
    run: list[tuple[float, float]] = []
    for right, up in points:
        if up is not None:
            run.append((right, up))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _shortened(label: str) -> str:
    """Return as much of the end of a label as there is room for; layers differ at the end."""
    return label if len(label) <= _LABEL_LENGTH else "…" + label[1 - _LABEL_LENGTH:]


def _percent(value: float, axis: Axis) -> str:
    return f"{100 * value:.0f}%" if axis.high - axis.low >= 0.05 else f"{100 * value:.1f}%"

"""A picture of where requests leave a model, as an SVG image that a README can show.

The height of the river is the share of the requests that are still in the model. The axis from left to right is the
work of the full model. So the area of the river is the work that is done, without the work of the exit heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 880, 214
_LEFT, _RIGHT, _TOP, _BOTTOM = 20, 20, 46, 88
_ACROSS, _DEEP = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_BEND = 17
"""The river narrows from this far before an exit to this far behind it, so its area is the same as with steps."""
_APART = 104
"""Labels that are closer together than this stand in two rows."""
_STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#1f2937}
.title{font-size:16px;font-weight:600}
.quiet{fill:#5b6472}
"""


def river_of(figures: Mapping[str, Any], subject: str) -> str:
    """Return the picture of a benchmark's figures.

    Args:
        figures: the figures, with `exits`, as `river` takes them, and `flops_ratio`.
        subject: the model and its data.
    """
    early = 1 - figures["exits"][-1]["share"]
    return river(figures["exits"], f"{subject}: {100 * early:.0f} % of the requests leave early; the model does "
                                   f"{100 * figures['flops_ratio']:.0f} % of its work")


def river(exits: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return the picture.

    Args:
        exits: the exits in the order of the model, with the whole model as the last. Each has a `layer`, a `cost` (the
            share of the model's FLOPs that is spent up to there, in (0, 1]) and a `share` (of the requests that leave
            there).
        title: what the picture shows, and what was gained.
    """
    surface = _TOP + _DEEP
    remaining, path, leaving, labels = 1.0, f"M{_LEFT},{_TOP}", [], []
    previous, row = -_APART, 0
    for one in exits:
        x = round(_LEFT + one["cost"] * _ACROSS, 1)
        above = round(surface - remaining * _DEEP, 1)
        remaining = max(0.0, remaining - one["share"])
        below = round(surface - remaining * _DEEP, 1)
        bend = min(_BEND, x - _LEFT)
        row = 1 - row if x - previous < _APART else 0
        previous = x
        is_last = one is exits[-1]
        if is_last:
            path += f"H{x}V{surface}H{_LEFT}Z"
        else:
            path += f"H{x - bend:.1f}C{x},{above} {x},{below} {x + bend:.1f},{below}"
            leaving.append(f'<path d="M{x},{above}V{surface + 8 + 34 * row}" stroke="#94a3b8" stroke-dasharray="2 3"/>')
        anchor, at = ("end", _WIDTH - _RIGHT) if is_last else ("middle", x) if x > _APART / 2 else ("start", _LEFT)
        name = "whole model" if is_last else one["layer"]
        labels.append(f'<text x="{at}" y="{surface + 22 + 34 * row}" text-anchor="{anchor}">{escape(name)}'
                      f'<tspan class="quiet" x="{at}" dy="15">{100 * one["share"]:.0f} % after '
                      f'{100 * one["cost"]:.0f} %</tspan></text>')
    described = "; ".join(f"{one['layer']}: {100 * one['share']:.0f} % of the requests after "
                          f"{100 * one['cost']:.0f} % of the work" for one in exits)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-labelledby="title summary">',
        f'<title id="title">{escape(title)}</title>', f'<desc id="summary">{escape(described)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="8" fill="#fff"/>',
        f'<text class="title" x="{_LEFT}" y="28">{escape(title)}</text>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_ACROSS}" height="{_DEEP}" fill="#e2e8f0"/>',
        f'<path d="{path}" fill="#3f51b5"/>', *leaving,
        f'<text x="{_LEFT + 12}" y="{surface - 12}" style="fill:#fff">requests in the model</text>',
        f'<text class="quiet" x="{_WIDTH - _RIGHT - 12}" y="{_TOP + 22}" text-anchor="end">work that is saved</text>',
        *labels, "</svg>"]) + "\n"

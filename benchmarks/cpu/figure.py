"""The cells as one SVG file: a row for each, ours over every peer on a logarithmic scale."""

import math
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from onevision_edge.calibration.frontier_svg import STYLE

_LEFT, _RIGHT, _TOP, _ROW = 170, 560, 92, 34
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_MORE = """
.join { stroke: var(--quiet); stroke-width: 1.5; }
.best { fill: var(--chosen); stroke: var(--paper); }
.reference { stroke: var(--line); stroke-dasharray: 5 4; }
.name { fill: var(--ink); }
"""


def figure(cells: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """How many times faster ours is than every peer (rings) and than the best (a diamond), as SVG."""
    ratios = {cell: found for cell, record in cells.items() if (found := ratios_of(record))}
    every = [1.0, *(ratio for found in ratios.values() for ratio in found.values())]
    low, high = math.log10(0.8 * min(every)), math.log10(1.25 * max(every))
    bottom = _TOP + _ROW * len(ratios)

    def x(ratio: float) -> float:
        return round(_LEFT + (math.log10(ratio) - low) / (high - low) * (_RIGHT - _LEFT), 1)

    body = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {bottom + 52}" width="760" role="img">']
    body += [f"<title>{escape(title)}</title>", f"<style>{STYLE}{_MORE}</style>"]
    body += [f'<rect class="paper" width="760" height="{bottom + 52}"/>', _text("title", 16, 28, title)]
    body += [_diamond(22, 52), _text("", 34, 56, "over the best peer")]
    body += [f'<circle class="mark" cx="172" cy="52" r="4.5"/>{_text("", 184, 56, "over the others")}']
    for tick in (t for t in _TICKS if low <= math.log10(t) <= high):
        body.append(_upright("reference" if tick == 1 else "grid", x(tick), bottom))
        body.append(_text("", x(tick), bottom + 20, f"{tick:g}", "middle"))
    body.append(_text("", (_LEFT + _RIGHT) / 2, bottom + 42, "times as fast as a peer", "middle"))
    for number, (cell, found) in enumerate(ratios.items()):
        marks = [x(ratio) for ratio in found.values()]
        body += _row(cell, cells[cell], marks, _TOP + _ROW * number + _ROW // 2)
    return "\n".join([*body, "</svg>", ""])


def ratios_of(record: Mapping[str, Any]) -> dict[str, float]:
    """How many times faster ours is than each peer, the best first."""
    ours, faster = record["ours"], 1 if record["unit"] == "tok/s" else -1
    if ours is None:
        return {}
    return dict(sorted(((name, (ours / peer) ** faster) for name, peer in record["peers"].items()), key=lambda p: p[1]))


def _row(cell: str, record: Mapping[str, Any], marks: list[float], y: int) -> Iterator[str]:
    yield _text("name", 16, y + 4, cell)
    yield f'<line class="join" x1="{marks[0]:g}" y1="{y}" x2="{marks[-1]:g}" y2="{y}"/>'
    yield from (f'<circle class="mark" cx="{mark:g}" cy="{y}" r="4.5"/>' for mark in marks[1:])
    yield _diamond(marks[0], y)
    yield _text("name", _RIGHT + 24, y + 4, f"{record['ours']:.3g} {record['unit']}, {record['ratio_to_best']:.2f} x")


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _upright(kind: str, x: float, bottom: int) -> str:
    return f'<line class="{kind}" x1="{x:g}" y1="{_TOP}" x2="{x:g}" y2="{bottom}"/>'


def _diamond(x: float, y: float) -> str:
    return f'<path class="best" d="M{x:g} {y - 7:g}l7 7l-7 7l-7 -7z"/>'

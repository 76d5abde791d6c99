"""The cells as one SVG file: a row for each, ours over every peer on a logarithmic scale."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rows_svg import bottom_of, diamond, frame, join, middle_of, ring, text, upright

_LEFT, _RIGHT = 170, 560
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def figure(cells: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """How many times faster ours is than every peer (rings) and than the best (a diamond), as SVG."""
    ratios = {cell: found for cell, record in cells.items() if (found := ratios_of(record))}
    every = [1.0, *(ratio for found in ratios.values() for ratio in found.values())]
    low, high = math.log10(0.8 * min(every)), math.log10(1.25 * max(every))
    bottom = bottom_of(len(ratios))

    def x(ratio: float) -> float:
        return round(_LEFT + (math.log10(ratio) - low) / (high - low) * (_RIGHT - _LEFT), 1)

    body = frame(title, len(ratios))
    body += [diamond(22, 52), text("", 34, 56, "over the best peer")]
    body += [ring(172, 52) + text("", 184, 56, "over the others")]
    for tick in (t for t in _TICKS if low <= math.log10(t) <= high):
        body.append(upright("reference" if tick == 1 else "grid", x(tick), bottom))
        body.append(text("", x(tick), bottom + 20, f"{tick:g}", "middle"))
    body.append(text("", (_LEFT + _RIGHT) / 2, bottom + 42, "times as fast as a peer", "middle"))
    for number, (cell, found) in enumerate(ratios.items()):
        body += _row(cell, cells[cell], [x(ratio) for ratio in found.values()], middle_of(number))
    return "\n".join([*body, "</svg>", ""])


def ratios_of(record: Mapping[str, Any]) -> dict[str, float]:
    """How many times faster ours is than each peer, the best first."""
    ours, faster = record["ours"], 1 if record["unit"] == "tok/s" else -1
    if ours is None:
        return {}
    return dict(sorted(((name, (ours / peer) ** faster) for name, peer in record["peers"].items()), key=lambda p: p[1]))


def _row(cell: str, record: Mapping[str, Any], marks: list[float], y: int) -> Iterator[str]:
    yield text("name", 16, y + 4, cell)
    yield join(marks[0], marks[-1], y)
    yield from (ring(mark, y) for mark in marks[1:])
    yield diamond(marks[0], y)
    yield text("name", _RIGHT + 24, y + 4, f"{record['ours']:.3g} {record['unit']}, {record['ratio_to_best']:.2f} x")

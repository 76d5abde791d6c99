"""The frontier as one SVG file: no script, no font, nothing fetched; light or dark as its reader prefers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from .axes import Axes, Mark, Point, number, printable, size, text_width

_WIDTH, _HEIGHT = 760, 460
_LEFT, _TOP, _RIGHT, _BOTTOM = 72, 72, 736, 400  # of the plot inside its axes
_LINE = 16  # the height of a line of text
_COLUMN, _WIDE = 7.4, 8.2  # a character of 12 px, plain and bold: wide fonts' average, and some room
STYLE = """
svg { color-scheme: light dark; }
svg { --paper: #ffffff; --ink: #1f2328; --quiet: #59636e; --grid: #e3e7ec; --line: #0b62d6; --chosen: #b93a00; }
@media (prefers-color-scheme: dark) {
svg { --paper: #0f141a; --ink: #e8edf2; --quiet: #9aa5b1; --grid: #28303a; --line: #62a8ff; --chosen: #ffa05c; }
}
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--quiet); }
.paper { fill: var(--paper); }
.title { font-size: 16px; font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--grid); }
.axis { stroke: var(--quiet); }
.frontier { fill: none; stroke: var(--line); stroke-width: 2; stroke-linejoin: round; }
.budget { stroke: var(--quiet); stroke-dasharray: 5 4; }
.leader { stroke: var(--quiet); stroke-width: 0.75; }
.mark { fill: var(--paper); stroke: var(--ink); stroke-width: 1.75; }
.chosen { fill: var(--chosen); stroke: var(--paper); }
.label { fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 4; stroke-linejoin: round; }
.label-chosen { fill: var(--chosen); font-weight: 600; }
"""


def svg_plot(
    frontier: Sequence[Point],
    marks: Sequence[Mark],
    title: str = "Divergence against size",
    *,
    budget_bytes: int | None = None,
    budget_divergence: float | None = None,
) -> str:
    """A plot of the frontier (sizes rising) as a step, marks with labels, and dashed lines for the budgets.

    Labels do not overlap; one for which there is no room is left to the mark's tooltip. Raises OneVisionError where
    there is nothing to plot, or a divergence is not finite.
    """
    axes = Axes.around([*frontier, *marks], budget_bytes, budget_divergence)
    budgets = _budgets(axes)
    steps = _steps(axes, frontier)
    body = [
        *_grid(axes),
        *(_line("budget", b.line) for b in budgets),
        *([_path(steps)] if steps else []),
        *_labels(axes, marks, budgets, steps),
        *(_mark(axes, mark) for mark in sorted(marks, key=lambda mark: mark.chosen)),
    ]
    return "\n".join([*_head(printable(title, 70)), *body, "</svg>", ""])


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle, y downwards; boxes that share an edge do not overlap."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def middle(self) -> tuple[float, float]:
        """Its centre, x and y."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    @classmethod
    def around(cls, x: float, y: float, reach: float) -> "Box":
        """The square around a point."""
        return cls(x - reach, y - reach, x + reach, y + reach)

    def overlaps(self, other: "Box") -> bool:
        """Whether they share more than an edge."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def within(self, other: "Box") -> bool:
        """Whether the other holds all of it."""
        across = self.left >= other.left and self.right <= other.right
        return across and self.top >= other.top and self.bottom <= other.bottom


@dataclass(frozen=True, slots=True)
class _Budget:
    label: str
    line: Box  # of no width, or of no height
    anchor: Box  # where its label belongs


_FRAME = Box(_LEFT, _TOP, _RIGHT, _BOTTOM)


def _budgets(axes: Axes) -> list[_Budget]:
    found = []
    if axes.budget_bytes is not None:
        x, label = _x(axes.across(axes.budget_bytes)), f"budget {size(axes.budget_bytes)}"
        found.append(_Budget(label, Box(x, _TOP, x, _BOTTOM), Box.around(x, _TOP + 12, 5)))
    if axes.budget_divergence is not None:
        y, label = _y(axes.down(axes.budget_divergence)), f"budget {number(axes.budget_divergence)}"
        found.append(_Budget(label, Box(_LEFT, y, _RIGHT, y), Box.around(_RIGHT - 60, y, 3)))
    return found


def _x(across: float) -> float:
    return round(_LEFT + across * (_RIGHT - _LEFT), 1)


def _y(down: float) -> float:
    return round(_TOP + down * (_BOTTOM - _TOP), 1)


def _position(axes: Axes, point: Point | Mark) -> tuple[float, float]:
    across, down = axes.at(point)
    return _x(across), _y(down)


def _head(title: str) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'role="img">'
    )
    yield f"<title>{escape(title)}</title>"
    yield f"<style>{STYLE}</style>"
    yield f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}"/>'
    yield _text("title", 16, 28, title)
    yield _text(
        "", 16, 52, "KL divergence of the next token, nats (logarithmic), against size; line: the least for each size"
    )


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(kind: str, ends: Box) -> str:
    return f'<line class="{kind}" x1="{ends.left:g}" y1="{ends.top:g}" x2="{ends.right:g}" y2="{ends.bottom:g}"/>'


def _grid(axes: Axes) -> Iterator[str]:
    for down, text in axes.divergence_ticks:
        yield _line("grid", Box(_LEFT, _y(down), _RIGHT, _y(down)))
        yield _text("", _LEFT - 8, _y(down) + 4, text, "end")
    for across, text in axes.size_ticks:
        yield _line("grid", Box(_x(across), _TOP, _x(across), _BOTTOM))
        yield _text("", _x(across), _BOTTOM + 20, text, "middle")
    yield _line("axis", Box(_LEFT, _TOP, _LEFT, _BOTTOM))
    yield _line("axis", Box(_LEFT, _BOTTOM, _RIGHT, _BOTTOM))
    yield _text("", (_LEFT + _RIGHT) / 2, _BOTTOM + 44, f"size ({axes.unit})", "middle")


def _steps(axes: Axes, frontier: Sequence[Point]) -> list[tuple[float, float]]:
    """The corners of the step line: from each point to the right, then down to the next."""
    corners: list[tuple[float, float]] = []
    for x, y in (_position(axes, point) for point in frontier):
        corners += [(x, corners[-1][1])] if corners else []
        corners.append((x, y))
    return corners


def _path(corners: Sequence[tuple[float, float]]) -> str:
    line = "L".join(f"{x:g} {y:g}" for x, y in corners)
    return f'<path class="frontier" d="M{line}"><title>the least divergence for each size</title></path>'


def _mark(axes: Axes, mark: Mark) -> str:
    x, y = _position(axes, mark)
    tooltip = f"<title>{escape(_named(mark))}</title>"
    if mark.chosen:
        return f'<path class="mark chosen" d="M{x:g} {y - 9:g}l9 9l-9 9l-9 -9z">{tooltip}</path>'
    return f'<circle class="mark" cx="{x:g}" cy="{y:g}" r="4.5">{tooltip}</circle>'


def _named(mark: Mark) -> str:
    return f"{printable(mark.label, 40)}: {size(mark.bytes)}, {number(mark.divergence)}"


@dataclass(frozen=True, slots=True)
class _Label:
    text: str
    mark: Box  # what it belongs to, and must not cover
    chosen: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return math.ceil((_WIDE if self.chosen else _COLUMN) * text_width(self.text)), _LINE


def _labels(
    axes: Axes, marks: Sequence[Mark], budgets: Sequence[_Budget], corners: Sequence[tuple[float, float]]
) -> Iterator[str]:
    """Labels where there is room: the chosen mark's first, with its numbers, then the budgets'."""
    chosen = [_Label(_named(m), Box.around(*_position(axes, m), 10), True) for m in marks if m.chosen]
    others = [_Label(printable(m.label, 40), Box.around(*_position(axes, m), 6)) for m in marks if not m.chosen]
    taken = [label.mark for label in chosen + others]
    avoided = [Box(x, y, next_x, next_y) for (x, y), (next_x, next_y) in pairwise(corners)]
    avoided += [budget.line for budget in budgets]
    for label in [*chosen, *(_Label(b.label, b.anchor) for b in budgets), *others]:
        box = _place(label, taken, avoided)
        if box is not None:
            leader = _leader(label.mark, box)
            taken.append(box)
            avoided += leader
            yield from _drawn(label, box, leader)


def _drawn(label: _Label, box: Box, leader: Sequence[Box]) -> Iterator[str]:
    if leader:
        (x, y), (last_x, last_y) = leader[0].middle, leader[-1].middle
        yield _line("leader", Box(x, y, last_x, last_y))
    kind = "label label-chosen" if label.chosen else "label"
    if box.left >= label.mark.right:
        yield _text(kind, box.left + 2, box.bottom - 4, label.text)
    elif box.right <= label.mark.left:
        yield _text(kind, box.right - 2, box.bottom - 4, label.text, "end")
    else:
        yield _text(kind, box.middle[0], box.bottom - 4, label.text, "middle")


def _place(label: _Label, taken: Sequence[Box], avoided: Sequence[Box]) -> Box | None:
    """The best box for a label: in the frame, over nothing that is taken, near its mark, on few of the avoided boxes.

    None where there is no room.
    """
    best, least = None, math.inf
    for distance, box in _around(label.mark, *label.size):
        if distance >= least:
            break  # the others are farther still
        if box.within(_FRAME) and not any(map(box.overlaps, taken)):
            crossed = [dot for dot in _leader(label.mark, box) if not dot.overlaps(label.mark)]
            covered = sum(map(box.overlaps, avoided)) + sum(a.overlaps(b) for a in crossed for b in taken)
            cost = distance + 2 * covered
            best, least = (box, cost) if cost < least else (best, least)
    return best


def _around(mark: Box, wide: float, high: float) -> Iterator[tuple[float, Box]]:
    """Boxes on ever wider rings around a mark: right, left, above and below first, then what lies between."""
    x, y = mark.middle
    reach = (mark.right - mark.left) / 2
    for ring in range(24):
        for k, turn in enumerate((0, 8, 12, 4, 14, 10, 2, 6, 15, 1, 9, 7, 13, 11, 3, 5)):
            across, down = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
            left = x + across * (reach + 12 * ring + wide / 2) - wide / 2
            top = y + down * (reach + 12 * ring + high / 2) - high / 2
            yield ring + 0.06 * k, Box(round(left), round(top), round(left) + wide, round(top) + high)


def _leader(mark: Box, box: Box) -> list[Box]:
    """Dots along the line from a mark to the box of its label; none where the box is close by."""
    x, y = mark.middle
    last_x, last_y = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
    length = math.hypot(last_x - x, last_y - y)
    if length < (mark.right - mark.left) / 2 + 6:
        return []
    dots = math.ceil(length / 4)
    return [Box.around(x + (last_x - x) * i / dots, y + (last_y - y) * i / dots, 1) for i in range(dots + 1)]

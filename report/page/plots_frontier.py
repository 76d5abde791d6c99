"""What is lost against what is saved: every candidate as a mark, and the line of those that no other beats."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...calibration.axes import printable, text_width
from ...calibration.frontier_svg import Box
from .numbers import AMBIGUOUS, FAIL, verdict_text
from .plots import Scale, image, line, text, title

_WIDTH, _HEIGHT = 360, 300
_FRAME = Box(50, 26, 352, 252)  # of the plot inside its axes
_ROOM = Box(_FRAME.left + 2, 16, _WIDTH, _FRAME.bottom)  # of labels
_COLUMN, _LINE = 7.2, 15  # a character of 12 px in a wide font, and a line of text
_REACH = 6.0  # of a mark, and of what must stay free around it


@dataclass(frozen=True, slots=True)
class Mark:
    """A model: its cost (x) and what it is worth (y), and how both read. verdict: None is the reference's."""

    label: str
    x: float
    y: float
    words: str
    verdict: str | None = None
    low: float | None = None  # of the 95 % interval of y
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows, its scale, and whether more of it is better."""

    label: str
    scale: Scale
    more_is_better: bool = False


def frontier_plot(marks: Sequence[Mark], x: Axis, y: Axis) -> str:
    """An SVG with a step line through the marks that no other beats in both. Labels without room are left out."""
    places = [(_x(x, mark.x), _y(y, mark.y)) for mark in marks]
    label = f"{y.label} against {x.label}: " + "; ".join(f"{mark.label} {mark.words}" for mark in marks)
    body = [
        *_grid(x, y),
        _steps(marks, places, y.more_is_better),
        *(_whisker(y, mark, place) for mark, place in zip(marks, places, strict=True)),
        *_labels(marks, places),
        *(_mark(mark, place) for mark, place in zip(marks, places, strict=True)),
    ]
    return image(label, f'class="frontier" viewBox="0 0 {_WIDTH} {_HEIGHT}"', body)


def undominated(marks: Sequence[Mark], more_is_better: bool) -> list[int]:
    """Indices of the marks that no other beats in cost without being worse, in order of cost; failed ones apart."""
    sign = -1 if more_is_better else 1
    order = sorted((i for i, m in enumerate(marks) if m.verdict != FAIL), key=lambda i: (marks[i].x, sign * marks[i].y))
    kept: list[int] = []
    for index in order:
        if not kept or sign * marks[index].y < sign * marks[kept[-1]].y:
            kept.append(index)
    return kept


def _x(axis: Axis, value: float) -> float:
    return round(_FRAME.left + axis.scale.part(value) * (_FRAME.right - _FRAME.left), 1)


def _y(axis: Axis, value: float) -> float:
    return round(_FRAME.bottom - axis.scale.part(value) * (_FRAME.bottom - _FRAME.top), 1)


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    yield text("tick name", 4, 13, f"{y.label} ({'↑' if y.more_is_better else '↓'} better)")
    for value, words in y.scale.ticks:
        down = _y(y, value)
        yield line("grid", _FRAME.left, down, _FRAME.right, down)
        yield text("tick", _FRAME.left - 6, down + 4, words, "end")
    for value, words in x.scale.ticks:
        across = _x(x, value)
        yield line("grid", across, _FRAME.top, across, _FRAME.bottom)
        yield text("tick", across, _FRAME.bottom + 16, words, "middle")
    yield line("frame", _FRAME.left, _FRAME.bottom, _FRAME.right, _FRAME.bottom)
    yield text("tick name", _FRAME.right, _HEIGHT - 12, f"{x.label} (← better)", "end")


def _steps(marks: Sequence[Mark], places: Sequence[tuple[float, float]], more_is_better: bool) -> str:
    """From each mark of the frontier to the right, then to the next."""
    corners = [places[index] for index in undominated(marks, more_is_better)]
    if len(corners) < 2:
        return ""
    steps = "".join(f"H{after[0]:g}V{after[1]:g}" for _, after in pairwise(corners))
    return f'<path class="frontier-line" d="M{corners[0][0]:g} {corners[0][1]:g}{steps}"/>'


def _whisker(y: Axis, mark: Mark, place: tuple[float, float]) -> str:
    if mark.low is None or mark.high is None:
        return ""
    ends = [min(max(_y(y, value), _FRAME.top), _FRAME.bottom) for value in (mark.low, mark.high)]
    return line("whisker", place[0], ends[0], place[0], ends[1])


def _mark(mark: Mark, place: tuple[float, float]) -> str:
    """A ring for the reference, a disc for PASS, a diamond for AMBIGUOUS, a cross for FAIL."""
    x, y = place
    words = title(f"{mark.label}: {mark.words}, {verdict_text(mark.verdict) if mark.verdict else 'the reference'}")
    if mark.verdict == FAIL:
        return f'<path class="mark fail" d="M{x - 5:g} {y - 5:g}l10 10m0 -10l-10 10">{words}</path>'
    if mark.verdict == AMBIGUOUS:
        return f'<path class="mark ambiguous" d="M{x:g} {y - 6:g}l6 6l-6 6l-6 -6z">{words}</path>'
    kind = "reference" if mark.verdict is None else "pass"
    return f'<circle class="mark {kind}" cx="{x:g}" cy="{y:g}" r="4.5">{words}</circle>'


def _labels(marks: Sequence[Mark], places: Sequence[tuple[float, float]]) -> Iterator[str]:
    taken = [Box.around(x, y, _REACH) for x, y in places]
    for mark, place in zip(marks, places, strict=True):
        words = printable(mark.label, 24)
        box = _room(place, _COLUMN * text_width(words), taken)
        if box is not None:
            taken.append(box)
            yield _leader(place, box)
            # A narrower font leaves room; on the left of a mark that is where the label begins.
            left = box.right <= place[0]
            yield text("label", box.right if left else box.left, box.bottom - 3.5, words, "end" if left else "start")


def _leader(place: tuple[float, float], box: Box) -> str:
    """A line to a label that is not right beside its mark."""
    x, y = min(max(place[0], box.left), box.right), min(max(place[1], box.top), box.bottom)
    return line("leader", *place, x, y) if math.hypot(x - place[0], y - place[1]) > 2 * _REACH else ""


def _room(place: tuple[float, float], wide: float, taken: Sequence[Box]) -> Box | None:
    """The nearest place for a label beside, above or below its mark that nothing else takes."""
    x, y = place
    for rise in sorted((6 * step for step in range(-14, 15)), key=abs):
        beside = (x + _REACH + 2, x - _REACH - 2 - wide)
        for left in (*beside, x - wide / 2, x + 3 * _REACH, x - 3 * _REACH - wide) if abs(rise) > 12 else beside:
            box = Box(round(left, 1), y + rise - _LINE / 2, round(left + wide, 1), y + rise + _LINE / 2)
            if box.within(_ROOM) and not any(map(box.overlaps, taken)):
                return box
    return None

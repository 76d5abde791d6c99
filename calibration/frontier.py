"""What `quantize --precision auto` shows of its choice: a table, a plot for the terminal, and one as SVG.

Both plots are of divergence, on a logarithmic axis, against size. The frontier is a step: at each size, the least
divergence that this size allows.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from string import ascii_letters

from .allocation import Allocation, Choice, by_group
from .axes import Axes, Mark, Point, number, printable, size, text_width
from .frontier_svg import svg_plot

__all__ = ["HEADER", "Mark", "Point", "allocation_rows", "svg_plot", "text_plot"]

HEADER = ("group", "precision", "size", "divergence", "the others instead")


def allocation_rows(choices: Sequence[Choice], allocation: Allocation) -> tuple[list[list[str]], list[str]]:
    """A row for each group, in the order of the choices, and the header: what `cli.console.table` takes.

    The last column is what the group's other precisions would have added or saved, the smallest first.
    """
    rows = []
    for group, options in by_group(choices).items():
        chosen = next(c for c in options if c.precision == allocation.chosen[group])
        others = sorted((c for c in options if c is not chosen), key=lambda c: (c.bytes, c.divergence, c.precision))
        instead = ", ".join(f"{c.precision} {_difference(c, chosen)}" for c in others)
        rows.append([group, chosen.precision, size(chosen.bytes), number(chosen.divergence), instead])
    return rows, list(HEADER)


def _difference(other: Choice, chosen: Choice) -> str:
    added, lost = other.bytes - chosen.bytes, other.divergence - chosen.divergence
    return f"{'−' if added < 0 else '+'}{size(abs(added), 2)} {'−' if lost < 0 else '+'}{number(abs(lost), 2)}"


def text_plot(
    points: Sequence[Point],
    marks: Sequence[Mark] = (),
    *,
    width: int = 72,
    height: int = 20,
    budget_bytes: int | None = None,
    budget_divergence: float | None = None,
) -> str:
    """A plot for a terminal, `width` columns (at least 40) by `height` lines, its legend included.

    points: the frontier, sizes rising, in braille dots. The chosen mark is ◆, the others are letters; those that fall
    on one another stand side by side. A legend that leaves fewer than 5 rows makes the plot higher.
    Raises OneVisionError where there is nothing to plot, or a divergence is not finite.
    """
    axes, columns, signed = (
        Axes.around([*points, *marks], budget_bytes, budget_divergence),
        max(width, 40),
        _signed(marks),
    )
    legend = _legend(signed, budget_bytes, budget_divergence, columns)
    canvas = _Canvas(axes, columns, max(height - len(legend) - 3, 5))
    canvas.budgets()
    canvas.step(points)
    for sign, mark in signed:
        canvas.mark(sign, mark)
    return "\n".join(["divergence (nats)", *canvas.lines(), *legend])


def _signed(marks: Sequence[Mark]) -> list[tuple[str, Mark]]:
    """The marks with the character that stands for each, the chosen one first."""
    letters = iter(ascii_letters)
    return [("◆" if m.chosen else next(letters, "•"), m) for m in sorted(marks, key=lambda mark: not mark.chosen)]


def _legend(
    signed: Sequence[tuple[str, Mark]], budget_bytes: int | None, budget_divergence: float | None, columns: int
) -> list[str]:
    entries = [f"{sign} {mark.label}: {size(mark.bytes)}, {number(mark.divergence)}" for sign, mark in signed]
    entries += [] if budget_bytes is None else [f"┊ budget: {size(budget_bytes)}"]
    entries += [] if budget_divergence is None else [f"┈ budget: {number(budget_divergence)}"]
    lines: list[str] = []
    for entry in (printable(entry, columns) for entry in entries):
        if lines and text_width(lines[-1]) + 3 + text_width(entry) <= columns:
            lines[-1] += "   " + entry
        else:
            lines.append(entry)
    return lines


# Braille patterns (Unicode 2800): the bit of each of 4 x 2 dots.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


class _Canvas:
    """Cells of 2 x 4 dots under construction, and the characters that stand over them and behind them."""

    def __init__(self, axes: Axes, columns: int, rows: int) -> None:
        self.axes = axes
        self.margin = max(len(text) for _, text in axes.divergence_ticks) + 2
        self.columns, self.rows = columns - self.margin, rows
        self.dots = [[0] * self.columns for _ in range(rows)]
        self.over: dict[tuple[int, int], str] = {}
        self.behind: dict[tuple[int, int], str] = {}

    def _dot(self, across: float, down: float) -> tuple[int, int]:
        return round(down * (4 * self.rows - 1)), round(across * (2 * self.columns - 1))

    def _cell(self, across: float, down: float) -> tuple[int, int]:
        row, column = self._dot(across, down)
        return row // 4, column // 2

    def budgets(self) -> None:
        """Lines through the whole plot."""
        if self.axes.budget_bytes is not None:
            _, column = self._cell(self.axes.across(self.axes.budget_bytes), 0)
            self.behind.update({(row, column): "┊" for row in range(self.rows)})
        if self.axes.budget_divergence is not None:
            row, _ = self._cell(0, self.axes.down(self.axes.budget_divergence))
            self.behind.update({(row, column): "┈" for column in range(self.columns)})

    def step(self, points: Sequence[Point]) -> None:
        """The frontier: from each point to the right, then down to the next."""
        dots = [self._dot(*self.axes.at(point)) for point in points]
        for (row, column), (next_row, next_column) in pairwise(dots + dots[-1:]):
            along = [(row, x) for x in range(column, next_column + 1)]
            for y, x in along + [(y, next_column) for y in range(row, next_row + 1)]:
                self.dots[y // 4][x // 2] |= _DOTS[y % 4][x % 2]

    def mark(self, sign: str, mark: Mark) -> None:
        """A character where the mark is or, where another stands, as close as there is room."""
        row, column = self._cell(*self.axes.at(mark))
        cells = ((r, c) for r in range(self.rows) for c in range(self.columns) if (r, c) not in self.over)
        free = min(
            cells, key=lambda cell: (2 * abs(cell[0] - row) + abs(cell[1] - column), cell), default=(row, column)
        )
        self.over[free] = sign

    def lines(self) -> Iterator[str]:
        """The plot with its axes, from the top."""
        ticks = {self._cell(0, down)[0]: text for down, text in reversed(self.axes.divergence_ticks)}
        for row in range(self.rows):
            edge = f"{ticks.get(row, ''):>{self.margin - 2}} {'┤' if row in ticks else '│'}"
            yield (edge + "".join(self._character(row, column) for column in range(self.columns))).rstrip()
        yield from self._size_axis()

    def _character(self, row: int, column: int) -> str:
        dots, cell = self.dots[row][column], (row, column)
        return self.over.get(cell) or (chr(0x2800 + dots) if dots else self.behind.get(cell, " "))

    def _size_axis(self) -> Iterator[str]:
        axis, labels = ["─"] * self.columns, ""
        for across, tick in self.axes.size_ticks:
            _, column = self._cell(across, 0)
            text = f"{tick} {self.axes.unit}"
            start = self.margin + column - len(text) // 2
            if len(labels) < start and start + len(text) <= self.margin + self.columns:
                axis[column] = "┬"
                labels = f"{labels:<{start}}{text}"
        yield " " * (self.margin - 1) + "└" + "".join(axis)
        yield labels

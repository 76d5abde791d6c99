"""The table and the two plots of a frontier: what stands where, measured with a real font, and what must not."""

import math
import re
from collections.abc import Sequence
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from onevision_edge.calibration.allocation import Allocation, Choice
from onevision_edge.calibration.axes import linear_ticks, log_ticks, number, size, unit_of
from onevision_edge.calibration.frontier import HEADER, Mark, Point, allocation_rows, svg_plot, text_plot
from onevision_edge.cli.console import table
from onevision_edge.errors import OneVisionError

POINTS = [Point(2 * 10**9 + i * 10**8, 0.2 * math.exp(-i / 3)) for i in range(40)] + [Point(6 * 10**9, 0.0)]
MARKS = [
    Mark("float", 6 * 10**9, 0.0),
    Mark("fp8", 3_020_000_000, 0.02),
    Mark("int8", 3_000_000_000, 0.03),
    Mark("int4-block128", 2_010_000_000, 0.25),
    Mark("nvfp4", 2_050_000_000, 0.21),
    Mark("auto", 2_800_000_000, 0.2 * math.exp(-8 / 3), True),
]

# The table


def test_rows_say_what_was_chosen_and_what_the_others_would_change() -> None:
    choices = [
        Choice("model.layers.0.mlp", "float", 75_000_000, 0.0),
        Choice("model.layers.0.mlp", "int8", 37_700_000, 0.00123),
        Choice("model.layers.0.mlp", "fp8", 37_700_000, 0.002),
        Choice("model.layers.0.mlp", "int4", 19_900_000, 0.0345),
        Choice("kv_cache", "int8", 1500, 2.5e-6),
    ]
    rows, header = allocation_rows(choices, Allocation({"model.layers.0.mlp": "int8", "kv_cache": "int8"}, 0, 0.0))
    assert header == list(HEADER)
    assert rows == [
        [
            "model.layers.0.mlp",
            "int8",
            "37.7 MB",
            "0.00123",
            "int4 −18 MB +0.033, fp8 +0 B +0.00077, float +37 MB −0.0012",
        ],
        ["kv_cache", "int8", "1.5 kB", "2.5e-6", ""],
    ]
    assert table(rows, header).splitlines()[2].startswith("model.layers.0.mlp  int8       37.7 MB  0.00123 ")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999_499_000, "999 MB"), (999_600_000, "1 GB"), (1234e12, "1234 TB"), (-5e6, "-5 MB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_numbers() -> None:
    assert [number(v) for v in (0, 0.0001, 1e-5, 0.01234, 1.5, 1000)] == ["0", "0.0001", "1e-5", "0.0123", "1.5", "1e3"]
    assert size(99.96e6, 2) == "100 MB"


# Ticks


@given(st.floats(0, 1e12), st.floats(1e-3, 1e12))
def test_ticks_of_sizes_are_round_even_and_inside(low: float, length: float) -> None:
    high = max(low + length, low * 1.02)
    ticks = [value for value, _ in linear_ticks(low, high)]
    steps = [b - a for a, b in pairwise(ticks)]
    assert 2 <= len(ticks) <= 8
    assert low - 1e-6 * (high - low) <= ticks[0] <= ticks[-1] <= high + 1e-6 * (high - low)
    assert max(steps) - min(steps) <= 1e-6 * max(steps)
    assert [float(text) for _, text in linear_ticks(low, high)] == pytest.approx(ticks, rel=1e-9, abs=1e-9 * high)


@given(st.lists(st.one_of(st.just(0.0), st.floats(-12, 3).map(lambda p: 10.0**p)), min_size=1, max_size=6))
def test_ticks_of_divergences_enclose_them(divergences: list[float]) -> None:
    (bottom, top), ticks = log_ticks(divergences)
    positive = [d for d in divergences if d > 0]
    assert all(bottom < math.log10(d) <= top for d in positive)
    assert (0.0 in ticks) == (0.0 in divergences)
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    assert all(re.fullmatch(r"[125](\.0)?", f"{t / 10 ** math.floor(math.log10(t) + 1e-9):.6g}") for t in ticks if t)


# The terminal


def cells(plot: str) -> dict[str, tuple[int, int]]:
    """Row and column of every mark, in the rows that have an axis on their left."""
    found = {}
    for row, line in enumerate(plot.splitlines()):
        edge = max(line.find("┤"), line.find("│"))
        for column, character in enumerate(line[edge + 1 :] if edge > 0 else ""):
            if character == "◆" or character.isalpha():
                found[character] = (row, column)
    return found


def test_a_text_plot_has_its_size_and_its_marks_in_order() -> None:
    plot = text_plot(POINTS, MARKS, width=90, height=30, budget_bytes=2_900_000_000)
    lines = plot.splitlines()
    assert len(lines) == 30
    assert max(map(len, lines)) == 90
    where = cells(plot)
    assert set(where) == {"◆", *"abcde"}
    signs = dict(zip(["◆", *"abcde"], [MARKS[-1], *MARKS[:-1]], strict=True))
    for (one, first), (other, second) in combinations(signs.items(), 2):
        assert (where[one][1] - where[other][1]) * (first.bytes - second.bytes) >= 0
        assert (where[one][0] - where[other][0]) * (first.divergence - second.divergence) <= 0
    legend = "\n".join(lines[-4:])
    for entry in ("◆ auto: 2.8 GB, 0.0139", "a float: 6 GB, 0", "d int4-block128: 2.01 GB, 0.25", "┊ budget: 2.9 GB"):
        assert entry in legend


@pytest.mark.parametrize(("width", "height"), [(40, 16), (72, 20), (200, 60)])
def test_text_plots_of_other_sizes(width: int, height: int) -> None:
    lines = text_plot(POINTS, MARKS[:3], width=width, height=height).splitlines()
    assert (len(lines), max(map(len, lines))) == (height, width)


def test_zero_lies_on_the_floor_beside_its_tick() -> None:
    lines = text_plot(POINTS, MARKS, width=72, height=24).splitlines()
    [floor] = [line for line in lines if line.split("┤")[0].strip() == "0"]
    assert floor.endswith("a")
    assert lines[lines.index(floor) + 1].strip().startswith("└")


def test_the_step_goes_right_then_down() -> None:
    lines = text_plot([Point(10**9, 0.1), Point(2 * 10**9, 0.001)], width=60, height=14).splitlines()
    rows = [line[line.find("┤" if "┤" in line else "│") + 1 :] for line in lines if "┤" in line or "│" in line]
    drawn = [[c for c, character in enumerate(row) if "⠀" < character <= "⣿"] for row in rows]
    filled = [columns for columns in drawn if columns]
    assert filled[0] == list(range(filled[0][0], filled[0][-1] + 1))
    assert len(filled[0]) > 40
    assert all(columns == [filled[0][-1]] for columns in filled[1:])


def test_marks_on_the_same_spot_stand_side_by_side() -> None:
    marks = [Mark(name, 10**9, 0.1, name == "auto") for name in ("int8", "fp8", "auto")]
    where = cells(text_plot([Point(10**9, 0.1), Point(2 * 10**9, 0.01)], marks))
    assert set(where) == {"◆", "a", "b"}
    assert max(abs(where["◆"][1] - where[s][1]) + 2 * abs(where["◆"][0] - where[s][0]) for s in "ab") <= 1


def test_a_name_cannot_steer_the_terminal() -> None:
    plot = text_plot(POINTS, [Mark("\x1b[2Jplan\n", 3 * 10**9, 0.1)])
    assert "a �[2Jplan�: 3 GB, 0.1" in plot
    assert "\x1b" not in plot


# SVG

NAMESPACE = "{http://www.w3.org/2000/svg}"
Rectangle = tuple[float, float, float, float]


def texts(svg: str) -> list[tuple[ElementTree.Element, Rectangle]]:
    """The text elements and their boxes, with the metrics of Pillow's own font; bold is a tenth wider."""
    found = []
    for element in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text"):
        bold = element.get("class") in ("title", "label label-chosen")
        font = ImageFont.load_default(16 if element.get("class") == "title" else 12)
        wide = font.getlength(element.text or "") * (1.1 if bold else 1)
        x, y = float(element.get("x", "nan")), float(element.get("y", "nan"))
        left = x - wide * {"start": 0, "middle": 0.5, "end": 1}[element.get("text-anchor", "start")]
        found.append((element, (left, y - 0.8 * font.size, left + wide, y + 0.2 * font.size)))
    return found


def overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def assert_readable(svg: str) -> None:
    """Every text lies in the view box, and no two cover each other."""
    root = ElementTree.fromstring(svg)
    _, _, wide, high = map(float, root.get("viewBox", "").split())
    found = texts(svg)
    for element, (left, top, right, bottom) in found:
        assert left >= 0, element.text
        assert right <= wide, element.text
        assert top >= 0, element.text
        assert bottom <= high, element.text
    for (one, box), (other, second) in combinations(found, 2):
        assert not overlap(box, second), (one.text, other.text)
    for circle in root.iter(f"{NAMESPACE}circle"):
        x, y = float(circle.get("cx", "nan")), float(circle.get("cy", "nan"))
        assert not [e.text for e, box in found if overlap(box, (x - 4.5, y - 4.5, x + 4.5, y + 4.5)) and e.get("class")]


def labels(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text") if "label" in e.get("class", "")]


def test_an_svg_is_readable_and_names_every_mark() -> None:
    svg = svg_plot(POINTS, MARKS, "4B on scenes", budget_bytes=2_900_000_000, budget_divergence=0.05)
    assert_readable(svg)
    named = {"auto: 2.8 GB, 0.0139", "budget 2.9 GB", "budget 0.05", *(m.label for m in MARKS if not m.chosen)}
    assert set(labels(svg)) == named
    assert "size (GB)" in svg


def test_an_svg_fetches_and_runs_nothing() -> None:
    svg = svg_plot(POINTS, MARKS, budget_bytes=2_900_000_000)
    tags = {element.tag.removeprefix(NAMESPACE) for element in ElementTree.fromstring(svg).iter()}
    assert tags <= {"svg", "title", "style", "rect", "line", "path", "circle", "text"}
    assert not re.search(
        r"url\(|@import|@font-face|href|script|\son\w+=", svg.replace("http://www.w3.org/2000/svg", "")
    )
    assert "@media (prefers-color-scheme: dark)" in svg


def test_marks_lie_where_the_ticks_say() -> None:
    svg = svg_plot(POINTS, MARKS)
    root = ElementTree.fromstring(svg)
    ticks = [(e.text or "", float(e.get("x", "")), float(e.get("y", "")), e.get("text-anchor")) for e, _ in texts(svg)]
    y = {text: y - 4 for text, _, y, anchor in ticks if anchor == "end" and re.fullmatch(r"[\d.e-]+", text)}
    x = {float(text): x for text, x, _, anchor in ticks if anchor == "middle" and re.fullmatch(r"\d+", text)}
    circles = [(float(e.get("cx", "")), float(e.get("cy", ""))) for e in root.iter(f"{NAMESPACE}circle")]
    for mark in MARKS[:5]:
        across = x[3] + (x[5] - x[3]) / 2 * (mark.bytes / 1e9 - 3)
        decades = math.log10(mark.divergence / 0.1) if mark.divergence else 0
        down = y["0.1"] + (y["0.1"] - y["0.001"]) / 2 * decades if mark.divergence else y["0"]
        assert min(math.hypot(across - cx, down - cy) for cx, cy in circles) < 0.2, mark.label


def test_the_frontier_is_one_step_line() -> None:
    [path] = re.findall(r'<path class="frontier" d="M([^"]+)"', svg_plot(POINTS, []))
    corners = [tuple(map(float, pair.split())) for pair in path.split("L")]
    assert len(corners) == 2 * len(POINTS) - 1
    for k, ((x, y), (next_x, next_y)) in enumerate(pairwise(corners)):
        assert (next_y == y and next_x > x) if k % 2 == 0 else (next_x == x and next_y > y)


def test_names_are_escaped() -> None:
    name = "<b>&\"int4'\x00\ud800</b>"
    svg = svg_plot(POINTS, [Mark(name, 3 * 10**9, 0.1)], title="a < b & c")
    svg.encode()
    assert labels(svg) == ["<b>&\"int4'��</b>"]
    assert "a < b & c" in [e.text for e, _ in texts(svg)]
    assert not [e for e in ElementTree.fromstring(svg).iter() if e.tag == "b"]


def test_long_texts_are_shortened() -> None:
    svg = svg_plot(POINTS, [Mark("m" * 500, 3 * 10**9, 0.1)], title="t" * 500)
    assert_readable(svg)
    assert labels(svg) == ["m" * 39 + "…"]


mark = st.builds(
    Mark,
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=24),
    st.integers(0, 10**10),
    st.one_of(st.just(0.0), st.floats(-12, 3).map(lambda p: 10.0**p)),
    st.booleans(),
)
crowded = st.builds(
    Mark,
    st.text("abcdefgh<&-48 ", min_size=1, max_size=20),
    st.integers(4_000_000_000, 4_010_000_000),
    st.floats(0.1, 0.12),
    st.booleans(),
)
budgets = st.one_of(st.none(), st.integers(0, 10**11))
divergence_budgets = st.one_of(st.none(), st.floats(0, 100))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(mark, crowded), min_size=1, max_size=10), budgets, divergence_budgets)
def test_any_marks_can_be_read(marks: Sequence[Mark], budget_bytes: int | None, divergence: float | None) -> None:
    svg = svg_plot([], marks, budget_bytes=budget_bytes, budget_divergence=divergence)
    root = ElementTree.fromstring(svg)
    assert len(list(root.iter(f"{NAMESPACE}circle"))) == sum(not m.chosen for m in marks)
    if all(m.label.isascii() for m in marks):  # what Pillow's font has
        assert_readable(svg)
    plot = text_plot([], marks, width=60, height=24, budget_bytes=budget_bytes, budget_divergence=divergence)
    assert len(plot.splitlines()) >= 24
    assert all(line.isprintable() for line in plot.splitlines())


@settings(max_examples=30, deadline=None)
@given(st.lists(crowded, min_size=2, max_size=10))
def test_a_crowd_is_labelled_in_full(marks: Sequence[Mark]) -> None:
    svg = svg_plot(POINTS, marks)
    assert_readable(svg)
    assert len(labels(svg)) == len(marks)


# Both


@pytest.mark.parametrize("plot", [text_plot, svg_plot])
def test_what_cannot_be_plotted(plot) -> None:
    with pytest.raises(OneVisionError, match="nothing to plot"):
        plot([], [])
    for divergence in (math.inf, math.nan):
        with pytest.raises(OneVisionError, match=r"a model of 3 GB diverges by (inf|nan) nats"):
            plot(POINTS, [Mark("broken", 3 * 10**9, divergence)])


@pytest.mark.parametrize("plot", [text_plot, svg_plot])
def test_a_budget_far_off_does_not_squeeze_the_plot(plot) -> None:
    def across(budget: int | None) -> list[str]:
        lines = plot(POINTS, [], budget_bytes=budget).splitlines()
        return [line for line in lines if "┬" in line or 'class="frontier"' in line]

    assert across(10**12) == across(None)
    assert across(7 * 10**9) != across(None)


@pytest.mark.parametrize("plot", [text_plot, svg_plot])
@pytest.mark.parametrize("divergence", [0.0, 1e-300, 0.5])
def test_a_single_mark(plot, divergence: float) -> None:
    assert "only" in plot([], [Mark("only", 0, divergence, True)])
    assert "only" in plot([], [Mark("only", 4 * 10**9, divergence, True)])


def test_units() -> None:
    assert [unit_of(n)[0] for n in (0, 5e3, 5e6, 5e9, 5e12)] == ["B", "kB", "MB", "GB", "TB"]

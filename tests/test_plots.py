"""The plots of a report: what stands where, read back from their SVG."""

import math
import re
from itertools import combinations, pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from report_records import distance, latency_record, parity_record, profile, stage_names

from onevision_edge.calibration.frontier_svg import Box
from onevision_edge.report.page.frontiers import frontiers
from onevision_edge.report.page.latency_tables import cell_names, rows_of, speeds
from onevision_edge.report.page.plots import Scale
from onevision_edge.report.page.plots_frontier import Axis, Mark, frontier_plot, undominated
from onevision_edge.report.page.plots_icicle import folded, icicle, parts
from onevision_edge.report.page.plots_latency import latency_bars, stages_of
from onevision_edge.report.page.plots_stages import BOTTOM, TOP, Slots, stage_plot, stage_scale

SVG = "{http://www.w3.org/2000/svg}"
PHONE = 310  # pixels of a plot's width at 390


def parsed(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


def found(root: ElementTree.Element, tag: str, *kinds: str) -> list[ElementTree.Element]:
    """Elements of a tag that have all these classes."""
    return [e for e in root.iter(SVG + tag) if set(kinds) <= set((e.get("class") or "").split())]


def points(path: str | None) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path or "")]


def percent(value: str | None) -> float:
    return float((value or "").removesuffix("%"))


# Scales


def test_scales_put_values_where_their_ticks_say() -> None:
    scale = Scale.logarithmic([1e-6, 1e-1])
    parts_of = [scale.part(10.0**power) for power in range(-6, 0)]
    steps = [b - a for a, b in pairwise(parts_of)]
    assert max(steps) - min(steps) < 1e-9
    assert scale.part(0) == 0
    linear = Scale.linear([10, 20], floor=0.0)
    assert linear.part((linear.low + linear.high) / 2) == pytest.approx(0.5)
    assert linear.low < 10 < 20 < linear.high
    assert Scale.linear([0.1, 5], floor=0.0).low == 0


# Error by stage


def test_on_a_phone_every_single_stage_has_room_for_its_label() -> None:
    names = stage_names(24, 36)
    slots = Slots.of(names)
    widths = [PHONE * (b - a) for a, b in pairwise(slots.edges)]
    single = [width for name, width in zip(names, widths, strict=True) if "." not in name]
    assert min(single) >= 13.99
    assert sum(widths) == pytest.approx(PHONE)
    assert slots.groups == [("vision.blocks", 2, 26), ("decoder.layers", 28, 64)]
    assert len({round(b - a, 9) for a, b in pairwise(Slots.of(stage_names(2, 3)).edges)}) == 1


def test_no_stages_no_slots() -> None:
    assert Slots.of([]).groups == []
    assert parsed(stage_plot({"subject": {"name": "a"}, "stages": []}, stage_scale([]))) is not None


def test_errors_stand_at_their_stage_and_their_height() -> None:
    candidate = parity_record(3)["candidates"][2]
    scale = stage_scale([candidate])
    root = parsed(stage_plot(candidate, scale))
    (error,) = found(root, "path", "error")
    drawn = points(error.get("d"))
    measured = [s["error"]["relative_l2"] for s in candidate["stages"] if s["error"]]
    assert len(drawn) == len(measured) == 65
    slots = Slots.of([s["stage"] for s in candidate["stages"]])
    for index, ((x, y), value) in enumerate(zip(drawn, measured, strict=True)):
        assert x == pytest.approx(1000 * slots.middle(index), abs=0.5)
        assert y == pytest.approx(BOTTOM - scale.part(value) * (BOTTOM - TOP), abs=0.5)
    assert drawn[0][1] == BOTTOM
    assert len(points(found(root, "path", "dots")[0].get("d"))) == 65


def test_failed_stages_are_marked_and_the_first_is_named() -> None:
    candidate = parity_record(3)["candidates"][2]
    root = parsed(stage_plot(candidate, stage_scale([candidate])))
    runs = found(root, "rect", "strip")
    assert [run.get("class") for run in runs] == ["strip pass", "strip fail"]
    assert percent(runs[0].get("width")) + percent(runs[1].get("width")) == pytest.approx(100, abs=0.01)
    assert runs[1][0].text == "✕ FAIL: decoder.layers.18 to tokens"
    (name,) = found(root, "text", "flag-name")
    assert name.text == "✕ decoder.layers.18"
    assert name.get("text-anchor") == "end"  # it would leave the plot on the right
    assert len(points(found(root, "path", "marks", "fail")[0].get("d"))) == 19  # layers 18 to 35, logits
    (label,) = [e.get("aria-label") for e in found(root, "svg", "field")]
    assert label is not None
    assert "the first to fail is decoder.layers.18" in label


def test_a_stage_that_was_not_measured_leaves_a_gap() -> None:
    stages: list[dict[str, Any]] = [{"stage": f"decoder.layers.{i}", "error": distance(0.01)} for i in range(5)]
    stages[2]["error"] = None
    candidate = {"subject": {"name": "a"}, "stages": stages}
    (error,) = found(parsed(stage_plot(candidate, stage_scale([candidate]))), "path", "error")
    assert re.sub(r"[\d. ]", "", error.get("d") or "") == "MLML"
    assert not found(parsed(stage_plot(candidate, stage_scale([candidate]))), "path", "marks")


def test_all_candidates_share_an_axis() -> None:
    candidates = parity_record(8)["candidates"]
    scale = stage_scale(candidates)
    axes = [stage_plot(candidate, scale).split("</svg>")[0] for candidate in candidates]
    assert len(set(axes)) == 1


# The frontier

MARKS = [
    Mark("reference", 12.0, 0.0, "12 MB, 0"),
    Mark("one", 6.0, 1e-4, "6 MB, 1e-4", "PASS", 8e-5, 2e-4),
    Mark("two", 4.0, 1e-3, "4 MB, 0.001", "AMBIGUOUS"),
    Mark("worse", 5.0, 2e-3, "5 MB, 0.002", "PASS"),
    Mark("broken", 3.0, 0.1, "3 MB, 0.1", "FAIL"),
]


def axes_of(marks: list[Mark]) -> tuple[Axis, Axis]:
    x = Axis("size, MB", Scale.linear([mark.x for mark in marks]))
    return x, Axis("divergence", Scale.logarithmic([mark.y for mark in marks]))


def place(mark: ElementTree.Element) -> tuple[float, float]:
    """The centre of a mark."""
    if mark.get("cx"):
        return float(mark.get("cx") or 0), float(mark.get("cy") or 0)
    ((x, y),) = points(mark.get("d"))
    return (x + 5, y + 5) if "fail" in (mark.get("class") or "") else (x, y + 6)


def test_marks_are_in_order_and_each_verdict_has_its_shape() -> None:
    root = parsed(frontier_plot(MARKS, *axes_of(MARKS)))
    drawn = found(root, "circle", "mark") + found(root, "path", "mark")
    places = {(e[0].text or "").split(":")[0]: place(e) for e in drawn}
    assert set(places) == {mark.label for mark in MARKS}
    for a, b in combinations(MARKS, 2):
        assert (places[a.label][0] - places[b.label][0]) * (a.x - b.x) > 0
        assert (places[a.label][1] - places[b.label][1]) * (a.y - b.y) < 0
    assert [e.tag.removeprefix(SVG) for e in drawn] == ["circle", "circle", "circle", "path", "path"]
    assert len(found(root, "line", "whisker")) == 1
    assert "worse: 5 MB, 0.002, ✓ PASS" in [e[0].text for e in drawn]


def test_the_line_joins_what_nothing_beats() -> None:
    assert [MARKS[i].label for i in undominated(MARKS, more_is_better=False)] == ["two", "one", "reference"]
    accurate = [Mark("a", 1, 0.9, ""), Mark("b", 2, 0.8, ""), Mark("c", 3, 0.95, ""), Mark("d", 0.5, 0.99, "", "FAIL")]
    assert [accurate[i].label for i in undominated(accurate, more_is_better=True)] == ["a", "c"]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_labels_are_in_the_plot_and_on_no_other(count: int) -> None:
    parity, latency = parity_record(count), latency_record(count)
    for figures in frontiers(parity, speeds(latency, parity)[1]):
        assert len(figures.plots) == 3
        for plot in figures.plots:
            labels = found(parsed(plot), "text", "label")
            boxes = [label_box(label) for label in labels]
            assert len(boxes) == count + 1
            assert not [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]
            assert all(box.left >= 50 and box.right <= 361 and box.bottom <= 254 for box in boxes)


def label_box(label: ElementTree.Element) -> Box:
    """Where a label's letters are, at the least: narrow ones."""
    x, y = float(label.get("x") or 0), float(label.get("y") or 0)
    wide = 6 * len(label.text or "")
    left = x - wide if label.get("text-anchor") == "end" else x
    return Box(left, y - 9, left + wide, y + 2)


def test_without_a_latency_record_there_is_the_frontier_of_sizes() -> None:
    assert [(f.metric, len(f.plots)) for f in frontiers(parity_record(3), {})] == [("kld", 1), ("accuracy", 1)]
    assert frontiers(parity_record(0), {}) == []


# Latency


def test_a_bar_is_its_stages_one_after_another() -> None:
    latency = latency_record(3)
    name = cell_names(latency)[0]
    rows = rows_of(latency, name)
    root = parsed(latency_bars(rows, name))
    longest = max(record["metrics"]["request_latency"]["p95"] for _, record in rows)
    segments = [e for e in found(root, "rect", "segment") if "rest" not in (e.get("class") or "")]
    assert len(segments) == 4 * 5
    for index, (_, record) in enumerate(rows):
        bar = segments[5 * index : 5 * index + 5]
        ends = [(percent(e.get("x")), percent(e.get("x")) + percent(e.get("width"))) for e in bar]
        assert all(a[1] == pytest.approx(b[0], abs=1e-2) for a, b in pairwise(ends))
        total = sum(value for _, value in stages_of(record))
        assert ends[-1][1] == pytest.approx(98.5 * total / longest, abs=1e-2)
    whiskers = [percent(e.get("x2")) for e in found(root, "line", "whisker")]
    assert max(whiskers) == pytest.approx(98.5)
    assert segments[0][0].text is not None
    assert segments[0][0].text.startswith("preprocess: ")


def test_time_that_no_stage_accounts_for_is_drawn_as_such() -> None:
    half = {"unit": "ms", "p50": 5.0}
    record = {
        "cell": "a",
        "stages": {"prefill": half},
        "metrics": {"request_latency": {"unit": "s", "p50": 0.01, "p95": 0.02}},
    }
    root = parsed(latency_bars([("one", record)], "a"))
    (rest,) = found(root, "rect", "rest")
    assert percent(rest.get("x")) == pytest.approx(98.5 / 4)
    assert percent(rest.get("width")) == pytest.approx(98.5 / 4)
    assert parsed(latency_bars([("one", {"cell": "a"})], "a")) is not None


# The profile


def test_numbered_children_are_folded_into_one() -> None:
    tree = folded(profile(24, 36)["tree"])
    assert [child["name"] for child in tree["children"]] == ["vision", "model", "lm_head"]
    (blocks,) = tree["children"][0]["children"]
    assert blocks["name"] == "blocks.* (24)"
    assert [child["name"] for child in blocks["children"]] == ["attn", "mlp"]
    assert blocks["children"][0]["seconds"] == pytest.approx(24 * 3e-4)
    assert tree["children"][1]["children"][0]["name"] == "layers.* (36)"
    lone = folded({"name": "a", "seconds": 1.0, "children": [{"name": "0", "seconds": 1.0}]})
    assert [lone["name"], lone["children"][0]["name"]] == ["a", "0"]


def test_parts_lie_under_their_parents_side_by_side() -> None:
    tree = folded(profile()["tree"])
    drawn = parts(tree, 100)
    assert drawn[0].share == 1
    for part in drawn[1:]:
        parent = drawn[part.parent or 0]
        assert part.level == parent.level + 1
        assert part.start >= parent.start - 1e-9
        assert part.start + part.share <= parent.start + parent.share + 1e-9
    for a, b in combinations(drawn, 2):
        if a.level == b.level:
            assert min(a.start + a.share, b.start + b.share) <= max(a.start, b.start) + 1e-9
    assert [part.seconds for part in parts(tree, 3)] == sorted((p.seconds for p in drawn), reverse=True)[:3]


def test_an_icicle_names_every_part_with_its_time_and_share() -> None:
    root = parsed(icicle(profile()["tree"], "demo"))
    titles = [e.text or "" for e in root.iter(SVG + "title")]
    assert len(titles) == len(parts(folded(profile()["tree"]), 80))
    assert titles[0].startswith("request: ")
    assert titles[0].endswith(", 100 %")
    assert sum(percent(e.get("width")) for e in found(root, "svg", "l1")) == pytest.approx(100, abs=0.01)
    assert icicle({"name": "nothing", "seconds": 0.0}, "demo") == ""
    assert not math.isnan(sum(part.share for part in parts(profile()["tree"], 10)))

"""Where the time goes: a bar for each subject, its stages' medians one after another, and the 95th percentile."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from .numbers import in_milliseconds, milliseconds
from .plots import image, line, percents, text, title
from .tables import measured

STAGES = ("preprocess", "vision_encoding", "prepare_embeddings", "prefill", "decode")
_ROW = 46  # pixels: a line of text, a bar, room
_ROOM = 0.985  # of the width, so that the last whisker is not cut
Record = Mapping[str, Any]


def latency_bars(rows: Sequence[tuple[str, Record]], cell: str) -> str:
    """An SVG of the subjects that have this cell: (name, CELL), as wide as the page leaves."""
    longest = max((max(_reach(record)) for _, record in rows), default=0.0) or 1.0
    body = [part for index, row in enumerate(rows) for part in _row(*row, index * _ROW, longest / _ROOM)]
    return image(f"Time by stage: {cell}", f'class="bars" width="100%" height="{_ROW * len(rows)}"', body)


def stages_of(record: Record) -> list[tuple[str, float]]:
    """The medians of a cell's stages in ms, in the order in which they run."""
    given = record.get("stages") or {}
    names = [name for name in STAGES if name in given] + [name for name in given if name not in STAGES]
    medians = [(name, _milliseconds(given[name], "p50")) for name in names]
    return [(name, value) for name, value in medians if value is not None]


def _milliseconds(stats: Record | None, key: str) -> float | None:
    value = measured(stats, key)
    return None if value is None else in_milliseconds(value, measured(stats, "unit") or "ms")


def _reach(record: Record) -> tuple[float, float, float]:
    """Of a cell, ms: its stages' sum, and the whole request's median and 95th percentile (0 where not measured)."""
    request = measured(record, "metrics", "request_latency")
    ends = [_milliseconds(request, key) or 0.0 for key in ("p50", "p95")]
    return sum(value for _, value in stages_of(record)), ends[0], ends[1]


def _row(name: str, record: Record, top: int, longest: float) -> Iterator[str]:
    total, median, tail = _reach(record)
    yield text("label", "0%", top + 14, name)
    words = f"{milliseconds(median or total)}" + (f", p95 {milliseconds(tail)}" if tail else "")
    yield text("tick", "100%", top + 14, words, "end")
    yield from _segments(record, top + 21, longest)
    if median > total:
        yield _rest(total, median, top + 21, longest)
    if tail:
        middle = top + 29
        ends = percents((median or total) / longest), percents(tail / longest)
        yield line("whisker", ends[0], middle, ends[1], middle)
        yield line("whisker", ends[1], middle - 5, ends[1], middle + 5)


def _rest(start: float, stop: float, top: int, longest: float) -> str:
    """What no stage accounts for."""
    place = f'x="{percents(start / longest)}" width="{percents((stop - start) / longest)}"'
    words = title(f"the rest: {milliseconds(stop - start)}")
    return f'<rect class="segment rest" {place} y="{top}" height="16">{words}</rect>'


def _segments(record: Record, top: int, longest: float) -> Iterator[str]:
    start = 0.0
    for name, value in stages_of(record):
        kind = f"s{STAGES.index(name) if name in STAGES else len(STAGES)}"
        place = f'x="{percents(start / longest)}" width="{percents(value / longest)}"'
        words = title(f"{name}: {milliseconds(value)}")
        yield f'<rect class="segment {escape(kind)}" {place} y="{top}" height="16">{words}</rect>'
        start += value

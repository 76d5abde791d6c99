"""Error by stage: what reaches each stage, what it adds itself, and BF16's error as the noise floor."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from .numbers import AMBIGUOUS, FAIL, PASS, verdict_text
from .plots import Scale, image, line, percents, text
from .tables import measured

TOP, BOTTOM, HEIGHT = 26, 286, 392  # of the plot inside its axes, and of all with labels; pixels
_STRIP = 6  # of the verdicts, below the plot
_NARROW = 310  # pixels that a phone leaves for the plot
_LETTERS = 14  # pixels that a label that stands upright takes
_KINDS = ("error", "own", "noise", "own_noise")
_SHORT = {"stitched_embeddings": "stitched", "patch_embed": "patch embed"}
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Slots:
    """Where the stages are, as parts of the width: blocks share what the single stages, which have labels, leave."""

    names: tuple[str, ...]
    edges: tuple[float, ...]  # one more than names

    @classmethod
    def of(cls, names: Sequence[str]) -> "Slots":
        """Slots for stages in order. Single stages are as wide as a label on a phone."""
        blocks = sum(_group(name) is not None for name in names)
        need = _LETTERS / _NARROW
        single = max(1.0, need * blocks / max(0.2, 1 - need * (len(names) - blocks)))
        edges = [0.0]
        for name in names:
            edges.append(edges[-1] + (single if _group(name) is None else 1.0))
        return cls(tuple(names), tuple(edge / edges[-1] for edge in edges) if names else (0.0,))

    def middle(self, index: int) -> float:
        """The middle of a stage."""
        return (self.edges[index] + self.edges[index + 1]) / 2

    @property
    def groups(self) -> list[tuple[str, int, int]]:
        """Runs of blocks: their common name, the first's index and one past the last's."""
        found, start = [], 0
        for name, run in groupby(map(_group, self.names)):
            stop = start + len(list(run))
            found += [(name, start, stop)] if name else []
            start = stop
        return found


def _group(name: str) -> str | None:
    """vision.blocks of vision.blocks.3; None of a stage that there is one of."""
    stem, _, number = name.rpartition(".")
    return stem if number.isdigit() and stem else None


def stage_scale(candidates: Sequence[Record]) -> Scale:
    """One axis of errors (relative L2) for all candidates, so that their plots can be compared."""
    stages = [stage for candidate in candidates for stage in candidate.get("stages") or ()]
    values = [measured(stage, kind, "relative_l2") for stage in stages for kind in _KINDS]
    return Scale.logarithmic([value for value in values if value is not None])


def stage_plot(candidate: Record, scale: Scale) -> str:
    """Two SVGs, the axis and the field beside it, as wide as the page leaves."""
    stages = candidate.get("stages") or ()
    slots = Slots.of([stage["stage"] for stage in stages])
    axis = image("", f'class="axis" width="56" height="{HEIGHT}" aria-hidden="true"', _axis(scale))
    where = " ".join(f"{100 * slots.middle(i):.4g}" for i in range(len(stages)))
    attributes = f'class="field" width="100%" height="{HEIGHT}" data-x="{where}"'
    field = image(_label(candidate), attributes, _field(candidate, stages, slots, scale))
    return f'<div class="stage-plot">{axis}{field}</div>'


def _label(candidate: Record) -> str:
    first = candidate.get("first_failed_stage")
    end = f"the first to fail is {first}" if first else "none fails"
    return f"Error by stage of {candidate['subject']['name']}, logarithmic: {end}; the table below has the numbers"


def _y(scale: Scale, value: float) -> int:
    return round(BOTTOM - scale.part(value) * (BOTTOM - TOP))


def _axis(scale: Scale) -> Iterator[str]:
    yield text("tick", 0, 12, "relative L2")
    for tick, words in scale.ticks:
        yield text("tick", 50, _y(scale, tick) + 4, words, "end")


def _field(candidate: Record, stages: Sequence[Record], slots: Slots, scale: Scale) -> Iterator[str]:
    for tick, _ in scale.ticks:
        yield line("grid", "0%", _y(scale, tick), "100%", _y(scale, tick))
    yield from _runs(stages, slots)
    yield f'<svg viewBox="0 0 1000 {HEIGHT}" preserveAspectRatio="none" width="100%" height="{HEIGHT}">'
    yield from _series(stages, slots, scale)
    yield "</svg>"
    yield line("frame", "0%", BOTTOM, "100%", BOTTOM)
    yield from _names(slots)
    yield from _flag(candidate.get("first_failed_stage"), slots)
    yield f'<line class="cursor" x1="0%" x2="0%" y1="{TOP}" y2="{BOTTOM}" visibility="hidden"/>'


def _runs(stages: Sequence[Record], slots: Slots) -> Iterator[str]:
    """A strip of verdicts below the plot; where they are not PASS, a wash over it."""
    start = 0
    for verdict, run in groupby(stage.get("verdict") for stage in stages):
        stop = start + len(list(run))
        left, right = slots.edges[start], slots.edges[stop]
        place = f'x="{percents(left)}" width="{percents(right - left)}"'
        kind = {FAIL: "fail", AMBIGUOUS: "ambiguous", PASS: "pass"}.get(verdict or "", "none")
        words = f"<title>{escape(verdict_text(verdict))}: {escape(_between(slots, start, stop))}</title>"
        yield f'<rect class="strip {kind}" {place} y="{BOTTOM + 3}" height="{_STRIP}">{words}</rect>'
        if kind in ("fail", "ambiguous"):
            yield f'<rect class="wash {kind}" {place} y="{TOP}" height="{BOTTOM - TOP}"/>'
        start = stop


def _between(slots: Slots, start: int, stop: int) -> str:
    first, last = slots.names[start], slots.names[stop - 1]
    return first if first == last else f"{first} to {last}"


def _series(stages: Sequence[Record], slots: Slots, scale: Scale) -> Iterator[str]:
    places = {kind: _places(stages, slots, scale, kind) for kind in _KINDS}
    yield f'<path class="series noise" d="{"".join(_area(run) for run in places["noise"])}"/>'
    yield f'<path class="series own own-noise" d="{"".join(map(_joined, places["own_noise"]))}"/>'
    yield f'<path class="series reach error" d="{"".join(map(_joined, places["error"]))}"/>'
    yield f'<path class="series own dots" d="{_dots(places["own"])}"/>'
    for verdict, kind in ((AMBIGUOUS, "ambiguous"), (FAIL, "fail")):
        marked = [stage if stage.get("verdict") == verdict else {} for stage in stages]
        dots = _dots(_places(marked, slots, scale, "error"))
        if dots:
            yield f'<path class="series reach marks {kind}" d="{dots}"/>'


def _places(stages: Sequence[Record], slots: Slots, scale: Scale, kind: str) -> list[list[tuple[float, float]]]:
    """Runs of stages that were measured, as places in the stretched field."""
    runs: list[list[tuple[float, float]]] = [[]]
    for index, stage in enumerate(stages):
        value = measured(stage, kind, "relative_l2")
        if value is None:
            runs.append([])
        else:
            runs[-1].append((round(1000 * slots.middle(index)), _y(scale, value)))
    return [run for run in runs if run]


def _joined(run: Sequence[tuple[float, float]]) -> str:
    """A line; a lone place as a dot."""
    first = "M{:g} {:g}".format(*run[0])
    return first + ("".join(f"L{x:g} {y:g}" for x, y in run[1:]) or "h0")


def _area(run: Sequence[tuple[float, float]]) -> str:
    return f"{_joined(run)}V{BOTTOM}H{run[0][0]:g}Z"


def _dots(runs: Sequence[Sequence[tuple[float, float]]]) -> str:
    """Lines of no length: their round ends are dots that a stretched field leaves round."""
    return "".join(f"M{x:g} {y:g}h0" for run in runs for x, y in run)


def _names(slots: Slots) -> Iterator[str]:
    """Single stages upright; of blocks some numbers, and their name below."""
    down = BOTTOM + _STRIP + 12
    for index, name in enumerate(slots.names):
        if _group(name) is None:
            yield _upright(slots.middle(index), down, _SHORT.get(name, name))
    for group, start, stop in slots.groups:
        step = max(1, math.ceil((stop - start) / 4))
        for index in range(start, stop, step):
            yield text("tick", percents(slots.middle(index)), down + 6, slots.names[index].rpartition(".")[2], "middle")
        middle = (slots.edges[start] + slots.edges[stop]) / 2
        yield text("tick name", percents(middle), down + 26, group, "middle")


def _upright(across: float, down: float, words: str) -> str:
    """Words turned to the right: a nested SVG has its x in percent, what is in it turns in pixels."""
    inner = text("tick", 0, 4, words, more=' transform="rotate(90)"')
    return f'<svg x="{percents(across)}" y="{down}" overflow="visible">{inner}</svg>'


def _flag(stage: str | None, slots: Slots) -> Iterator[str]:
    """The first stage that fails, by name."""
    if stage is None or stage not in slots.names:
        return
    x = slots.edges[slots.names.index(stage)]
    yield line("flag", percents(x), 18, percents(x), BOTTOM)
    yield text("flag-name", percents(x), 13, f"✕ {stage}", "start" if x < 0.5 else "end")

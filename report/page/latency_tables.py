"""The tables of a latency report: every subject in every cell, how it starts, and what a ratio says."""

from collections.abc import Iterator, Mapping
from typing import Any

from .numbers import figure, in_milliseconds, in_unit, label, milliseconds, nbytes, percent
from .tables import Cell, Table, cell, measured, table

Record = Mapping[str, Any]
_TIMED = ("time_to_first_token", "inter_token_latency", "request_latency")
_ENDS = ("p50", "p90", "p95", "p99")


def subject_names(latency: Record) -> list[str]:
    """The subjects' names; where two share one, each with its backend."""
    subjects = [timed["subject"] for timed in latency.get("subjects") or ()]
    names = [subject["name"] for subject in subjects]
    return [
        name if names.count(name) == 1 else f"{name}, {subject.get('backend')}"
        for name, subject in zip(names, subjects, strict=True)
    ]


def cell_names(latency: Record) -> list[str]:
    """The cells of all subjects, in order, each once."""
    names = (each["cell"] for timed in latency.get("subjects") or () for each in timed.get("cells") or ())
    return list(dict.fromkeys(names))


def rows_of(latency: Record, cell_name: str) -> list[tuple[str, Record]]:
    """The subjects that were timed in a cell: name and CELL."""
    pairs = zip(subject_names(latency), latency.get("subjects") or (), strict=True)
    return [(name, c) for name, timed in pairs for c in timed.get("cells") or () if c["cell"] == cell_name]


def speeds(latency: Record | None, parity: Record | None) -> tuple[str, dict[str, Record]]:
    """The first cell's name, and its metrics by the name of a subject.

    Where one name was timed on several backends, the one that the parity record compared.
    """
    names = cell_names(latency) if latency else []
    if latency is None or not names:
        return "", {}
    found: dict[str, Record] = {}
    for timed in latency["subjects"]:
        metrics = next((c.get("metrics") or {} for c in timed.get("cells") or () if c["cell"] == names[0]), None)
        if metrics is not None and (timed["subject"]["name"] not in found or _compared(timed["subject"], parity)):
            found[timed["subject"]["name"]] = metrics
    return names[0], found


def _compared(subject: Record, parity: Record | None) -> bool:
    sides = [parity.get("reference"), *(c["subject"] for c in parity.get("candidates") or ())] if parity else []
    return any(all(side.get(key) == subject.get(key) for key in ("name", "backend")) for side in sides if side)


def cell_table(latency: Record, cell_name: str) -> Table:
    """One row for each subject of a cell: medians with the 95th percentile, rates, bytes read for a token."""
    times = [f"{label(name)}, {end}" for name in _TIMED for end in ("p50", "p95")]
    header = ("subject", *times, "tokens a second", "read for a token", "of the memory's bandwidth")
    return table("Times and rates", header, [_cell_row(name, each) for name, each in rows_of(latency, cell_name)])


def _cell_row(name: str, record: Record) -> list[Cell]:
    rate = measured(record, "metrics", "output_token_throughput", "p50")
    share, read = record.get("roofline_share"), record.get("bytes_per_token")
    return [
        Cell(name),
        *(_duration(measured(record, "metrics", key), end) for key in _TIMED for end in ("p50", "p95")),
        cell(rate, figure(rate)),
        cell(read, nbytes(read)),
        cell(share, percent(share)),
    ]


def _duration(stats: Record | None, end: str) -> Cell:
    value = measured(stats, end)
    if value is None:
        return Cell(milliseconds(None))
    scaled = in_milliseconds(value, measured(stats, "unit") or "ms")
    return cell(scaled, milliseconds(scaled))


def starts(latency: Record) -> Table:
    """How each subject starts, what memory it takes, and MLPerf's two scenarios."""
    header = ("subject", "size", "load", "process start", "first answer", "peak memory", "GPU memory", "power")
    pairs = zip(subject_names(latency), latency.get("subjects") or (), strict=True)
    rows = [_start_row(name, timed) for name, timed in pairs]
    return table("Start, memory and MLPerf's scenarios", (*header, "SingleStream, p90", "Offline, per second"), rows)


def _start_row(name: str, timed: Record) -> list[Cell]:
    load = measured(timed, "load_seconds", "p50") or measured(timed, "load_seconds", "value")
    cold = [measured(timed, "cold_start", key) for key in ("process_start", "time_to_first_token")]
    power = measured(timed, "device", "power_w")
    single = measured(timed, "mlperf", "SingleStream", "latency_p90_ms")
    offline = measured(timed, "mlperf", "Offline", "samples_per_second")
    memory = (
        measured(timed, "subject", "bytes"),
        timed.get("peak_rss"),
        measured(timed, "device", "memory"),
    )
    size, peak, device = (cell(value, nbytes(value)) for value in memory)
    times = [cell(value, milliseconds(value and 1e3 * value)) for value in (load, *cold)]
    ends = [cell(power, f"{figure(power)} W"), cell(single, milliseconds(single)), cell(offline, figure(offline))]
    return [Cell(name), size, *times, peak, device, *ends]


def ratios(latency: Record) -> Table:
    """How many times as good a subject is as its baseline: the median of the rounds, the least and the most."""
    header = ("subject", "baseline", "cell", "metric", "times as good (least to most)", "in words")
    rows = [_ratio_row(ratio) for ratio in latency.get("ratios") or ()]
    return table("Beside the baseline; more than 1 is better", header, rows)


def _ratio_row(ratio: Record) -> list[Cell]:
    value, low, high = (ratio.get(key) for key in ("ratio", "low", "high"))
    span, words = "", "rounds disagree"
    if low is not None and high is not None:
        span = f" ({low:.2f} to {high:.2f})"
        words = "better in every round" if low > 1 else "worse in every round" if high < 1 else words
    return [
        *(Cell(str(ratio.get(key))) for key in ("subject", "baseline", "cell")),
        Cell(label(str(ratio.get("metric")))),
        cell(value, f"{value or 0:.2f}{span}"),
        Cell(words),
    ]


def all_metrics(latency: Record, cell_name: str) -> Table:
    """Everything that was timed in a cell, with its spread."""
    header = ("subject", "metric", *_ENDS, "spread (std)", "count")
    rows = [
        [Cell(name), Cell(label(key)), *_spread(stats)]
        for name, record in rows_of(latency, cell_name)
        for key, stats in {**(record.get("metrics") or {}), **(record.get("stages") or {})}.items()
        if stats
    ]
    return table(f"All of {cell_name}", header, rows)


def _spread(stats: Record) -> Iterator[Cell]:
    unit = stats.get("unit") or ""
    for key in (*_ENDS, "std"):
        yield cell(stats.get(key), in_unit(stats.get(key), unit))
    yield cell(stats.get("count"), str(stats.get("count")))


def longest(profile: Record, kind: str, noun: str, most: int = 12) -> Table:
    """What takes longest of a profile's `operations` or `modules` (kind), each a `noun`."""
    given = sorted(profile.get(kind) or (), key=lambda part: -part["seconds"])[:most]
    whole = profile.get("seconds")
    rows = [
        [
            Cell(part[noun]),
            cell(part["seconds"], milliseconds(1e3 * part["seconds"])),
            cell(whole or None, percent(part["seconds"] / (whole or 1))),
            cell(part.get("calls"), str(part.get("calls"))),
        ]
        for part in given
    ]
    return table(f"The {kind} that take longest", (noun, "time", "share", "calls"), rows)

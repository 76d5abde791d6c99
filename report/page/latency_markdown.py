"""A latency record as tables: for a terminal, and for latency.md."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..latency.metrics import STAGES

_MOST_MODULES = 20


@dataclass(frozen=True, slots=True)
class Table:
    """A title, what stands above the columns, and rows of text; a note below."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def tables(record: Mapping[str, Any]) -> list[Table]:
    """What a record says, in reading order."""
    found = [table for index in range(len(record["subjects"][0]["cells"])) for table in _of_cell(record, index)]
    return [*found, *_ratios(record), _subjects(record), *_profiles(record)]


def markdown(record: Mapping[str, Any]) -> str:
    """latency.md."""
    machine = record["machine"]
    gigabytes = f", {machine['memory'] / 1e9:.0f} GB" if machine["memory"] else ""
    bandwidth = record["memory_bandwidth"]
    read = f", memory read at {bandwidth / 1e9:.1f} GB/s" if bandwidth else ""
    lines = [
        "# Latency",
        "",
        f"{machine['cpu']}, {machine['cores']} cores{gigabytes}{read}; {machine['gpu'] or 'no GPU'}.",
        f"{record['created']}; {record['rounds']} rounds after {record['warmup']} to warm up, seed {record['seed']}.",
    ]
    for table in tables(record):
        lines += ["", f"## {table.title}", "", *_markdown_rows(table)]
        lines += ["", table.note] if table.note else []
    return "\n".join(lines) + "\n"


def _markdown_rows(table: Table) -> Iterator[str]:
    for row in (table.header, ("---",) * len(table.header), *table.rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _of_cell(record: Mapping[str, Any], index: int) -> list[Table]:
    pairs = [(one["subject"]["name"], one["cells"][index]) for one in record["subjects"]]
    name = pairs[0][1]["cell"]
    header = ("", "first token ms", "p90", "p99", "token ms", "p90", "p99", "request ms", "tokens/s", "bytes/token")
    rows = [_metrics(subject, cell) for subject, cell in pairs]
    shares = [f"{cell['roofline_share']:.0%}" if cell["roofline_share"] else "-" for _, cell in pairs]
    note = ""
    if any(cell["roofline_share"] and cell["roofline_share"] > 1 for _, cell in pairs):
        note = "More than 100 % of memory's bandwidth: the weights stay in the CPU's caches."
    first = Table(name, (*header, "of bandwidth"), [(*row, s) for row, s in zip(rows, shares, strict=True)], note)
    stages = [(subject, *(_point(cell["stages"].get(stage)) for stage in STAGES)) for subject, cell in pairs]
    return [first, Table(f"{name}: stages, ms", ("", *STAGES), stages)]


def _metrics(subject: str, cell: Mapping[str, Any]) -> tuple[str, ...]:
    found = cell["metrics"]
    three = [_point(found.get(n), p) for n in ("time_to_first_token", "inter_token_latency") for p in _POINTS]
    rates = [_point(found.get(name)) for name in ("request_latency", "output_token_throughput")]
    return (subject, *three, *rates, _bytes(cell["bytes_per_token"]))


_POINTS = ("p50", "p90", "p99")


def _ratios(record: Mapping[str, Any]) -> list[Table]:
    """How many times better than the first subject."""
    if not record["ratios"]:
        return []
    rows = [
        (r["subject"], r["cell"], r["metric"], f"{r['ratio']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}")
        for r in record["ratios"]
    ]
    title = f"Beside {record['ratios'][0]['baseline']}: more than 1 is better"
    return [Table(title, ("", "cell", "metric", "ratio", "over the rounds"), rows)]


def _subjects(record: Mapping[str, Any]) -> Table:
    header = ("", "backend", "precision", "size", "load s", "start to first token s", "peak memory")
    scenarios = ("SingleStream p90 ms", "Offline samples/s")
    subjects = [one["subject"] for one in record["subjects"]]
    notes = [f"{subject['name']}: {note}." for subject in subjects for note in subject["notes"]]
    rows = [_subject(one) for one in record["subjects"]]
    return Table("Subjects", (*header, *scenarios), rows, " ".join(notes))


def _subject(one: Mapping[str, Any]) -> tuple[str, ...]:
    subject, cold, mlperf = one["subject"], one["cold_start"], one["mlperf"]
    single = mlperf.get("SingleStream")
    return (
        subject["name"],
        subject["backend"],
        subject["precision"],
        _bytes(subject["bytes"]),
        _point(one["load_seconds"]),
        _number(sum(cold.values())) if cold else "-",
        _bytes(one["peak_rss"]),
        _number(single["latency_p90_ms"]) if single else "-",
        _number(mlperf["Offline"]["samples_per_second"]),
    )


def _profiles(record: Mapping[str, Any]) -> Iterator[Table]:
    for one in record["subjects"]:
        if (profile := one["profile"]) is None:
            continue
        title = f"{one['subject']['name']}: where {1e3 * profile['seconds']:.3g} ms of a request go, by "
        for kind in ("module", "operation"):
            rows = [_share(kind, each, profile["seconds"]) for each in profile[f"{kind}s"][:_MOST_MODULES]]
            yield Table(title + kind, ("", "ms", "share", "calls"), rows)


def _share(kind: str, one: Mapping[str, Any], seconds: float) -> tuple[str, ...]:
    share = one["seconds"] / seconds if seconds else 0.0
    return one[kind], f"{1e3 * one['seconds']:.3f}", f"{share:.1%}", str(one["calls"])


def _point(stats: Mapping[str, Any] | None, point: str = "p50") -> str:
    return "-" if stats is None else _number(stats[point])


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _bytes(count: int | None) -> str:
    if not count:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"

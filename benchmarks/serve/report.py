"""The runs for a reader."""

from typing import Any

from onevision_edge.cli.console import table

Row = tuple[str, str]


def text(record: dict[str, Any]) -> str:
    """A table of every run that was made."""
    parts = {"load": _load, "rounds": _rounds, "memory": _memory, "leaving": _leaving, "flood": _flood}
    parts |= {"ending": _ending, "alone": _alone}
    rows = [row for name, rows_of in parts.items() if name in record for row in rows_of(record[name])]
    return table(rows, ("run", "found"))


def _load(found: dict[str, Any]) -> list[Row]:
    name = f"{found['asked']} questions, {found['concurrency']} at a time"
    return [
        (name, f"{_outcome(found)}; {found['answers']:.1f} answers/s, {found['tokens']:.0f} tokens/s"),
        ("  first text", _times(found["first"])),
        ("  each further token", _times(found["token"])),
        ("  between pieces", _times(found["gap"])),
        *((f"  {kind}: first text", _times(times["first"])) for kind, times in found["kinds"].items()),
    ]


def _rounds(found: dict[str, Any]) -> list[Row]:
    name = f"{found['rounds']} rounds of {found['questions']}, in turns"
    return [
        (name, f"one at a time {_range(found['one'], 0)} tokens/s, many {_range(found['many'], 0)}"),
        ("  ratio", f"{_range(found['tokens_ratio'], 2)} in tokens, {_range(found['answers_ratio'], 2)} in answers"),
    ]


def _memory(found: dict[str, Any]) -> list[Row]:
    size, files, threads = found["megabytes"], found["open_files"], found["threads"]
    sizes = f"{size['begin']:.0f} MB at first, then {size['kept']:.0f} to {size['end']:.0f} MB"
    slope = f"{found['megabytes_per_minute']:+.2f} ± {found['uncertainty']:.2f} MB a minute"
    counts = f"files {files['begin']} to {files['end']}, threads {threads['begin']} to {threads['end']}"
    return [(f"{found['minutes']:g} minutes", _outcome(found)), ("  memory", f"{sizes}: {slope}"), ("  held", counts)]


def _leaving(found: dict[str, Any]) -> list[Row]:
    cancelled = f"{found['left']} clients left, {found['cancelled']:.0f} answers given up"
    return [("clients that leave", f"{cancelled}, idle after {found['idle_after_seconds']:.2f} s; {_outcome(found)}")]


def _flood(found: dict[str, Any]) -> list[Row]:
    retry = f"{found['with_retry_after']} with Retry-After, within {found['refused_within_ms']:.0f} ms"
    later = "answered" if found["answered_later"] else "NOT answered"
    return [("a full queue", f"{_outcome(found)}, {retry}; the next one {later}")]


def _ending(found: dict[str, Any]) -> list[Row]:
    new, seconds = found["new"], found["seconds"]
    others = f"new ones {new['reused']} and {new['fresh']}, /health {new['health']}"
    code = f"exit code {found['exit_code']} after {seconds['exit']:.1f} s, {seconds['exit'] - seconds['answers']:.1f} s"
    return [
        ("SIGTERM", f"{_outcome(found)}; {others} with {found['under_way_at_503']} under way; {code} behind the last")
    ]


def _alone(found: dict[str, Any]) -> list[Row]:
    return [("the same answers alone", f"{found['same']} of {found['compared']}")]


def _outcome(found: dict[str, Any]) -> str:
    return f"{found['answered']} of {found['asked']} answered, {found['refused']} refused, {found['lost']} lost"


def _times(found: dict[str, float]) -> str:
    return f"p50 {found['p50']:.1f} ms, p95 {found['p95']:.1f} ms, at most {found['max']:.0f} ms"


def _range(found: dict[str, float], digits: int) -> str:
    return f"{found['median']:.{digits}f} ({found['least']:.{digits}f} to {found['most']:.{digits}f})"

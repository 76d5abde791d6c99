"""What the verbs print with: tables, JSON, byte counts, a progress bar for long jobs."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

import click

from ..bundle import Progress

_QUIET_SECONDS = 10  # between lines of progress where there is no terminal


def say(text: str = "") -> None:
    """A line for the person, on stderr."""
    click.echo(text, err=True)


def print_json(value: Any) -> None:
    """A result for a program, on stdout."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> str:
    """Left-aligned columns, two spaces apart, under an optional header."""
    lines = [list(map(str, row)) for row in ([header] if header else []) + list(rows)]
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if header:
        text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def size(count: float) -> str:
    """Bytes for a reader: 1.56 TB, 1.23 GB, 45.6 MB, 789 kB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


@contextmanager
def progress(title: str, unit: str = "B") -> Iterator[Progress]:
    """A callback for jobs counted in bytes, or in another unit: a bar on a terminal, a line now and then elsewhere."""
    report = _bar(title, unit) if sys.stderr.isatty() else _lines(title, unit)
    try:
        yield report
    finally:
        if sys.stderr.isatty():
            say()


def _bar(title: str, unit: str) -> Progress:
    started, drawn = monotonic(), [0.0]

    def report(done: int, total: int, label: str) -> None:
        now = monotonic()
        if now - drawn[0] < 0.1 and done < total:
            return
        drawn[0] = now
        filled = 24 * done // max(total, 1)
        bar = "█" * filled + "░" * (24 - filled)
        line = f"{title} {bar} {_state(done, total, now - started, unit)}  {label}"
        click.echo("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], nl=False, err=True)

    return report


def _lines(title: str, unit: str) -> Callable[[int, int, str], None]:
    started = last = monotonic()

    def report(done: int, total: int, label: str) -> None:
        nonlocal last
        now = monotonic()
        if now - last >= _QUIET_SECONDS:
            last = now
            say(f"{title}: {_state(done, total, now - started, unit)}")

    return report


def _state(done: int, total: int, seconds: float, unit: str) -> str:
    rate = done / seconds if seconds > 0 else 0.0
    left = (total - done) / rate if rate else 0.0
    percent = 100 * done // max(total, 1)
    if unit == "B":
        return f"{percent:3d} %  {size(done)} of {size(total)}  {size(rate)}/s  {_clock(left)} left"
    return f"{percent:3d} %  {done} of {total} {unit}  {_clock(left)} left"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

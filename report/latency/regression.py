"""A latency record against an earlier one: which figures became worse by more than a limit."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...config import read_json
from ...errors import OneVisionError
from .bench import FORMAT, FORMAT_VERSION
from .metrics import COMPARED, LOWER

_POINT = "p50"


def read_record(path: Path) -> dict[str, Any]:
    """A latency record from its file. Raises OneVisionError for anything else."""
    found = read_json(path)
    if (found.get("format"), found.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise OneVisionError(
            f"{path} is no latency record of version {FORMAT_VERSION}: give a bench run's latency.json"
        )
    return found


def regressions(new: Mapping[str, Any], old: Mapping[str, Any], percent: float) -> list[str]:
    """A line for each median that is worse than before by more than so many per cent, the worst first.

    Subjects are found by name (one alone with one alone), cells by name. Raises OneVisionError where none is in both.
    """
    found, compared = [], 0
    for subject, name, now, before in _pairs(new, old):
        for metric, better in COMPARED.items():
            if metric in now and metric in before:
                compared += 1
                line = _line(now[metric], before[metric], better, percent)
                if line is not None:
                    found.append((line[0], f"{subject}, {name}: {metric} {line[1]}"))
    if not compared:
        raise OneVisionError(
            "the baseline has no cell of these subjects: give the same bundles, images, lengths and batch"
        )
    return [text for _, text in sorted(found, reverse=True)]


def _pairs(new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Subject and cell by name, with the metrics of both records."""
    earlier = {each["subject"]["name"]: each for each in old["subjects"]}
    alone = len(new["subjects"]) == len(earlier) == 1
    for each in new["subjects"]:
        name = each["subject"]["name"]
        other = next(iter(earlier.values())) if alone else earlier.get(name)
        cells = {cell["cell"]: cell["metrics"] for cell in other["cells"]} if other else {}
        yield from ((name, c["cell"], c["metrics"], cells[c["cell"]]) for c in each["cells"] if c["cell"] in cells)


def _line(now: Any, before: Any, better: str, percent: float) -> tuple[float, str] | None:
    """By how many per cent a median is worse, and that as a sentence; None where it is within the limit."""
    value, earlier = now[_POINT], before[_POINT]
    times = value / earlier if better == LOWER else earlier / value
    if times <= 1 + percent / 100:
        return None
    worse = 100 * (times - 1)
    return worse, f"{value:.4g} {now['unit']} was {earlier:.4g}: {worse:.0f} % worse, and {percent:g} % are allowed"

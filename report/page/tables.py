"""The tables of a parity report, whatever writes them: cells with text, and a number to sort by."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .numbers import (
    MINUS,
    NONE,
    PASS,
    difference,
    figure,
    interval,
    label,
    labelled,
    metric_value,
    milliseconds,
    nbytes,
    percent,
    rank,
    verdict_text,
)

Record = Mapping[str, Any]
# Whichever comes first is what a model is worth.
_WORTH = ("accuracy", "anls", "choice", "exact_match", "top1_agreement")


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell. sort: what orders its column; verdict: PASS, AMBIGUOUS or FAIL; link: an anchor of the page."""

    text: str
    sort: float | None = None
    verdict: str | None = None
    link: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a header; the first cell names its row."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers, verdicts apart."""
        return tuple(any(c.sort is not None and not c.verdict for c in column) for column in self.columns)

    @property
    def columns(self) -> tuple[tuple[Cell, ...], ...]:
        """The cells by column."""
        return tuple(zip(*self.rows, strict=True)) if self.rows else tuple(() for _ in self.header)

    def dense(self) -> "Table":
        """Without the columns in which nothing was measured."""
        kept = [i for i, column in enumerate(self.columns) if i == 0 or any(c.text != NONE for c in column)]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, header=tuple(self.header[i] for i in kept), rows=rows)


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Table:
    """A table without empty columns."""
    return Table(caption, tuple(header), tuple(tuple(row) for row in rows)).dense()


def verdict_cell(verdict: str | None) -> Cell:
    """A verdict: sign and word, sorted by how bad it is."""
    return Cell(verdict_text(verdict), rank(verdict), verdict)


def cell(value: float | None, text: str) -> Cell:
    """A number and how it reads."""
    return Cell(text if value is not None else NONE, value)


def measured(record: Record | None, *path: str) -> Any:
    """What lies at a path of keys, or None where any of them is absent or null."""
    found: Any = record
    for key in path:
        found = found.get(key) if found is not None else None
    return found


def worth(parity: Record) -> str | None:
    """The metric that says what the candidates are worth: the first that any of them has."""
    candidates = parity.get("candidates") or ()
    return next((name for name in _WORTH if any(measured(c, "metrics", name) for c in candidates)), None)


def verdicts(parity: Record, speeds: Mapping[str, Record]) -> Table:
    """One row for each candidate. speeds: the metrics of a cell of the latency record, by a subject's name."""
    name = worth(parity)
    answers = label(name) if name else ""
    header = ("candidate", "verdict", "precision", "backend", "size", "KLD, nats", "same token", answers)
    rows = [_verdict_row(i, c, name, speeds) for i, c in enumerate(parity.get("candidates") or ())]
    return table("Every candidate against the reference", (*header, "first token, p50", "tokens/s, p50"), rows)


def _verdict_row(index: int, candidate: Record, name: str | None, speeds: Mapping[str, Record]) -> list[Cell]:
    subject, metrics = candidate["subject"], candidate.get("metrics") or {}
    speed = speeds.get(subject["name"])
    first, rate = (measured(speed, key, "p50") for key in ("time_to_first_token", "output_token_throughput"))
    return [
        Cell(subject["name"], link=f"candidate-{index}"),
        verdict_cell(candidate.get("verdict")),
        Cell(subject.get("precision") or NONE),
        Cell(subject.get("backend") or NONE),
        cell(subject.get("bytes"), nbytes(subject.get("bytes"))),
        _metric_cell("kld", metrics.get("kld")),
        _metric_cell("top1_agreement", metrics.get("top1_agreement")),
        _metric_cell(name, metrics.get(name)) if name and name != "top1_agreement" else Cell(NONE),
        cell(first, milliseconds(first)),
        cell(rate, figure(rate)),
    ]


def _metric_cell(name: str, given: Record | None) -> Cell:
    value = measured(given, "value")
    return cell(value, metric_value(name, value))


def reasons(candidate: Record) -> list[str]:
    """Why a candidate did not pass: its worst checks' lines, and where it departs first."""
    worst = candidate.get("verdict")
    lines = [c.get("line") or c["gate"] for c in candidate.get("checks") or () if c.get("verdict") == worst != PASS]
    stage, module = candidate.get("first_failed_stage"), measured(candidate, "failed_module", "module")
    if stage:
        lines.append(f"departs at {stage}" + (f", {module}" if module else ""))
    return lines


def checks(candidate: Record) -> Table:
    """The gates, and how the candidate stands to each."""
    rows = [_check_row(check) for check in candidate.get("checks") or ()]
    return table("Gates", ("gate", "verdict", "measured", "limit", "in words"), rows)


def _check_row(check: Record) -> list[Cell]:
    name, value, limit = check["gate"], check.get("value"), check.get("limit")
    words = difference if name.endswith("_drop") else metric_value
    numbers = [cell(value, words(name, value)), cell(limit, metric_value(name, limit))]
    return [Cell(label(name)), verdict_cell(check.get("verdict")), *numbers, Cell(check.get("line") or NONE)]


def metrics_table(candidate: Record) -> Table:
    """Every metric with its 95 % interval, beside the reference's own where it has one."""
    given = candidate.get("metrics") or {}
    names = [name for name in given if not name.endswith("_reference")]
    names += [n for n in (m.removesuffix("_reference") for m in given if m.endswith("_reference")) if n not in names]
    header = ("metric", "candidate (95 % interval)", "reference (95 % interval)", "rows")
    return table("Metrics", header, [_metric_row(name, given) for name in names])


def _metric_row(name: str, given: Record) -> list[Cell]:
    own, other = given.get(name), given.get(f"{name}_reference")
    count = measured(own or other, "n")
    return [
        Cell(labelled(name)),
        cell(measured(own, "value"), interval(name, own)),
        cell(measured(other, "value"), interval(name, other)),
        cell(count, str(count)),
    ]


def paired(candidate: Record) -> Table:
    """Candidate less reference on the same rows."""
    header = ("metric", "difference (95 % interval)", "margin allowed", "p", "rows better", "worse", "rows")
    rows = [_paired_row(row) for row in candidate.get("paired") or ()]
    return table("Candidate less reference, row by row", header, rows)


def _paired_row(row: Record) -> list[Cell]:
    name, value = row["metric"], row.get("difference")
    low, high = (difference(name, row.get(key)) for key in ("low", "high"))
    span = "" if NONE in (low, high) else f" ({low.removesuffix(' points')} to {high.removesuffix(' points')})"
    counts = [cell(row.get(key), str(row.get(key))) for key in ("better", "worse", "n")]
    return [
        Cell(label(name)),
        cell(value, difference(name, value) + span),
        cell(row.get("margin"), metric_value(name, row.get("margin"))),
        cell(row.get("p_value"), figure(row.get("p_value"))),
        *counts,
    ]


def stages(candidate: Record) -> Table:
    """Every stage in order: what reaches its output, what it adds itself, and the same of BF16."""
    header = (
        "stage",
        "verdict",
        "error",
        "BF16 error",
        "own",
        "BF16 own",
        "cosine",
        "SNR, dB",
        "largest",
        "row, token",
        "why",
    )
    return table("Error by stage, relative L2", header, [_stage_row(s) for s in candidate.get("stages") or ()])


def _stage_row(stage: Record) -> list[Cell]:
    errors = [measured(stage, key, "relative_l2") for key in ("error", "noise", "own", "own_noise")]
    cosine, largest = (measured(stage, "error", key) for key in ("cosine", "max_abs"))
    return [
        Cell(stage["stage"]),
        verdict_cell(stage.get("verdict")),
        *(cell(value, figure(value)) for value in errors),
        cell(cosine, f"{cosine or 0:.6f}"),
        _snr(stage.get("error")),
        cell(largest, figure(largest)),
        Cell(_worst(stage.get("worst"))),
        Cell((stage.get("why") if stage.get("verdict") != PASS else None) or NONE),
    ]


def _snr(distance: Record | None) -> Cell:
    if distance is None:
        return Cell(NONE)
    value = distance.get("snr_db")
    return Cell("exact", 1e9) if value is None else Cell(f"{value:.1f}".replace("-", MINUS), value)


def _worst(place: Record | None) -> str:
    if not place:
        return NONE
    parts = [place.get("row"), place.get("position"), place.get("phase")]
    return ", ".join(str(part) for part in parts if part is not None)


def sentences(candidate: Record) -> list[str]:
    """Where a candidate departs first, and how many rows' tokens do, as far as that was measured."""
    stage, failed = candidate.get("first_failed_stage"), candidate.get("failed_module")
    lines = [f"The first stage to fail is {stage}."] if stage else []
    if failed:
        error = measured(failed, "relative_l2")
        share = f", whose own error is {figure(error)} (relative L2)" if error is not None else ""
        lines.append(f"In {failed.get('stage')} it is {failed.get('module')}{share}.")
    return [line for line in (*lines, _tokens_line(candidate)) if line]


def _tokens_line(candidate: Record) -> str:
    given = candidate.get("tokens")
    if not given or not given.get("rows"):
        return ""
    rows, divergent = given["rows"], given.get("divergent_rows") or 0
    if not divergent:
        return f"All {rows} rows give the reference's tokens."
    line = f"{divergent} of {rows} rows ({percent(divergent / rows)}) depart from the reference's tokens"
    line += f", {given.get('near_ties') or 0} of them at a near tie"
    median = given.get("median_first_divergent")
    return line + (f"; half of them before token {figure(median)}." if median is not None else ".")


def files(subject: Record) -> Table:
    """The files of a subject, with their digests."""
    rows = [
        [Cell(name), cell(spec.get("size"), nbytes(spec.get("size"))), Cell(spec.get("sha256") or NONE)]
        for name, spec in (subject.get("files") or {}).items()
    ]
    return table(f"Files of {subject['name']}", ("file", "size", "sha256"), rows)

"""What the samples come to: cells with ratios, as a record, a table and a figure's rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from onevision_edge.cli.console import table

from .engines import CELLS, IMAGE, MEASUREMENTS, Engine, cache_bytes, weight_bytes
from .machine import Roofline
from .rounds import Samples

SampleTable = Mapping[tuple[str, str], Samples]


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of an engine, or of two engines one after the other: the median, and each round's."""

    name: str
    median: float
    rounds: Sequence[float]
    disturbed: bool


def timed(name: str, what: str, samples: SampleTable) -> Timed | None:
    """An engine's seconds of a measurement."""
    found = samples.get((name, what))
    return Timed(name, found.median, found.seconds, found.disturbed) if found else None


def joined(one: Timed, other: Timed) -> Timed:
    """The one, then the other."""
    rounds = [a + b for a, b in zip(one.rounds, other.rounds, strict=False)]
    return Timed(f"{one.name} + {other.name}", one.median + other.median, rounds, one.disturbed or other.disturbed)


def peers_of(cell: str, engines: Sequence[Engine], samples: SampleTable) -> list[Timed]:
    """The peers' seconds of a cell; the first token's are those of the best tower and the best decoder."""
    peers = [engine.name for engine in engines if not engine.ours]
    if cell != "first token":
        return [found for name in peers if (found := timed(name, cell, samples))]
    parts = [[t for name in peers if (t := timed(name, what, samples))] for what in CELLS[cell][1:]]
    if not all(parts):
        return []
    tower, decoder = (min(part, key=lambda found: found.median) for part in parts)
    return [joined(tower, decoder)]


def value(cell: str, seconds: float) -> float:
    """Tokens a second where a cell counts tokens, else seconds."""
    tokens = MEASUREMENTS[cell].tokens
    return tokens / seconds if tokens else seconds


def unit(cell: str) -> str:
    """Of a cell's values."""
    return "tok/s" if MEASUREMENTS[cell].tokens else "s"


def spread(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest ratio of a round; above 1, ours is faster."""
    ratios = [peer / our for our, peer in zip(ours, theirs, strict=False)]
    return min(ratios), max(ratios)


def cell_record(
    cell: str, engines: Sequence[Engine], samples: SampleTable, least: Mapping[str, float]
) -> dict[str, Any] | None:
    """A cell as `--json` prints it, None where nothing was measured. least: the roofline's seconds by engine."""
    ours = [found for engine in engines if engine.ours and (found := timed(engine.name, cell, samples))]
    peers = peers_of(cell, engines, samples)
    if not ours and not peers:
        return None
    record: dict[str, Any] = {
        "unit": unit(cell),
        "ours": value(cell, ours[-1].median) if ours else None,
        "variants": {found.name: value(cell, found.median) for found in ours},
        "peers": {found.name: value(cell, found.median) for found in peers},
        "roofline_shares": {f.name: least[f.name] / f.median for f in (*ours, *peers) if f.name in least},
        "disturbed": [found.name for found in (*ours, *peers) if found.disturbed],
    }
    record["roofline_share"] = record["roofline_shares"].get(ours[-1].name) if ours else None
    best = min(peers, key=lambda found: found.median, default=None)
    record["best"] = best.name if best else None
    record["ratio_to_best"] = best.median / ours[-1].median if best and ours else None
    record["spread"] = spread(ours[-1].rounds, best.rounds) if best and ours else None
    return record


def least_seconds(
    cell: str, engines: Sequence[Engine], roofline: Roofline, config: Mapping[str, Any]
) -> dict[str, float]:
    """The roofline's seconds of a cell for each engine that has it."""
    text, vision = config["text_config"], config["vision_config"]
    if cell == "first token":
        ours = (engine for engine in engines if engine.ours and engine.text)
        tower = roofline.vision_seconds(*IMAGE, vision)
        return {e.name: tower + roofline.text_seconds("prompt", e.text, text) for e in ours if e.text}
    measurement = MEASUREMENTS[cell]
    able = [engine for engine in engines if measurement.applies(engine)]
    if measurement.method == "vision":
        return {engine.name: roofline.vision_seconds(*measurement.arguments, vision) for engine in able}
    return {engine.name: roofline.text_seconds(cell, engine.text, text) for engine in able if engine.text}


def engine_records(
    engines: Sequence[Engine],
    loads: Mapping[str, Sequence[float]],
    peaks: Mapping[str, int],
    shape: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """Seconds to load, peak memory in GB and MB of weights and, at 2048 tokens, of cache that a token reads."""
    records = {}
    for engine in engines:
        if engine.name not in peaks:
            continue
        record: dict[str, Any] = {"load_s": median(loads[engine.name]), "peak_gb": peaks[engine.name] / 1e9}
        if engine.text:
            record["weights_mb_per_token"] = weight_bytes(engine.text, shape) / 1e6
            record["cache_mb_per_token_at_2048"] = cache_bytes(engine.text, shape, 2048) / 1e6
        records[engine.name] = record
    return records


def cell_table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each engine, a column for each cell; then ours against the best peer. ~: others were at work."""
    names = list(dict.fromkeys(name for record in cells.values() for name in (*record["variants"], *record["peers"])))
    rows = [[name, *(_figure(name, record) for record in cells.values())] for name in names]
    rows.append(["ours / best peer", *(_ratio(record) for record in cells.values())])
    rows.append(["roofline, ours", *(_percent(record["roofline_share"]) for record in cells.values())])
    return table(rows, ("engine", *(f"{cell}, {record['unit']}" for cell, record in cells.items())))


def engine_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Load time, memory and bytes a token."""
    rows = []
    for name, record in records.items():
        bytes_read = [record.get("weights_mb_per_token"), record.get("cache_mb_per_token_at_2048")]
        rows.append(
            [name, f"{record['load_s']:.1f} s", f"{record['peak_gb']:.2f} GB"]
            + [f"{count:.0f} MB" if count else "" for count in bytes_read]
        )
    return table(rows, ("engine", "load", "peak memory", "weights per token", "cache per token at 2048"))


def _figure(name: str, record: Mapping[str, Any]) -> str:
    found = {**record["variants"], **record["peers"]}.get(name)
    if found is None:
        return ""
    share = record["roofline_shares"].get(name)
    return f"{found:.3g}{'~' if name in record['disturbed'] else ''}" + (f" ({_percent(share)})" if share else "")


def _ratio(record: Mapping[str, Any]) -> str:
    if record["ratio_to_best"] is None:
        return ""
    spread = "" if record["spread"] is None else " ({:.2f} to {:.2f})".format(*record["spread"])
    return f"{record['ratio_to_best']:.2f}{spread}"


def _percent(share: float | None) -> str:
    return f"{100 * share:.0f} %" if share is not None else ""

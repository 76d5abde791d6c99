"""onevision-edge inspect and verify"""

from pathlib import Path
from typing import Any

import click

from .console import print_json, progress, size, table


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--length", type=click.IntRange(1), help="Tokens to plan memory for; the bundle's max_length if not given."
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences to plan memory for.")
@click.option(
    "--image-size", metavar="WxH", help="Image to plan memory for; the largest the bundle takes if not given."
)
@click.option("--json", "as_json", is_flag=True)
def inspect(bundle: Path, length: int | None, batch: int, image_size: str | None, as_json: bool) -> None:
    """Show what a bundle holds: model, graphs and their contracts, files, memory it will take."""
    from ..bundle import Bundle
    from ..engines.cpu.record import read_record
    from ..engines.record import engine_folders, read_set
    from ..runtime.memory import engine_memory_plan, memory_plan

    opened = Bundle.open(bundle)
    manifest = opened.manifest
    length = min(length or manifest.max_length, manifest.max_length)
    record, pixels = read_record(opened), _pixels(opened, image_size)
    if record is not None:
        from ..runtime import model  # noqa: F401 - the plan counts what it has loaded

        plan = engine_memory_plan(opened, record, length, batch, pixels)
    else:
        plan = memory_plan(manifest, length, batch, pixels)
    sets = {folder.name: read_set(folder) for folder in engine_folders(opened)}
    if as_json:
        items = [{"name": item.name, "bytes": item.bytes, "note": item.note} for item in plan]
        memory = {"length": length, "batch": batch, "items": items}
        engines = {name: found.to_dict() for name, found in sets.items()}
        if record is not None:
            engines["cpu"] = record.to_dict()
        print_json({**manifest.to_dict(), "memory_plan": memory, "engines": engines})
        return
    click.echo(_model_text(manifest))
    if manifest.quantization is not None:
        click.echo("\n" + _quantization_text(manifest))
    for name, graph in manifest.graphs.items():
        click.echo(f"\n{name}: {graph.file}, {graph.dtype}\n{_contract(graph)}")
    click.echo("\nFiles\n" + table([(n, size(f.size), f.sha256[:12]) for n, f in manifest.files.items()]))
    if sets or record is not None:
        click.echo("\nEngines\n" + _engines_text(sets, record))
    rows = [(item.name, size(item.bytes), item.note) for item in plan]
    total = ("total", size(sum(item.bytes for item in plan)), "")
    where = "in the cpu engine" if record is not None else "on ONNX Runtime"
    click.echo(f"\nMemory for {batch} x {length} tokens {where}\n" + table([*rows, total]))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True)
def verify(bundle: Path, as_json: bool) -> None:
    """Check every file of a bundle against the sha256 in its manifest, offline."""
    from ..bundle import Bundle

    opened = Bundle.open(bundle)
    with progress("verify") as report:
        opened.verify(report)
    files = opened.manifest.files
    if as_json:
        print_json({"verified": True, "files": len(files), "bytes": sum(f.size for f in files.values())})
    else:
        click.echo(f"{bundle}: {len(files)} files, {size(sum(f.size for f in files.values()))}, all as written")


def _pixels(opened: Any, image_size: str | None) -> int:
    if image_size is None:
        from ..runtime.prompts import image_processor

        return image_processor(opened.directory, opened.manifest.model.vision).max_pixels
    width, _, height = image_size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise click.BadParameter(f"{image_size!r} is not WIDTHxHEIGHT, such as 1036x728", param_hint="--image-size")
    return int(width) * int(height)


def _model_text(manifest: Any) -> str:
    v, t, origin = manifest.model.vision, manifest.model.text, manifest.provenance
    vision = f"{v.depth} blocks of {v.hidden_size}, {v.num_heads} heads, patch {v.patch_size}"
    heads = f"{t.num_attention_heads} / {t.num_key_value_heads} heads of {t.head_dim}"
    rows = [
        ("vision", f"{vision}, merge {v.spatial_merge_size}"),
        ("decoder", f"{t.num_hidden_layers} layers of {t.hidden_size}, {heads}, vocabulary {t.vocab_size}"),
        ("max length", f"{manifest.max_length} tokens"),
        ("checkpoint", f"{origin.get('checkpoint')} ({str(origin.get('weights_sha256'))[:12]})"),
    ]
    return table(rows)


def _quantization_text(manifest: Any) -> str:
    from .quantize import quality_text

    record = manifest.quantization
    plan, data = record["plan"], record["calibration"]
    rules = [(r["graph"], r["modules"], r["precision"], r["reason"]) for r in plan["rules"]]
    lines = [
        quality_text(manifest.quality),
        f"plan {plan['name']}: {plan['dtype']}, KV cache {plan['kv_cache']}; the last rule that matches decides",
        table(rules),
        f"calibrated on {data['rows']} rows of the {data['source']} ({data['sha256'][:12]}), seed {record['seed']}",
    ]
    return "\n".join(lines)


def _engines_text(sets: dict[str, Any], record: Any) -> str:
    """A line for each engine: what built it, for what, and the most it takes."""
    rows = []
    if record is not None:
        for part, one in record.parts.items():
            told = f"{size(one.bytes_per_row)} read for a row, floats in {one.floats}"
            built = f"built with {record.machine['kernels']} kernels"
            rows.append(("cpu", part, built, size(sum(f.size for f in one.files.values())), told))
    for name, found in sets.items():
        for part, engine in found.engines.items():
            dimensions = ("patches", "images") if part == "vision" else ("tokens", "batch", "length")
            most = ", ".join(f"{engine.limits[d]['max']} {d}" for d in dimensions)
            rows.append((name, part, f"{found.engine} {found.version}", size(engine.size), f"up to {most}"))
    return table(rows)


def _contract(graph: Any) -> str:
    rows = [("in", t) for t in graph.inputs] + [("out", t) for t in graph.outputs]
    shown = [(way, t) for way, t in rows if "." not in t.name or t.name.endswith(".0")]
    cells = [(way, t.name, t.dtype, _shape(t.shape), t.meaning) for way, t in shown]
    hidden = len(rows) - len(shown)
    more = f"\n(and {hidden} more of the same for the other layers)" if hidden else ""
    return table(cells) + more


def _shape(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"

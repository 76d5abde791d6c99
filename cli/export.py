"""onevision-edge export"""

from pathlib import Path

import click

from .console import print_json, progress, say, size


@click.command()
@click.argument("checkpoint")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the bundle to write."
)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True)
@click.option(
    "--max-length", type=click.IntRange(1), help="Rows of the KV cache.  [default: 4096, or the model's limit if less]"
)
@click.option("--parts", default="vision,decoder", show_default=True, help="Graphs to export, comma-separated.")
@click.option("--overwrite", is_flag=True, help="Replace the bundle if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the bundle's manifest.")
def export(
    checkpoint: str, output: Path, dtype: str, max_length: int | None, parts: str, overwrite: bool, as_json: bool
) -> None:
    """Write a checkpoint as a bundle of ONNX graphs.

    CHECKPOINT is a local directory, a hub id (owner/name), or "demo", the small model shipped with this package.
    """
    run_export(checkpoint, output, dtype, max_length, parts.split(","), overwrite, as_json)


def run_export(
    checkpoint: str,
    output: Path,
    dtype: str,
    max_length: int | None,
    parts: list[str],
    overwrite: bool,
    as_json: bool = False,
) -> None:
    """Export with a progress bar, and say what was written."""
    from ..errors import OneVisionError

    try:
        from ..export import export as export_bundle
    except ImportError as error:
        raise OneVisionError(f"export needs {error.name}: pip install 'onevision-edge[export]'") from error
    with progress("export") as report:
        bundle = export_bundle(
            checkpoint,
            output,
            dtype=dtype,
            max_length=max_length,
            parts=[part.strip() for part in parts],
            overwrite=overwrite,
            progress=report,
        )
    if as_json:
        print_json(bundle.manifest.to_dict())
    total = sum(spec.size for spec in bundle.manifest.files.values())
    say(f"wrote {output}: {', '.join(bundle.manifest.graphs)} in {dtype}, {size(total)}")

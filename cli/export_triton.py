"""onevision-edge export-triton"""

from pathlib import Path

import click

from .console import print_json, say, size


@click.command("export-triton")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the repository to write."
)
@click.option("--name", default="onevision", show_default=True, help="Of the model that answers.")
@click.option(
    "--decoder",
    type=click.Choice(["triton", "runtime"]),
    help="A model of its own, or opened by the one that answers, where its KV cache stays.  "
    "[default: triton; runtime with --engines]",
)
@click.option("--engines", metavar="TARGET", help="Take TensorRT engines as built for TARGET.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True, help="Of ONNX Runtime.")
@click.option("--slots", type=click.IntRange(1), default=8, show_default=True, help="Questions answered at a time.")
@click.option("--threads", type=click.IntRange(1), help="Threads per operator.")
@click.option("--overwrite", is_flag=True, help="Replace the repository if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written.")
def export_triton(
    bundle: Path,
    output: Path,
    name: str,
    decoder: str | None,
    engines: str | None,
    device: str,
    slots: int,
    threads: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a bundle as a model repository of NVIDIA Triton.

    Start it with tritonserver --model-repository=OUTPUT, in an environment whose Python 3.11 or later has this package.
    """
    from ..bundle import Bundle
    from ..serve.triton import TritonOptions, cache_bytes
    from ..serve.triton import export_triton as write

    opened = Bundle.open(bundle)
    chosen = decoder or ("runtime" if engines else "triton")
    options = TritonOptions(name, chosen, engines, device, slots, threads)  # type: ignore[arg-type]
    models = write(opened, output, options, overwrite)
    if as_json:
        print_json({"repository": str(output), "models": models, "decoder": chosen})
    say(f"wrote {output}: {', '.join(models)}")
    if chosen == "triton":
        carried = size(cache_bytes(opened))
        say(f"each token carries its KV cache, {carried}, to {name}_decoder and back: --decoder runtime keeps it")

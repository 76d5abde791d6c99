"""Engines of several sizes, built for sm80 by TensorRT-RTX: size, memory and time beside the estimate's.

    python benchmarks/engine_builds.py --shape small --shape medium --work /some/disk
    python benchmarks/engine_builds.py --shape 0.6b --dtype fp16 --work /some/disk

engines/estimate.py has its constants from these rows. Weights are random. Precisions such as int8 are quantised
without calibration methods, which changes numbers, not sizes.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np

import onevision_edge
from onevision_edge.calibration.recipe import Methods
from onevision_edge.engines.builder import build, plan_build
from onevision_edge.precision.plan import default_plan

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # hidden size, intermediate size, layers, heads, key-value heads, vocabulary; the tower's hidden size, depth
    "small": (512, 1536, 4, 4, 2, 8192, 256, 4),
    "medium": (1024, 3072, 8, 16, 8, 32768, 512, 8),
    "large": (1024, 3072, 28, 16, 8, 32768, 1024, 24),
    "0.6b": (1024, 3072, 28, 16, 8, 151936, 256, 2),
    "matrix": (1024, 3072, 28, 16, 8, 151936, 1024, 24),  # with the released tower
}


def config_of(shape: str) -> dict[str, object]:
    """A config.json of a shape."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tower, depth = SHAPES[shape]
    text = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
        "max_position_embeddings": 32768,
    }
    vision = {
        "depth": depth,
        "hidden_size": tower,
        "num_heads": tower // 64,
        "intermediate_size": 4 * tower,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
    }
    return {
        "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
        "model_type": "llavaonevision1_5",
        "image_token_id": 60,
        "video_token_id": 61,
        "text_config": text,
        "vision_config": vision,
    }


def bundle_of(shape: str, dtype: str, work: Path) -> Path:
    """A bundle of random weights, written once."""
    checkpoint, bundle = work / f"checkpoint-{shape}", work / f"bundle-{shape}-{dtype}"
    if not checkpoint.exists():
        config = work / f"config-{shape}.json"
        config.write_text(json.dumps(config_of(shape)))
        tool = ROOT / "tools" / "make_checkpoint.py"
        subprocess.run([sys.executable, tool, checkpoint, "--config", config], check=True, stdout=subprocess.DEVNULL)
    if bundle.exists():
        return bundle
    if dtype in ("fp16", "bf16", "fp32"):
        onevision_edge.export(checkpoint, bundle, dtype=dtype, max_length=2048)
        return bundle
    rows = work / "rows.npz"
    random = np.random.default_rng(0)
    ids = random.integers(0, 60, (1, 12))
    ids[:, 2:6] = 60
    pixels = random.standard_normal((16, 588)).astype(np.float32)
    np.savez(rows, input_ids=ids, pixel_values=pixels, image_grid_thw=np.array([[1, 4, 4]]))
    onevision_edge.quantize(
        checkpoint,
        bundle,
        plan=default_plan(dtype, vision=dtype, lm_head=dtype),
        methods=Methods(smoothquant=False, awq=False, gptq=False),
        calibration=rows,
        evaluate=False,
        max_length=2048,
    )
    return bundle


@click.command()
@click.option("--shape", "shapes", type=click.Choice(list(SHAPES)), multiple=True, required=True)
@click.option("--dtype", "dtypes", multiple=True, default=("fp16",), show_default=True, help="Or a precision.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Directory for checkpoints and bundles.")
@click.option("--target", default="sm80", show_default=True)
def main(shapes: tuple[str, ...], dtypes: tuple[str, ...], work: Path, target: str) -> None:
    """Print a row for each engine: MB of weights, of the engine and the estimate, of peak memory and the estimate."""
    work.mkdir(parents=True, exist_ok=True)
    click.echo("shape dtype part profiles | weights | engine, estimate | peak memory, estimate | seconds")
    for shape in shapes:
        for dtype in dtypes:
            bundle = bundle_of(shape, dtype, work)
            for decode_profile in (False, True):
                plan = plan_build(bundle, [target], max_pixels=448 * 448, decode_profile=decode_profile)
                found = build(plan, overwrite=True)
                assert found is not None
                for part, engine in found.engines.items():
                    expected = plan.estimate.parts[part]
                    mb = [expected.weights, engine.size, expected.engine, engine.peak_rss or 0, expected.build]
                    row = [f"{count / 1e6:9.1f}" for count in mb]
                    name = f"{shape:7} {dtype:12} {part:8} {len(engine.profiles)}"
                    click.echo(f"{name} | {row[0]} | {row[1]}, {row[2]} | {row[3]}, {row[4]} | {engine.seconds:.1f}")
                shutil.rmtree(plan.folder)


if __name__ == "__main__":
    main()

"""Write a random checkpoint of the family, streaming, in the published layout.

    python tools/make_checkpoint.py OUT --shape 4b
    python tools/make_checkpoint.py OUT --config some/config.json --layout transformers --dtype fp32

The tensors are those the graphs ask for, so every configuration the exporter takes can be made. Values are
uniform with a standard deviation of 1 / sqrt(inputs), norms near 1: activations stay of order one, so that such
a model can be exported, quantised, built, run and timed like a trained one. Memory holds one block.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np

from onevision_edge.config import ModelConfig, read_json
from onevision_edge.errors import OneVisionError
from onevision_edge.export.checkpoint import locate
from onevision_edge.export.draft import EMBEDDING_NAME
from onevision_edge.export.graph import build_decoder, build_vision
from onevision_edge.precision.plan import default_plan

BLOCK_VALUES = 1 << 22
SHARD_BYTES = 5_000_000_000
DTYPES = {"bf16": ("BF16", ml_dtypes.bfloat16), "fp16": ("F16", np.float16), "fp32": ("F32", np.float32)}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")

VISION = {
    "model_type": "rice_vit",
    "depth": 24,
    "embed_dim": 1024,
    "hidden_size": 1024,
    "num_heads": 16,
    "intermediate_size": 4096,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
}
TEXT = {
    "model_type": "LLaVAOneVision1_5_text",
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "hidden_act": "silu",
}
SHAPES: dict[str, dict[str, Any]] = {
    # The text half of Qwen3-0.6B, with the released tower.
    "s": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
    },
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "rope_theta": 5e6, "max_position_embeddings": 262144},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "rope_theta": 1e6, "max_position_embeddings": 40960},
}


def named_config(shape: str) -> dict[str, Any]:
    """config.json of a released size."""
    text = {**TEXT, **SHAPES[shape]}
    return {
        "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
        "model_type": "llavaonevision1_5",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "eos_token_id": 151645,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": text["vocab_size"],
        "text_config": text,
        "vision_config": {**VISION, "text_hidden_size": text["hidden_size"]},
    }


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Values in it."""
        return math.prod(self.shape)


def tensors(config: ModelConfig, tied: bool) -> list[Tensor]:
    """Every tensor of a checkpoint, by its released name, in the order the graphs use them."""
    text = config.text
    found = [Tensor(EMBEDDING_NAME, (text.vocab_size, text.hidden_size))]
    plan = default_plan("float")
    for _, weights in (build_vision(config, plan), build_decoder(config, plan, max_length=1)):
        found += [Tensor(name, weight.source_shape) for name, weight in weights.by_name.items()]
    return [t for t in found if not (tied and t.name == "lm_head.weight")]


def stored_name(name: str, layout: str) -> str:
    """A tensor's name in the layout that is written."""
    if layout == "transformers" and name.startswith("visual."):
        return "model." + name
    if layout == "transformers" and name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return name


def values(tensor: Tensor, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Random values in float32 blocks."""
    is_norm = len(tensor.shape) == 1 and tensor.name.endswith("weight")
    scale = 0.05 if len(tensor.shape) == 1 else math.sqrt(3 / math.prod(tensor.shape[1:]))
    for start in range(0, tensor.count, BLOCK_VALUES):
        block = random.random(min(BLOCK_VALUES, tensor.count - start), np.float32)
        yield (block * np.float32(2) - np.float32(1)) * np.float32(scale) + np.float32(is_norm)


def shards(found: list[Tensor], itemsize: int, limit: int) -> list[list[Tensor]]:
    """Tensors in files of at most `limit` bytes."""
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in found:
        if files[-1] and size + tensor.count * itemsize > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.count * itemsize
    return files


def write_shard(
    path: Path, found: list[Tensor], dtype: str, layout: str, random: np.random.Generator, bar: Any
) -> None:
    """One safetensors file: the header is known before any value is made."""
    code, kind = DTYPES[dtype]
    itemsize, offset, header = np.dtype(kind).itemsize, 0, {}
    for tensor in found:
        end = offset + tensor.count * itemsize
        header[stored_name(tensor.name, layout)] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in found:
            for block in values(tensor, random):
                file.write(block.astype(kind).view(np.uint8).data)
                bar.update(block.size * itemsize)


def copy_tokenizer(source: str, output: Path, config: dict[str, Any]) -> None:
    """Take tokenizer, processor and special ids from another checkpoint, so that the result can chat."""
    directory = locate(source)
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, output / name)
    published = read_json(directory / "config.json")
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "eos_token_id"):
        if key in published:
            config[key] = published[key]


def write_checkpoint(
    output: Path, config: dict[str, Any], dtype: str, layout: str, tied: bool, seed: int, shard_bytes: int
) -> int:
    """Write all files; returns the number of parameters."""
    found = tensors(ModelConfig.from_hf(config, {}), tied)
    itemsize = np.dtype(DTYPES[dtype][1]).itemsize
    files = shards(found, itemsize, shard_bytes)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    names = names if len(files) > 1 else ["model.safetensors"]
    random = np.random.default_rng(seed)
    total = sum(t.count for t in found) * itemsize
    with click.progressbar(length=total, label="checkpoint", file=sys.stderr) as bar:
        for name, members in zip(names, files, strict=True):
            write_shard(output / name, members, dtype, layout, random, bar)
    if len(files) > 1:
        places = {
            stored_name(t.name, layout): name for name, members in zip(names, files, strict=True) for t in members
        }
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (output / "config.json").write_text(json.dumps(config, indent=1))
    return total // itemsize


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(sorted(SHAPES)), help="4b and 8b are released; s is small.")
@click.option("--config", "config_path", type=click.Path(exists=True, path_type=Path), help="Any config.json.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
@click.option("--layout", type=click.Choice(["released", "transformers"]), default="released", show_default=True)
@click.option("--tied", is_flag=True, help="Leave the head out, so that it shares the embedding table.")
@click.option("--tokenizer", help='Checkpoint to take tokenizer and processor files from ("demo": the shipped one).')
@click.option("--seed", default=0, show_default=True)
@click.option("--shard-bytes", default=SHARD_BYTES, show_default=True)
def main(
    output: Path,
    shape: str | None,
    config_path: Path | None,
    dtype: str,
    layout: str,
    tied: bool,
    tokenizer: str | None,
    seed: int,
    shard_bytes: int,
) -> None:
    """Write a random checkpoint to the directory OUTPUT, which must not exist."""
    if (shape is None) == (config_path is None):
        raise click.UsageError("give either --shape or --config")
    config = read_json(config_path) if config_path else named_config(str(shape))
    output.mkdir(parents=True)
    started = time.perf_counter()
    try:
        if tokenizer:
            copy_tokenizer(tokenizer, output, config)
        count = write_checkpoint(output, config, dtype, layout, tied, seed, shard_bytes)
    except BaseException as error:
        shutil.rmtree(output)
        if isinstance(error, OneVisionError):
            raise click.ClickException(str(error)) from error
        raise
    click.echo(f"{output}: {count:,} parameters in {dtype}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

"""The published checkpoint layout on disk: config, processor and generation files, BF16 weights; read and write."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizer as tokens
import torch
from images import MAX_PIXELS, MEAN, MIN_PIXELS, STD
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch_model import Config, LLaVAOneVision, TextConfig, VisionConfig

MAX_POSITIONS = 4096
WEIGHTS = "model.safetensors"


def config_json(config: Config, tokenizer: Tokenizer) -> dict:
    """config.json of the family; every shape, eps and id the loader needs."""
    vision, text, identity = config.vision, config.text, tokenizer.token_to_id
    return {
        "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
        "model_type": "llavaonevision1_5",
        "image_token_id": identity("<|image_pad|>"),
        "video_token_id": identity("<|video_pad|>"),
        "vision_start_token_id": identity("<|vision_start|>"),
        "vision_end_token_id": identity("<|vision_end|>"),
        "vocab_size": text.vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "rice_vit",
            "depth": vision.depth,
            "embed_dim": vision.hidden_size,
            "hidden_size": vision.hidden_size,
            "num_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "hidden_act": "gelu",
            "in_channels": vision.in_channels,
            "initializer_range": 0.02,
            "layer_norm_eps": vision.layer_norm_eps,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "temporal_patch_size": 1,
            "text_hidden_size": text.hidden_size,
        },
        "text_config": {
            "model_type": "LLaVAOneVision1_5_text",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "layer_types": ["full_attention"] * text.num_hidden_layers,
            "max_position_embeddings": MAX_POSITIONS,
            "max_window_layers": text.num_hidden_layers,
            "sliding_window": None,
            "use_sliding_window": False,
            "use_cache": True,
            "tie_word_embeddings": False,
        },
    }


def preprocessor_json() -> dict:
    """preprocessor_config.json: the Qwen2-VL image processor with one frame per patch."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [round(float(value), 8) for value in MEAN],
        "image_std": [round(float(value), 8) for value in STD],
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 1,
    }


def generation_json(tokenizer: Tokenizer) -> dict:
    """generation_config.json: greedy, ends at the end of the turn or of the text."""
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    return {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}


def save_files(config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    """Write everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens.save(tokenizer, folder)
    contents = {
        "config.json": config_json(config, tokenizer),
        "preprocessor_config.json": preprocessor_json(),
        "generation_config.json": generation_json(tokenizer),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_weights(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the BF16 weights beside their final name, then rename: a reader never sees half a file."""
    rounded = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    unfinished = folder / (WEIGHTS + ".unfinished")
    save_file(rounded, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / WEIGHTS)


def load(folder: Path) -> tuple[LLaVAOneVision, Tokenizer]:
    """The model with its BF16 weights widened to float32, ready to evaluate, and its tokenizer."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vision = {key: raw["vision_config"][key] for key in VisionConfig.__dataclass_fields__}
    text = {key: raw["text_config"][key] for key in TextConfig.__dataclass_fields__}
    model = LLaVAOneVision(Config(VisionConfig(**vision), TextConfig(**text)))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))

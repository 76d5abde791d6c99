"""Chat messages to what the token level takes: ids with every placeholder expanded, pixel rows and grids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig, VisionConfig, read_json
from .chat import IMAGE_TOKEN, VIDEO_TOKEN, Prompt, expand_placeholders, render
from .image_cache import ImageCache
from .images import ImageProcessor
from .token_model import Media
from .tokenizer import Tokenizer
from .video import load_video
from .vision import media_tokens

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, int64 [tokens], and the pixel rows of the images and of the videos they stand for."""

    ids: np.ndarray
    images: Media
    videos: Media


def token_prompt(
    messages: Messages,
    config: ModelConfig,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    cache: ImageCache | None = None,
) -> TokenPrompt:
    """Read one conversation, up to where the answer begins; image files by `cache`. Raises OneVisionError."""
    image, video = (tokenizer.token(i) for i in (config.image_token_id, config.video_token_id))
    prompt = render(
        messages, tokenizer.chat_template, image_token=image or IMAGE_TOKEN, video_token=video or VIDEO_TOKEN
    )
    images = Media(*processor(prompt.images, cache)) if prompt.images else Media(None, None)
    videos = _clips(prompt, processor)
    counts = [[] if m.grid_thw is None else media_tokens(m.grid_thw, config.vision).tolist() for m in (images, videos)]
    ids = expand_placeholders(tokenizer.encode(prompt.text), config.image_token_id, config.video_token_id, *counts)
    return TokenPrompt(ids, images, videos)


def image_processor(directory: Path, vision: VisionConfig) -> ImageProcessor:
    """The published processor of a bundle or checkpoint, with the patch and merge sizes of the model itself."""
    path = directory / "preprocessor_config.json"
    processor = ImageProcessor.from_config(read_json(path)) if path.is_file() else ImageProcessor()
    return replace(processor, patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)


def optional_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a bundle or checkpoint; None where it has no tokenizer.json."""
    return Tokenizer.from_directory(directory) if (directory / "tokenizer.json").is_file() else None


def _clips(prompt: Prompt, processor: ImageProcessor) -> Media:
    if not prompt.videos:
        return Media(None, None)
    clips = [processor.video(load_video(v.source, frames=v.nframes, fps=v.fps)) for v in prompt.videos]
    pixels, grids = zip(*clips, strict=True)
    return Media(np.concatenate(pixels), np.concatenate(grids))

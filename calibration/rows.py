"""Rows of calibration and evaluation data at the token level, and what makes them of chat messages."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import ModelConfig
from ..errors import OneVisionError
from ..runtime.images import ImageProcessor
from ..runtime.prompts import Messages, image_processor, optional_tokenizer, token_prompt
from ..runtime.stitching import check_ids
from ..runtime.tokenizer import Tokenizer

END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What the model is shown, and the answer expected of it where there is one.

    input_ids: int64 [tokens], the prompt with its placeholders expanded, then the answer and its end of turn.
    answer_start: the index of the answer's first id; len(input_ids) where there is no answer.
    pixel_values, pixel_values_videos: float32 [patches, patch_dim]; their grids: int64 [n, 3]; None without.
    """

    name: str
    input_ids: np.ndarray
    answer_start: int
    pixel_values: np.ndarray | None = None
    image_grid_thw: np.ndarray | None = None
    pixel_values_videos: np.ndarray | None = None
    video_grid_thw: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Preparer:
    """What turns messages into rows, as the runtime does for this model; `tokenizer` is None where it has none."""

    directory: Path
    config: ModelConfig
    processor: ImageProcessor
    tokenizer: Tokenizer | None

    @classmethod
    def from_directory(
        cls,
        directory: str | os.PathLike[str],
        config: ModelConfig,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> "Preparer":
        """Read the tokenizer and processor files of a checkpoint or bundle.

        min_pixels, max_pixels: limits images are resized to, in place of the published. Raises OneVisionError.
        """
        folder = Path(directory)
        processor = image_processor(folder, config.vision).with_pixels(min_pixels, max_pixels)
        return cls(folder, config, processor, optional_tokenizer(folder))

    def require_tokenizer(self, source: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer, or an error saying that `source` cannot be read without."""
        if self.tokenizer is None:
            raise OneVisionError(
                f"{source}: {self.directory} has no tokenizer.json, which text needs; "
                "give token-level rows, .npz files of input_ids, pixel_values and image_grid_thw"
            )
        return self.tokenizer

    def row(self, name: str, messages: Messages, answer: str | None = None) -> Row:
        """The row of one conversation, up to the answer, and of that answer. Raises OneVisionError."""
        tokenizer = self.require_tokenizer(name)
        prompt = token_prompt(messages, self.config, tokenizer, self.processor)
        ids = prompt.ids if answer is None else np.concatenate([prompt.ids, self.answer_ids(answer)])
        check_ids(ids, self.config.text.vocab_size)
        images, videos = prompt.images, prompt.videos
        return Row(
            name, ids, len(prompt.ids), images.pixel_values, images.grid_thw, videos.pixel_values, videos.grid_thw
        )

    def answer_ids(self, answer: str) -> np.ndarray:
        """The ids of an answer and its end of turn: int64 [tokens]."""
        tokenizer = self.require_tokenizer("an answer")
        ids = tokenizer.encode(answer)
        media = {self.config.image_token_id, self.config.video_token_id}
        if media & set(ids):
            raise OneVisionError("the answer contains a placeholder of an image or a video, which no answer has")
        return np.array([*ids, self._end_of_turn(tokenizer)], np.int64)

    def _end_of_turn(self, tokenizer: Tokenizer) -> int:
        named = tokenizer.token_id(END_OF_TURN)
        ends = [*([] if named is None else [named]), *tokenizer.eos_token_ids, *self.config.eos_token_ids]
        if not ends:
            raise OneVisionError(
                f"{self.directory} names no end of turn: neither {END_OF_TURN} nor an eos token, which an answer "
                "ends with; leave the answers out or complete tokenizer_config.json"
            )
        return ends[0]

"""Rows that references are traced on, what keeps their stages, and the model in numpy beside them."""

from typing import Any

import numpy as np
from numpy_model import NumpyModel, stored

from onevision_edge.calibration.rows import Row
from onevision_edge.config import ModelConfig

IDS = np.array([5, 60, 60, 60, 60, 9, 33, 2, 17], np.int64)  # four tokens of one image of 4 x 4 patches


class Recorder:
    """Keeps what every stage read and gave, and hands over other rows where told to."""

    def __init__(self, **instead: np.ndarray) -> None:
        self.instead = instead
        self.read: dict[str, list[np.ndarray]] = {}
        self.gave: dict[str, list[np.ndarray]] = {}
        self.order: list[str] = []

    def before(self, stage: str, rows: np.ndarray) -> np.ndarray:
        self.read.setdefault(stage, []).append(rows)
        return self.instead.get(stage, rows)

    def after(self, stage: str, rows: np.ndarray) -> None:
        assert rows.dtype == np.float32
        assert rows.ndim == 2
        self.gave.setdefault(stage, []).append(rows)
        self.order.append(stage)


def row_of(case: Any, name: str = "row") -> Row:
    """A recorded case of one sequence."""
    inputs = {key: case.inputs.get(key) for key in ("pixel_values", "image_grid_thw")}
    inputs |= {key: case.inputs.get(key) for key in ("pixel_values_videos", "video_grid_thw")}
    ids = case.inputs["input_ids"][0]
    return Row(name, ids, len(ids), **inputs)


def media_of(case: Any) -> np.ndarray | None:
    return next((case.arrays[key] for key in ("image_embeds", "video_embeds") if key in case.arrays), None)


def image_row(ids: np.ndarray = IDS, answer_start: int = 7, seed: int = 0) -> Row:
    pixels = np.random.default_rng(seed).standard_normal((16, 588)).astype(np.float32)
    return Row("image", ids, answer_start, pixels, np.array([[1, 4, 4]]))


def two_images(seed: int = 0) -> Row:
    """One of two tokens, one of four."""
    pixels = np.random.default_rng(seed).standard_normal((24, 588)).astype(np.float32)
    ids = np.array([5, 60, 60, 9, 60, 60, 60, 60, 8], np.int64)
    return Row("two", ids, len(ids), pixels, np.array([[1, 2, 4], [1, 4, 4]]))


def error(values: np.ndarray, expected: np.ndarray) -> float:
    assert values.shape == expected.shape
    return float(np.abs(values - expected).max())


def numpy_model(config: ModelConfig, made: Any) -> NumpyModel:
    tensors = {name: stored(name, values.astype(np.float64)) for name, values in made.tensors.items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return NumpyModel(config, tensors)

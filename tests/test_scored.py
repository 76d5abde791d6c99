"""Where quality is measured: the positions that predict the answer, or the text after the last image."""

from pathlib import Path

import numpy as np
import pytest

from onevision_edge.calibration.rows import Row
from onevision_edge.calibration.scored import MOST_POSITIONS, scored
from onevision_edge.config import ModelConfig

IMAGE, VIDEO = 505, 506


@pytest.fixture(scope="module")
def config(golden_checkpoint: Path) -> ModelConfig:
    return ModelConfig.from_checkpoint(golden_checkpoint)


def row(ids: list[int], answer: int | None = None) -> Row:
    return Row("row", np.array(ids), len(ids) if answer is None else answer)


def test_positions_predict_the_answer_and_its_end(config: ModelConfig) -> None:
    found = scored(row([1, IMAGE, IMAGE, 2, 3, 40, 41, 42], answer=5), config)
    assert found.name == "row"
    assert found.positions.tolist() == [4, 5, 6]
    assert found.targets is not None
    assert found.targets.tolist() == [40, 41, 42]


def test_an_answer_at_the_limit_and_beyond_it(config: ModelConfig) -> None:
    ids = [1, IMAGE, 2, *range(100, 100 + MOST_POSITIONS)]
    at = scored(row(ids, answer=3), config)
    assert at.positions.tolist() == list(range(2, 2 + MOST_POSITIONS))
    assert at.targets is not None
    beyond = scored(row([*ids, 7], answer=3), config)
    assert beyond.positions.tolist() == at.positions.tolist()  # its first tokens, for the distributions alone
    assert beyond.targets is None


@pytest.mark.parametrize(
    ("ids", "positions"),
    [
        ([1, IMAGE, IMAGE, 2, 3], [3, 4]),
        ([1, IMAGE, 2, VIDEO, 3, 4], [4, 5]),
        ([1, VIDEO, 2, IMAGE, 3], [4]),
        ([1, 2, 3], [0, 1, 2]),
        ([1, 2, IMAGE], [0, 1, 2]),
        ([IMAGE, *[5] * 100], list(range(37, 101))),
    ],
)
def test_without_an_answer_the_text_after_the_last_medium(
    config: ModelConfig, ids: list[int], positions: list[int]
) -> None:
    found = scored(row(ids), config)
    assert found.positions.tolist() == positions
    assert found.targets is None

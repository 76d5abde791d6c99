"""Cells and their inputs: every combination once, the same noise for the same seed, no ids but those of text."""

import numpy as np
import pytest

from onevision_edge.errors import OneVisionError
from onevision_edge.report.latency.cells import Cell, default_size, grid, read_size, seeded_ids, seeded_images


def test_a_grid_is_every_combination_once() -> None:
    cells = grid([None, (1036, 728)], [64, 64], [8], [1, 4])
    assert [cell.name for cell in cells] == [
        "no image, 64 tokens, 8 out, batch 1",
        "no image, 64 tokens, 8 out, batch 4",
        "1036x728, 64 tokens, 8 out, batch 1",
        "1036x728, 64 tokens, 8 out, batch 4",
    ]
    assert [cell.images for cell in cells] == [0, 0, 1, 1]


def test_a_cell_survives_plain_data() -> None:
    for cell in (Cell(None, 3, 4), Cell((28, 56), 3, 4, 2)):
        assert Cell.from_dict(cell.to_dict()) == cell


def test_sizes_are_read() -> None:
    assert read_size("1036x728") == (1036, 728)
    assert read_size("none") is None
    for wrong in ("", "12", "x", "0x5", "5x0", "-1x3", "axb", "1x2x3"):
        with pytest.raises(OneVisionError, match="such as 1036x728"):
            read_size(wrong)


@pytest.mark.parametrize(("pixels", "side"), [(1600 * 1600, 448), (153_664, 392), (153_663, 364), (56 * 56, 56)])
def test_the_default_size_is_taken_as_it_is(pixels: int, side: int) -> None:
    assert default_size(pixels, 28) == (side, side)


def test_inputs_are_those_of_their_seed() -> None:
    cell = Cell((40, 30), 7, 1, 3)
    images, ids = seeded_images(cell, 5), seeded_ids(cell, 7, 16, 5, {3, 4})
    assert [(image.shape, image.dtype) for image in images] == [((30, 40, 3), np.dtype(np.uint8))] * 3
    assert ids.shape == (3, 7)
    assert not np.isin(seeded_ids(cell, 500, 16, 5, {3, 4}), [3, 4]).any()
    assert set(seeded_ids(cell, 500, 16, 5, {3, 4}).flat) == set(range(16)) - {3, 4}
    np.testing.assert_array_equal(ids, seeded_ids(cell, 7, 16, 5, {3, 4}))
    np.testing.assert_array_equal(images, seeded_images(cell, 5))
    assert (images[0] != images[1]).any()
    assert (images[0] != seeded_images(cell, 6)[0]).any()
    assert seeded_images(Cell(None, 7, 1), 0) == []

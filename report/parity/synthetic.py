"""Token-level rows of no meaning, for a bundle without a tokenizer: random pixel rows and ids, the same by one seed."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ...calibration.rows import Preparer, Row
from ...config import ModelConfig
from ...runtime.vision import media_tokens

KINDS = ("one image", "several images", "text")  # in turn
SYNTHETIC_ROWS = 12
_IMAGES = {"one image": (1, 1), "several images": (2, 3), "text": (0, 0)}  # fewest and most
_TEXT = (8, 24)  # tokens before the first image, between images and at the end, fewest and most
_UNITS = (2, 5)  # merged units of an image's height and width, fewest and most


@dataclass(frozen=True, slots=True)
class SyntheticRow:
    """One row, made of the seed and its index alone: one image, several images of unlike shapes, or text."""

    index: int
    seed: int

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return KINDS[self.index % len(KINDS)]

    @property
    def name(self) -> str:
        """What messages call it, such as synthetic:3 (one image)."""
        return f"synthetic:{self.index} ({self.kind})"

    @property
    def media(self) -> tuple[str, ...]:
        """Its own name where it shows anything: no other row shows the same."""
        return () if self.kind == "text" else (self.name,)

    def prepare(self, preparer: Preparer) -> Row:
        """Normal pixel rows (a normalised image has mean 0, deviation 1) and ids of ordinary tokens, no answer."""
        config, rng = preparer.config, np.random.default_rng([self.seed, self.index])
        fewest, most = _IMAGES[self.kind]
        units = rng.integers(*_between(_UNITS), (int(rng.integers(fewest, most + 1)), 2))
        grid = np.array([(1, *(config.vision.spatial_merge_size * pair)) for pair in units], np.int64).reshape(-1, 3)
        ids = self._ids(rng, media_tokens(grid, config.vision), ordinary_ids(preparer), config)
        if not len(grid):
            return Row(self.name, ids, len(ids))
        shape = int(np.prod(grid, axis=1).sum()), config.vision.patch_dim
        return Row(self.name, ids, len(ids), rng.standard_normal(shape, np.float32), grid)

    def _ids(
        self, rng: np.random.Generator, counts: Iterable[int], ordinary: np.ndarray, config: ModelConfig
    ) -> np.ndarray:
        """Text, then each image's placeholders with text behind them."""
        parts = [rng.choice(ordinary, rng.integers(*_between(_TEXT)))]
        for count in counts:
            parts += [np.full(count, config.image_token_id), rng.choice(ordinary, rng.integers(*_between(_TEXT)))]
        return np.concatenate(parts).astype(np.int64)


def synthetic_rows(count: int, seed: int) -> list[SyntheticRow]:
    """So many rows, of each kind in turn."""
    return [SyntheticRow(index, seed) for index in range(count)]


def ordinary_ids(preparer: Preparer) -> np.ndarray:
    """Ids that stand for text, int64: those before the first special one, as the family's special ids end its table.

    Without a tokenizer the placeholders, end and padding ids of the config are the special ones that are known. Where
    they come so early that less than half of the vocabulary lies before them, all others are ordinary.
    """
    config, tokenizer = preparer.config, preparer.tokenizer
    special = {config.image_token_id, config.video_token_id, *config.eos_token_ids}
    special |= {config.pad_token_id} if config.pad_token_id is not None else set()
    special |= tokenizer.special_ids if tokenizer else set()
    ids = np.arange(config.text.vocab_size)
    first = min(special)
    return ids[:first] if 2 * first >= len(ids) else ids[~np.isin(ids, list(special))]


def _between(span: tuple[int, int]) -> tuple[int, int]:
    return span[0], span[1] + 1

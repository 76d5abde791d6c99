"""Stitching: text rows from the embedding table, image rows where the placeholder tokens stand."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import TableSpec
from ..errors import OneVisionError
from ..precision import FLOAT_FORMATS, FloatFormat
from .device import DeviceArray, Driver


class EmbeddingTable:
    """Token embeddings in a memory-mapped file: only the rows that are used are read."""

    def __init__(self, path: Path, spec: TableSpec) -> None:
        dtype = next((f.numpy for f in FLOAT_FORMATS.values() if f.onnx == spec.dtype), None)
        if dtype is None or path.stat().st_size != spec.shape[0] * spec.shape[1] * dtype.itemsize:
            raise OneVisionError(f"{path}: is not a table of {list(spec.shape)} {spec.dtype}; export the bundle again")
        # A plain array over the map: a memmap's own indexing takes 50 us more.
        self.values = np.asarray(np.memmap(path, dtype, "r", shape=spec.shape))

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        """Rows of `ids` (int64, any shape), copied out: [*ids.shape, D]."""
        return self.values[ids]


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Refuse ids that have no embedding."""
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)].flat[0]
        raise OneVisionError(f"token id {bad} is outside the vocabulary of {vocab_size}")


def check_counts(ids: np.ndarray, token_id: int, features: int, name: str) -> None:
    """The number of placeholders must be the number of feature rows; the error names both."""
    placeholders = int((ids == token_id).sum())
    if placeholders != features:
        raise OneVisionError(
            f"input_ids hold {placeholders} {name} placeholder tokens (id {token_id}), the {name} inputs give "
            f"{features} embeddings: they must be equal"
        )


def runs(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Start, stop and value of every run of equal values, [n]."""
    edges = np.flatnonzero(np.diff(values)) + 1
    for start, stop in pairwise([0, *edges.tolist(), len(values)] if len(values) else []):
        yield start, stop, int(values[start])


def stitch(table: EmbeddingTable, ids: np.ndarray, features: Mapping[int, np.ndarray]) -> np.ndarray:
    """Embeddings of `ids` (int64 [tokens]) with the rows of `features[id]` in place of each such id, in order.

    Returns [tokens, D] in the table's format.
    """
    embeds = table[ids]
    for token_id, rows in features.items():
        embeds[ids == token_id] = rows
    return embeds


def stitch_on_device(
    driver: Driver, dtype: np.dtype, table: EmbeddingTable, ids: np.ndarray, features: Mapping[int, DeviceArray]
) -> DeviceArray:
    """The same on a device, where the features lie: only text rows are copied there, from pinned memory."""
    width = table.values.shape[1]
    embeds = DeviceArray.empty(driver, (len(ids), width), dtype)
    text = ~np.isin(ids, list(features))
    rows, used = table[ids[text]].reshape(-1).view(np.uint8), 0
    host = driver.pinned(len(rows))
    host[:] = rows
    taken = dict.fromkeys(features, 0)
    for start, stop, token_id in runs(np.where(text, -1, ids)):
        count = stop - start
        if token_id in features:
            embeds[start:stop] = features[token_id][taken[token_id] : taken[token_id] + count]
            taken[token_id] += count
        else:
            nbytes = count * width * dtype.itemsize
            driver.upload(embeds[start:stop].pointer, host[used : used + nbytes])
            used += nbytes
    driver.synchronize()  # the pinned rows go with this call
    return embeds


class OnHost:
    """What graphs share that compute on the host: no limits to a call but memory, and plain arrays."""

    fmt: FloatFormat

    @property
    def tokens_per_call(self) -> int | None:
        """The most tokens of one decoder call: any number."""
        return None

    @property
    def logits_per_call(self) -> int | None:
        """The most rows of logits of one decoder call: any number."""
        return None

    @property
    def rows(self) -> int | None:
        """The most cache rows that a call can read: all."""
        return None

    def check_batch(self, batch: int) -> None:
        """Any number of sequences will do."""

    def valid_length(self, end: int, max_length: int) -> int:
        """Rows to read of a cache whose first `end` are valid."""
        return end

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Memory of floats in the graph's format."""
        return np.empty(shape, self.fmt.numpy)

    def stitch(self, table: EmbeddingTable, ids: np.ndarray, features: Mapping[int, np.ndarray]) -> np.ndarray:
        """Embeddings of `ids`, as stitching.stitch makes them."""
        return stitch(table, ids, features)


class OnDevice:
    """What graphs share that compute on a device: arrays in its memory, and embeddings stitched there."""

    driver: Driver
    fmt: FloatFormat

    def empty(self, shape: tuple[int, ...]) -> Any:
        """Device memory of floats in the graph's format."""
        return DeviceArray.empty(self.driver, shape, self.fmt.numpy)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """Zeroed device memory."""
        return DeviceArray.zeros(self.driver, shape, dtype)

    def stitch(self, table: EmbeddingTable, ids: np.ndarray, features: Mapping[int, Any]) -> Any:
        """Embeddings of `ids` on the device, [tokens, D]: text rows come from the host, the others lie there."""
        return stitch_on_device(self.driver, self.fmt.numpy, table, ids, features)

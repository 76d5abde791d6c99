"""A program: steps over buffers and packed weights, as runtime/cpu_graph.py loads it."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ALIGNMENT = 64  # bytes, a vector's


@dataclass(slots=True)
class Program:
    """What one graph became.

    steps: op and settings by the names of runtime/cpu_library.py. buffers: by name, for each kind of rows (an index of
    the call's counts) the bytes that a row takes. frequencies: of rotary angles; class_angles: those of the row in
    front of each image's. layers: caches that the steps read. bytes_per_row: of weights and scales that one row reads,
    in all products.
    """

    part: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    buffers: dict[str, dict[int, int]] = field(default_factory=dict)
    frequencies: list[float] = field(default_factory=list)
    class_angles: list[float] = field(default_factory=list)
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    layers: int = 0
    bytes_per_row: int = 0

    def need(self, buffer: str, rows: int, nbytes: int) -> None:
        """Make a buffer hold so many bytes for each row of a kind."""
        sizes = self.buffers.setdefault(buffer, {})
        sizes[rows] = max(sizes.get(rows, 0), nbytes)

    def step(self, op: str, **settings: Any) -> None:
        """Append a step."""
        self.steps.append({"op": op, **{name: value for name, value in settings.items() if value is not None}})

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class WeightsFile:
    """Arrays written one after the other, each at a vector's alignment; equal small ones once."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by close
        self._small: dict[bytes, int] = {}

    def add(self, array: np.ndarray) -> int:
        """Where the array begins."""
        data = np.ascontiguousarray(array)
        key = data.tobytes() if data.nbytes <= 1 << 16 else None
        if key is not None and key in self._small:
            return self._small[key]
        padding = -self.size % ALIGNMENT
        self._file.write(bytes(padding))
        start = self.size + padding
        self._file.write(data.reshape(-1).view(np.uint8).data)
        self.size = start + data.nbytes
        if key is not None:
            self._small[key] = start
        return start

    def close(self) -> None:
        """Pad to whole vectors, so that the kernels may read ahead, and close."""
        self._file.write(bytes(2 * ALIGNMENT))
        self.size += 2 * ALIGNMENT
        self._file.close()

    def discard(self) -> None:
        """Close without the rest."""
        with suppress(OSError):
            self._file.close()

"""What was made of images that were seen before: patches of their files' bytes, embeddings of their pixels."""

import hashlib
import threading
from collections import OrderedDict
from typing import Any

import numpy as np


def image_digest(pixel_rows: np.ndarray, size: tuple[int, int]) -> bytes:
    """16 bytes that tell an image by its pixel rows, in the graph's format, and its size in patches.

    1 megapixel in float32, 12 MB: 10 ms.
    """
    digest = hashlib.sha256(repr(size).encode())
    digest.update(np.ascontiguousarray(pixel_rows).reshape(-1).view(np.uint8).data)
    return digest.digest()[:16]


class ImageCache:
    """Arrays by digest, those that were wanted last, as many as fit `budget` bytes, wherever they lie."""

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._lock = threading.Lock()
        self._rows: OrderedDict[bytes, Any] = OrderedDict()  # the one wanted last at the end

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, digest: bytes) -> Any:
        """The array, or None."""
        with self._lock:
            if digest in self._rows:
                self._rows.move_to_end(digest)
            return self._rows.get(digest)

    def put(self, digest: bytes, rows: Any) -> None:
        """Keep an array, which nobody changes from now on, in the place of those that were not wanted for longest."""
        if rows.nbytes > self.budget:
            return
        with self._lock:
            known = self._rows.pop(digest, None)
            self.nbytes += rows.nbytes - (known.nbytes if known is not None else 0)
            self._rows[digest] = rows
            while self.nbytes > self.budget:
                self.nbytes -= self._rows.popitem(last=False)[1].nbytes

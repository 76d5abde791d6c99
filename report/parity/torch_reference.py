"""The PyTorch reference as a side of a comparison, beside the FP32 graphs whose tower it borrows where it has none."""

import gc
from typing import Any

import numpy as np

from ...calibration.rows import Row
from .probe import LOGITS, MERGER, PREPROCESS, Probe
from .sides import BundleSide, pixel_rows
from .transformers_side import TransformersSide, open_transformers


class TorchReference:
    """A checkpoint in PyTorch. Without the checkpoint's own tower, image embeddings are the FP32 graphs'."""

    can_be_fed = True

    def __init__(
        self, source: str, graphs: BundleSide, *, trust_remote_code: bool, threads: int | None, dtype: str = "fp32"
    ) -> None:
        self._source, self._graphs = source, graphs
        self._options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "threads": threads}
        self._side: TransformersSide | None = None
        self._side = open_transformers(source, encode=graphs.encode, dtype=dtype, **self._options)
        self.subject, self.config, self.preparer = self._side.subject, self._side.config, graphs.preparer

    @property
    def side(self) -> TransformersSide:
        """The modules, which `close` lets go."""
        assert self._side is not None
        return self._side

    def trace(self, row: Row, probe: Probe, positions: np.ndarray) -> None:
        """The whole row at once: PyTorch keeps no cache here."""
        self._trace(row, probe)
        probe.after(LOGITS, self.side.logits(row, positions))

    def trace_fed(self, row: Row, probe: Probe, positions: np.ndarray, image_embeds: np.ndarray | None) -> None:
        """The same where the probe gives what each stage is to read; without logits."""
        self._trace(row, probe)

    def _trace(self, row: Row, probe: Probe) -> None:
        rows = pixel_rows(row)
        if rows is not None:
            probe.after(PREPROCESS, rows)
            if self.side.tower is None:
                probe.after(MERGER, self._graphs.encode(row))
        self.side.trace(row, probe)

    def logits(self, row: Row, positions: np.ndarray) -> np.ndarray:
        """Next-token logits: float32 [n, vocab]."""
        return self.side.logits(row, positions)

    def generate(self, row: Row, max_tokens: int) -> list[int]:
        """New ids after the prompt, greedily, without the end token."""
        return self.side.generate(row, max_tokens)

    def floor(self) -> "TorchReference":
        """The same in BF16; the modules of this one are let go meanwhile."""
        self.close()
        return TorchReference(self._source, self._graphs, dtype="bf16", **self._options)

    def close(self) -> None:
        """Let go of the modules."""
        self._side = None
        gc.collect()

"""The compiled kernels of runtime/native by ctypes: the structures of step.h, and a pool of threads that runs steps."""

import ctypes
import threading
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OneVisionError

# As step.h numbers them.
OPS = ("rows", "product", "heads", "attention", "gather", "prepend")
KINDS = ("int8", "bf16", "fp32")
WEIGHTS = ("codes4", "codes8", "pairs", "floats")
PROLOGUES = ("as_is", "rms_norm", "layer_norm", "swiglu")
EPILOGUES = ("write", "add", "gated", "gelu", "gelu_tanh", "quick_gelu")
# Buffers that the kernels know by number; a program's own follow.
BUFFERS = ("units", "scales", "sums", "queries", "query_scales", "query_sums")
UNIT_VALUES = {"int8": 4, "bf16": 2, "fp32": 1}  # of a row in the four bytes of a unit
PANEL, LANES = 32, 16  # columns of packed weights together, and in a vector
MOST_WIDTH = 256  # of a head, which is a multiple of a vector's


class Step(ctypes.Structure):
    """One step of a program; see step.h."""

    _fields_ = [
        *((name, c_int32) for name in ("op", "rows", "in_", "out", "kind", "weights", "prologue", "epilogue")),
        *((name, c_int32) for name in ("n", "k", "group", "stride", "column", "skip_first")),
        *((name, c_int32) for name in ("heads", "kv_heads", "head_dim", "layer", "causal")),
        ("eps", c_float),
        ("scale", c_float),
        *((name, c_int64) for name in ("w", "s", "b")),
    ]


class Call(ctypes.Structure):
    """What one run of a program works on; see step.h."""

    _fields_ = [
        ("counts", c_int64 * 4),
        ("sequences", c_int64),
        ("tokens", c_int64),
        *((name, c_void_p) for name in ("starts", "indices", "cosines", "sines", "file", "buffers", "keys", "values")),
        ("capacity", c_int64),
    ]


class Library:
    """A compiled library, loaded. Raises OneVisionError where it is not one of this version."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            sizes = (c_int32 * 2)()
            self._library.ove_sizes(sizes)
        except (OSError, AttributeError) as error:
            raise OneVisionError(f"{path} is not a library of kernels that loads here: {error}") from error
        if list(sizes) != [ctypes.sizeof(Step), ctypes.sizeof(Call)]:
            raise OneVisionError(f"{path} belongs to another version of onevision-edge: build the cpu engine again")
        self._library.ove_create.restype = c_void_p
        self._library.ove_create.argtypes = [c_int32]
        self._library.ove_destroy.argtypes = [c_void_p]
        self._library.ove_run.restype = c_int32
        self._library.ove_run.argtypes = [c_void_p, POINTER(Step), c_int32, POINTER(Call), POINTER(c_double)]

    def pool(self, threads: int) -> "Pool":
        """Threads to run steps on. Raises OneVisionError."""
        handle = self._library.ove_create(threads)
        if not handle:
            raise OneVisionError(f"{threads} threads cannot be started")
        return Pool(self._library, handle)


class Pool:
    """Threads that sleep between calls. lock: held by whoever runs a program on them, in buffers that it keeps."""

    def __init__(self, library: Any, handle: int) -> None:
        self.lock = threading.Lock()
        self._library = library
        self._handle: int | None = handle

    def run(self, steps: Any, count: int, call: Call, seconds: Any = None) -> None:
        """Run steps (an array of Step) one after the other. seconds: an array of c_double to add times to."""
        if self._library.ove_run(self._handle, steps, count, ctypes.byref(call), seconds):
            raise OneVisionError("there is not enough memory for this call")

    def __del__(self) -> None:
        if self._handle:
            self._library.ove_destroy(self._handle)
            self._handle = None


def pointers(arrays: Sequence[np.ndarray]) -> Any:
    """Addresses of arrays, as the kernels take them."""
    return (c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))

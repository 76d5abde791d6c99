"""Memory that a backend computes in: arrays that stay there, and what moves bytes to them and back.

A driver is CUDA's (cuda.py) or, for engines that are interpreted, the host's own memory (HostDriver). Work is queued
on its one stream, in order; nothing waits but `synchronize`.
"""

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from ..errors import OneVisionError

ALIGNMENT = 256  # bytes; what TensorRT asks of an address, and what CUDA's allocations have


class Driver(Protocol):
    """What owns a device's memory and its stream. Pointers are integers, counts are bytes."""

    stream: int

    def allocate(self, nbytes: int) -> int:
        """Memory aligned to 256 bytes. Raises OneVisionError where there is not enough."""

    def free(self, pointer: int) -> None:
        """Give memory back."""

    def pinned(self, nbytes: int) -> np.ndarray:
        """Host memory, uint8 [nbytes], that the device can copy from and to while the host goes on."""

    def upload(self, pointer: int, source: np.ndarray) -> None:
        """Copy a contiguous array that was made by `pinned` to the device."""

    def download(self, target: np.ndarray, pointer: int) -> None:
        """Copy from the device to a contiguous array that was made by `pinned`."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the device."""

    def zero(self, pointer: int, nbytes: int) -> None:
        """Fill with zeros."""

    def synchronize(self) -> None:
        """Wait until everything that was queued is done."""

    def mark(self) -> Any:
        """Queue a mark in time."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks that have passed."""

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None] | None:
        """What replays the work that `enqueue` queues, itself queued once by it; None where that cannot be done."""


class Allocation:
    """Memory of a driver, given back when nothing refers to it any more."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.driver, self.nbytes = driver, nbytes
        self.pointer = driver.allocate(max(nbytes, 1))

    def __del__(self) -> None:
        pointer = getattr(self, "pointer", None)
        if pointer is not None:
            self.driver.free(pointer)


@dataclass(frozen=True, slots=True)
class Borrowed:
    """Memory on a device that something else owns, and gives back."""

    driver: Driver
    pointer: int
    owner: Any


class DeviceArray:
    """A contiguous array on a device. Its first axis can be sliced, without a copy, and assigned to."""

    def __init__(self, allocation: Allocation | Borrowed, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.allocation, self.offset, self.shape, self.dtype = allocation, offset, shape, np.dtype(dtype)

    @classmethod
    def empty(cls, driver: Driver, shape: tuple[int, ...], dtype: np.dtype) -> "DeviceArray":
        """New memory with anything in it. Raises OneVisionError where there is not enough."""
        dtype = np.dtype(dtype)
        return cls(Allocation(driver, math.prod(shape) * dtype.itemsize), 0, tuple(shape), dtype)

    @classmethod
    def zeros(cls, driver: Driver, shape: tuple[int, ...], dtype: np.dtype) -> "DeviceArray":
        """New memory, zeroed."""
        array = cls.empty(driver, shape, dtype)
        driver.zero(array.pointer, array.nbytes)
        return array

    @property
    def driver(self) -> Driver:
        """Whose memory it is."""
        return self.allocation.driver

    @property
    def pointer(self) -> int:
        """Its address on the device."""
        return self.allocation.pointer + self.offset

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | int) -> "DeviceArray":
        """Rows start..stop of the first axis, or one of them, where they lie."""
        if isinstance(rows, int):
            return self[rows : rows + 1].reshape(self.shape[1:])
        start, stop, step = rows.indices(len(self))
        assert step == 1, "rows of a device array are consecutive"
        stride = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (max(stop - start, 0), *self.shape[1:])
        return DeviceArray(self.allocation, self.offset + start * stride, shape, self.dtype)

    def __setitem__(self, rows: slice, values: "DeviceArray") -> None:
        target = self[rows]
        assert (target.shape, target.dtype) == (values.shape, values.dtype)
        self.driver.copy(target.pointer, values.pointer, values.nbytes)

    def __iter__(self) -> Iterator["DeviceArray"]:
        return (self[i] for i in range(len(self)))

    def reshape(self, shape: tuple[int, ...]) -> "DeviceArray":
        """The same memory under another shape."""
        assert math.prod(shape) == math.prod(self.shape)
        return DeviceArray(self.allocation, self.offset, tuple(shape), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """A copy on the host; waits for what is queued."""
        host = self.driver.pinned(self.nbytes)
        self.driver.download(host, self.pointer)
        self.driver.synchronize()
        found = host.view(self.dtype).reshape(self.shape).copy()
        return found if dtype is None else found.astype(dtype)


class Staging:
    """Pinned host memory and device memory of one tensor, grown as needed and kept."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._host = np.empty(0, np.uint8)
        self._device: Allocation | None = None

    def upload(self, values: np.ndarray) -> int:
        """Queue a copy of the values to the device; its address there, which stays the same while they fit."""
        host = self.host(values.nbytes)
        host[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        pointer = self.device(values.nbytes)
        self.driver.upload(pointer, host)
        return pointer

    def device(self, nbytes: int) -> int:
        """The address of so many bytes on the device."""
        if self._device is None or self._device.nbytes < nbytes:
            self._device = Allocation(self.driver, nbytes)
        return self._device.pointer

    def host(self, nbytes: int) -> np.ndarray:
        """So many bytes of pinned memory: uint8 [nbytes]."""
        if len(self._host) < nbytes:
            self._host = self.driver.pinned(nbytes)
        return self._host[:nbytes]


class HostDriver:
    """The host's memory as the device, for engines that are interpreted there. Everything is done at once."""

    stream = 0

    def __init__(self) -> None:
        self._buffers: dict[int, np.ndarray] = {}

    def allocate(self, nbytes: int) -> int:
        """Zeroed pages, aligned to 256 bytes."""
        try:
            buffer = np.zeros(nbytes + ALIGNMENT, np.uint8)
        except MemoryError as error:
            raise OneVisionError(f"out of memory: {nbytes} bytes more were wanted") from error
        pointer = -(-buffer.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._buffers[pointer] = buffer
        return pointer

    def free(self, pointer: int) -> None:
        """Give memory back."""
        del self._buffers[pointer]

    def pinned(self, nbytes: int) -> np.ndarray:
        """Any host memory will do."""
        return np.empty(nbytes, np.uint8)

    def upload(self, pointer: int, source: np.ndarray) -> None:
        """Copy to it."""
        ctypes.memmove(pointer, source.ctypes.data, source.nbytes)

    def download(self, target: np.ndarray, pointer: int) -> None:
        """Copy from it."""
        ctypes.memmove(target.ctypes.data, pointer, target.nbytes)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within it."""
        ctypes.memmove(target, source, nbytes)

    def zero(self, pointer: int, nbytes: int) -> None:
        """Fill with zeros."""
        ctypes.memset(pointer, 0, nbytes)

    def synchronize(self) -> None:
        """Nothing is ever queued."""

    def mark(self) -> float:
        """The time."""
        return perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Between two of them."""
        return end - start

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None] | None:
        """There are no graphs here."""
        return None

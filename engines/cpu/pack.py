"""Matrices as the kernels of runtime/native read them.

A panel holds 32 columns (outputs). A unit of it is four bytes of each column: four codes, two BF16 values or one float,
for consecutive inputs; 16 columns make a vector. Columns are padded with zeros to whole panels.
"""

import numpy as np

from ...runtime.cpu_library import LANES, PANEL


def padded(values: np.ndarray, columns: int, fill: float = 0) -> np.ndarray:
    """An array whose last axis is filled up to so many columns."""
    missing = columns - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], constant_values=fill) if missing else values


def whole_panels(columns: int) -> int:
    """Columns, rounded up to panels."""
    return -(-columns // PANEL) * PANEL


def _units(matrix: np.ndarray, each: int) -> np.ndarray:
    """[in, out] -> [panels, units, PANEL, each]."""
    inputs, outputs = matrix.shape
    return matrix.reshape(inputs // each, each, outputs // PANEL, PANEL).transpose(2, 0, 3, 1)


def pack_int8(codes: np.ndarray) -> np.ndarray:
    """int8 [in, out] -> uint8 [panels, in / 4, PANEL, 4], 128 added. `in` is a multiple of 4."""
    offset = codes.view(np.uint8) ^ np.uint8(0x80)
    return np.ascontiguousarray(_units(padded(offset, whole_panels(codes.shape[1]), 128), 4))


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Integers -8..7 [in, out] -> uint8 [panels, in / 8, PANEL, 4], 8 added: even units in low nibbles, odd in high.

    `in` is a multiple of 8.
    """
    offset = (codes.astype(np.int8, copy=False) + np.int8(8)).view(np.uint8)
    units = _units(padded(offset, whole_panels(codes.shape[1]), 8), 4)
    return np.ascontiguousarray(units[:, 0::2] | (units[:, 1::2] << np.uint8(4)))


def pack_scales(scales: np.ndarray) -> np.ndarray:
    """[groups, out] -> float32 [panels, groups, PANEL]."""
    groups, outputs = scales.shape
    wide = padded(scales.astype(np.float32, copy=False), whole_panels(outputs))
    return np.ascontiguousarray(wide.reshape(groups, -1, PANEL).transpose(1, 0, 2))


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16, rounded half to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def pack_bf16(matrix: np.ndarray) -> np.ndarray:
    """float32 [in, out] -> uint16 [panels, ceil(in / 2), PANEL, 2]."""
    bits = bf16_bits(padded(matrix, whole_panels(matrix.shape[1])))
    even = bits if bits.shape[0] % 2 == 0 else np.vstack([bits, np.zeros((1, bits.shape[1]), np.uint16)])
    return np.ascontiguousarray(_units(even, 2))


def pack_fp32(matrix: np.ndarray) -> np.ndarray:
    """float32 [in, out] -> float32 [panels, in, PANEL]."""
    wide = padded(matrix.astype(np.float32, copy=False), whole_panels(matrix.shape[1]))
    return np.ascontiguousarray(_units(wide, 1)[..., 0])


def gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Columns of two matrices [..., out] in turn, sixteen of each: [..., 2 * out padded to sixteens]."""
    columns = -(-gate.shape[-1] // LANES) * LANES
    pair = [padded(m, columns).reshape(*m.shape[:-1], columns // LANES, LANES) for m in (gate, up)]
    return np.stack(pair, axis=-2).reshape(*gate.shape[:-1], 2 * columns)

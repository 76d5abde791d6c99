"""The scale on an activation's channels with the least error of the products that read it, among candidates."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..export.layers import ACTIVATION_CODES
from ..precision import FP32
from ..precision.codes import Codes, round_to_codes
from ..precision.formats import FORMATS, quantize
from ..precision.plan import Precision
from ..precision.scales import symmetric

Found = tuple[float | None, np.ndarray]  # a strength, None where nothing is scaled, and its scale [in]


@dataclass(frozen=True, slots=True)
class Product:
    """A Linear as the search sees it: its precision and some of its columns, float32 [in, n]."""

    precision: Precision
    weights: np.ndarray


def search(
    x: np.ndarray,
    absmax: np.ndarray,
    products: Sequence[Product],
    candidates: Iterable[tuple[float, np.ndarray]],
    gain: float,
    start: Found | None = None,
) -> Found:
    """The best candidate and its strength; None and ones where no candidate is better than to leave all as it is.

    x: rows of the activation, float32 [n, in]. absmax: of its channels, over all rows there were, [in].
    candidates: (strength, scale [in]). gain: the share of the error that a candidate must save. start: what
    an earlier search found, which is kept, and must be improved upon, in place of None and ones.
    """
    exact = [x @ product.weights for product in products]
    best_strength, best = start or (None, np.ones(x.shape[1], np.float32))
    least = error(x, absmax, products, exact, best) * (1 - gain)
    for strength, scale in candidates:
        found = error(x, absmax, products, exact, scale)
        if found < least:
            best_strength, best, least = strength, scale, found
    return best_strength, best


def error(
    x: np.ndarray, absmax: np.ndarray, products: Sequence[Product], exact: Sequence[np.ndarray], scale: np.ndarray
) -> float:
    """Sum over products of the squared error of each relative to its square, with x / scale and scale * weights."""
    scaled = x / scale
    largest = float((absmax / scale).max(initial=0))
    rounded: dict[str | None, np.ndarray] = {None: scaled}
    total = 0.0
    for product, wanted in zip(products, exact, strict=True):
        codes = product.precision.activation
        if codes not in rounded:
            rounded[codes] = fake_quantize(scaled, largest, ACTIVATION_CODES[str(codes)])
        weights = product.weights * scale[:, None]
        if product.precision.format is not None:
            weights = quantize(weights, FORMATS[product.precision.format]).dequantize()
        difference = rounded[codes] @ weights - wanted
        total += float(np.vdot(difference, difference)) / max(float(np.vdot(wanted, wanted)), 1e-30)
    return total


def fake_quantize(x: np.ndarray, largest: float, codes: Codes) -> np.ndarray:
    """x as symmetric codes hold it whose extremes stand for +-largest, in float32."""
    step = np.float32(symmetric(largest, codes, FP32))
    rounded = x / step
    round_to_codes(rounded, codes, np.empty_like(rounded))
    return rounded * step

"""SmoothQuant: outliers of activations moved into the weights, where each output channel has a scale of its own.

Source: Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", equation 4: s_j = max|x_j|^a / max|w_j|^(1-a), activations divided and weights multiplied by it. The
migration strength a is searched for each activation here, not one for the model.
"""

from collections.abc import Iterator

import numpy as np

GAIN = 0.01  # of the error, that a strength must save: less is the sample's noise
STRENGTHS = tuple(np.round(np.linspace(0, 1, 21), 3).tolist())


def candidates(activations: np.ndarray, weights: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """(a, s) for each strength, from the largest magnitude of each channel and of its row of weights, [channels]."""
    seen = (activations > 0) & (weights > 0)
    x, w = np.where(seen, activations, 1).astype(np.float64), np.where(seen, weights, 1).astype(np.float64)
    for strength in STRENGTHS:
        yield strength, normalized(x**strength / w ** (1 - strength), seen)


def normalized(scale: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Scales with a geometric mean of 1, and exactly 1 for channels never seen: float32."""
    logs = np.log(scale)
    center = logs[seen].mean() if seen.any() else 0.0
    return np.where(seen, np.exp(logs - center), 1).astype(np.float32)

"""AWQ: weights that meet large activations made larger, so that rounding loses less of them.

Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", equations
4 and 5: s = mean|x|^a with a searched in [0, 1] for the least error of the product. The clip search that follows
it there is clipping.py.

Weights that are small where activations are large, as after a normalisation with a few large weights, are lost beside
their block's others whatever a is: there an s is wanted that makes up for both, mean|x|^a / mean|w|^(1-a), the form
of SmoothQuant's equation 4. It finds the same products whatever channels were multiplied by before.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from . import smoothquant

# Of the error, that an exponent must save. Where it saves less, GPTQ does better with the weights as they are: with
# any gain taken, the shipped model's INT4 bundle has a KLD of 4.1e-4; from 10 % on, 2.0e-4; with none, 2.2e-4.
GAIN = 0.1
# And of the error that is left, that scales by weights must save: 25 to 66 % where a normalisation makes outliers
# (benchmarks/outliers.py), and on the shipped model as it is nowhere so much that its INT4 bundle changes.
BALANCE_GAIN = 0.2
EXPONENTS = tuple(np.round(np.linspace(0, 1, 21), 3).tolist())


def candidates(magnitude: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """(a, s) for each exponent, of the mean magnitude of each channel's activations, [channels]."""
    seen = magnitude > 0
    base = np.where(seen, magnitude, 1).astype(np.float64)
    for exponent in EXPONENTS:
        yield exponent, smoothquant.normalized(base**exponent, seen)


def balanced(magnitude: np.ndarray, rows: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """(a, s) for every other strength, from the mean magnitudes of activations and of rows of weights, [channels]."""
    return islice(smoothquant.candidates(magnitude, rows), 0, None, 2)

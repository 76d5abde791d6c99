"""Bias correction: the mean error that rounding leaves in a product's outputs, taken out of its bias.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2,
with the mean taken over calibration data. Of the model, only the vision tower's Linears have biases.
"""

import numpy as np


def corrected(bias: np.ndarray, error: np.ndarray) -> np.ndarray:
    """The bias [out] under which errors [rows, out] (quantised minus exact) have a mean of zero."""
    return (bias - error.mean(axis=0, dtype=np.float64)).astype(np.float32)

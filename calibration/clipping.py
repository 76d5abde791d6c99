"""Scales by the error of the product: the clip search of AWQ.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration". A block of weights
adds one term to its output. With d the rounding errors of the block and G the Gram matrix of its inputs, the sum of
x x^T, those terms change by d^T G d, summed over the inputs. Of the scales that a search for the least squared error
tries, the one is taken that makes this least; what the blocks of one output do to each other is left to gptq.py.
"""

import numpy as np

from ..errors import OneVisionError
from ..precision import FloatFormat
from ..precision.formats import Format, Scale, choose_scale


def clip_scales(
    weights: np.ndarray, format: Format, fmt: FloatFormat, gram_blocks: np.ndarray, name: str = "weights"
) -> Scale:
    """The scales of a matrix [in, out] (FP32, FP16 or BF16) in blocks with the least d^T G d.

    gram_blocks: [in / block, block, block], those on the diagonal of the Gram matrix. One of zeros, whose
    inputs were never seen, counts every error alike. No block is worse off than with the scale that clips
    nothing, and takes another only where that gains 1e-4 of the error. Raises OneVisionError as `quantize`
    does, for a format without blocks, and for NaN and infinity in a Gram matrix.
    """
    if not format.block:
        raise OneVisionError(
            f"{name}: {format.name} has no blocks to search clips for by Gram matrices; "
            "search its scales by the importance of each input"
        )
    shape = (weights.shape[0] // format.rows(weights.shape[0], name), format.block, format.block)
    assert gram_blocks.shape == shape, f"{name}: Gram matrices {gram_blocks.shape}, not {shape}"
    if not np.isfinite(gram_blocks).all():
        raise OneVisionError(f"a Gram matrix of the inputs of {name} holds NaN or infinity: activations overflowed")
    return choose_scale(weights, format, fmt, search_scales=True, importance=gram_blocks, name=name)

"""A start from which the tower learns quickly: attention that looks at neighbouring patches, whitened patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch_model import VisionTower

OFFSETS = ((-0.8, -0.8), (-0.8, 0.8), (0.8, -0.8), (0.8, 0.8))  # (rows, columns) a head looks away, in patches
PEAK = (1.5, 3.0)  # score lost by the two fastest rotary frequencies, per unit of 1 - cos(distance)


@torch.no_grad()
def look_nearby(tower: VisionTower) -> None:
    """Set the q and k biases so that, after the rotary embedding, each head's scores peak at its offset.

    A q bias turned by -offset against an equal k bias scores sum_k PEAK_k cos(frequency_k * (distance - offset)).
    """
    for block in tower.blocks:
        hidden = block.attn.proj.in_features
        q, k, _ = block.attn.qkv.bias.view(3, block.attn.heads, -1)
        for head in range(block.attn.heads):
            _set_peak(q[head], k[head], OFFSETS[head % len(OFFSETS)], tower.inverse_frequencies)
        block.attn.qkv.weight[: 2 * hidden] *= 0.3


def _set_peak(q: Tensor, k: Tensor, offset: tuple[float, float], frequencies: Tensor) -> None:
    half, quarter = len(q) // 2, len(q) // 4
    for axis, away in enumerate(offset):
        for i, peak in enumerate(PEAK):
            size = math.sqrt(peak * math.sqrt(len(q)))
            at, angle = axis * quarter + i, float(frequencies[i]) * away
            k[at] = size
            q[at], q[at + half] = size * math.cos(angle), size * math.sin(angle)


@torch.no_grad()
def whiten(tower: VisionTower, rows: Tensor, floor: float = 0.3) -> None:
    """Patch filters = principal components of training patches [N, 588], scaled to even power."""
    values, vectors = torch.linalg.eigh((rows.T @ rows / len(rows)).double())
    weight = tower.patch_embed.proj.weight
    top = vectors.flip(1)[:, : len(weight)] / (values.flip(0)[: len(weight)] + floor).sqrt()
    weight.copy_(top.T.reshape(weight.shape))

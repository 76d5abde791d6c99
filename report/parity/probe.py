"""Looking into a model while it runs: what passes from stage to stage.

Stages, in order: preprocess, patch_embed, vision.blocks.N, merger, stitched_embeddings, decoder.layers.N, logits, and
tokens. Between patch_embed and the last of the blocks, an image of n patches (or a frame) is a stream of n + 1 rows,
its class token first; from stitched_embeddings on, a row is a token. All rows are float32.
"""

from typing import Protocol

import numpy as np

PREPROCESS, PATCH_EMBED, MERGER, STITCHED = "preprocess", "patch_embed", "merger", "stitched_embeddings"
LOGITS, TOKENS = "logits", "tokens"


def block_stage(index: int) -> str:
    """The name of a block of the tower."""
    return f"vision.blocks.{index}"


def layer_stage(index: int) -> str:
    """The name of a layer of the decoder."""
    return f"decoder.layers.{index}"


def model_stages(vision_depth: int, layers: int) -> list[str]:
    """The stages of a model, each of which reads what the one before gives."""
    blocks, own = map(block_stage, range(vision_depth)), map(layer_stage, range(layers))
    return [PREPROCESS, PATCH_EMBED, *blocks, MERGER, STITCHED, *own, LOGITS]


def stage_rank(stage: str) -> tuple[int, int]:
    """What stages are sorted by, to stand in the model's order."""
    name, _, index = stage.rpartition(".")
    kinds = [PREPROCESS, PATCH_EMBED, "vision.blocks", MERGER, STITCHED, "decoder.layers", LOGITS, TOKENS]
    return (kinds.index(name), int(index)) if index.isdecimal() else (kinds.index(stage), 0)


class Probe(Protocol):
    """What a model that can be looked into tells. One image (or frame) at a time, then one sequence.

    A stage may come in several pieces, whose rows follow one another: chunks of a prompt, then single tokens.
    """

    def before(self, stage: str, rows: np.ndarray) -> np.ndarray:
        """What a stage is about to read, [n, width]: the same, or what it is to read instead."""

    def after(self, stage: str, rows: np.ndarray) -> None:
        """What a stage gave, [n, width]."""

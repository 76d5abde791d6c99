"""Where a scale on an activation's channels can be taken up by what makes the activation.

Dividing channel j of x by s[j] and multiplying row j of every matrix that reads x leaves all products as they are.
The division costs nothing where x comes straight from a normalisation's weights (and bias), or where it is linear
in a Linear's outputs: attention averages values, and the gate multiplies `up_proj`. Behind a GELU it has no place.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass

import numpy as np

from ..config import ModelConfig
from .stages import BLOCK, LAYER, MERGER, Kind

HEAD = "lm_head"  # the stage that no graph is needed for: the last normalisation and the product with the vocabulary


@dataclass(frozen=True, slots=True)
class Fold:
    """The normalisation or Linear that makes an activation, and which of its outputs.

    first: the output that is channel 0. ties: for each channel of the activation its output, counted from
    `first`; channels that come from one output must have one scale.
    """

    source: str
    first: int
    ties: np.ndarray

    @property
    def outputs(self) -> int:
        """How many outputs of the source there are."""
        return int(self.ties.max()) + 1

    def tied(self, channels: np.ndarray) -> np.ndarray:
        """The largest value of the channels of each output: [channels] -> [outputs]."""
        largest = np.zeros(self.outputs, channels.dtype)
        np.maximum.at(largest, self.ties, channels)
        return largest

    def apply(self, scale: np.ndarray, weights: MutableMapping[str, np.ndarray]) -> None:
        """Divide the source's outputs by scale [outputs], in `weights` by their names; arrays are replaced."""
        place = slice(self.first, self.first + self.outputs)
        for name in (f"{self.source}.weight", f"{self.source}.bias"):
            if name in weights:
                values = weights[name].copy()
                values[..., place] /= scale
                weights[name] = values


def folds(kind: Kind, config: ModelConfig) -> dict[str, Fold]:
    """The folds of a stage, by the tap they act on (names as in the stage's graph)."""
    v, t = config.vision, config.text
    if kind is BLOCK:
        block = kind.path.format(0)
        return {
            f"{block}.attn.qkv": _whole(f"{block}.norm1", v.hidden_size),
            f"{block}.attn.proj": Fold(f"{block}.attn.qkv", 2 * v.hidden_size, np.arange(v.hidden_size)),
            f"{block}.mlp.fc1": _whole(f"{block}.norm2", v.hidden_size),
        }
    if kind is MERGER:
        return {"visual.merger.mlp.0": Fold("visual.merger.ln_q", 0, np.tile(np.arange(v.hidden_size), v.merge_unit))}
    if kind is LAYER:
        layer = kind.path.format(0)
        heads = np.arange(t.num_attention_heads) // (t.num_attention_heads // t.num_key_value_heads)
        values = (heads[:, None] * t.head_dim + np.arange(t.head_dim)).reshape(-1)
        return {
            f"{layer}.self_attn.q_proj": _whole(f"{layer}.input_layernorm", t.hidden_size),
            f"{layer}.self_attn.o_proj": Fold(f"{layer}.self_attn.v_proj", 0, values),
            f"{layer}.mlp.gate_proj": _whole(f"{layer}.post_attention_layernorm", t.hidden_size),
            f"{layer}.mlp.down_proj": _whole(f"{layer}.mlp.up_proj", t.intermediate_size),
        }
    return {}


def _whole(source: str, channels: int) -> Fold:
    return Fold(source, 0, np.arange(channels))

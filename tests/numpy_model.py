"""The model written down in numpy, in float64, from its definition: what graphs and stages are compared with."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from onevision_edge.config import ModelConfig

Rounding = Callable[[str, np.ndarray], np.ndarray]


def stored(name: str, values: np.ndarray) -> np.ndarray:
    """A checkpoint's tensor as the graphs store it: matrices [in, out], a convolution's kernel flattened."""
    matrix = values.ndim > 1 and name.endswith("weight")
    return np.ascontiguousarray(values.reshape(len(values), -1).T) if matrix else values


class NumpyModel:
    """tensors: by the checkpoint's names, matrices [in, out]. taps: what every Linear read last, by its path.

    rounding: applied to what a Linear reads (by its path), and to keys and values (model.layers.0.self_attn.k, .v).
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, np.ndarray], rounding: Rounding = lambda path, x: x
    ) -> None:
        self.config, self.rounding = config, rounding
        self.w = {name: values.astype(np.float64) for name, values in tensors.items()}
        self.taps: dict[str, np.ndarray] = {}

    def logits(self, ids: np.ndarray, images: np.ndarray | None = None) -> np.ndarray:
        """[tokens] and the embeddings of all image tokens -> [tokens, vocab]."""
        x = self.w["model.embed_tokens.weight"].T[ids]
        if images is not None:
            x[ids == self.config.image_token_id] = images
        for i in range(self.config.text.num_hidden_layers):
            x = self.layer(i, x)
        return self.linear("lm_head", self.rms_norm("model.norm", x))

    def tower(self, pixels: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Pixel rows [patches, patch_dim] of one image -> [tokens, D]."""
        x, angles = self.stem(pixels, positions)
        for i in range(self.config.vision.depth):
            x = self.block(i, x, angles)
        return self.merger(x)

    def layer(self, index: int, x: np.ndarray) -> np.ndarray:
        """A decoder layer over a whole prompt [tokens, D]."""
        c, at = self.config.text, f"model.layers.{index}"
        normed = self.rms_norm(f"{at}.input_layernorm", x)
        q, k, v = (self.linear(f"{at}.self_attn.{name}_proj", normed).reshape(len(x), -1, c.head_dim) for name in "qkv")
        angles = np.arange(len(x))[:, None] * c.rope_theta ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
        q = rotated(self.rms_norm(f"{at}.self_attn.q_norm", q), angles)
        k = rotated(self.rms_norm(f"{at}.self_attn.k_norm", k), angles)
        self.taps[f"{at}.self_attn.k"], self.taps[f"{at}.self_attn.v"] = k, v
        k, v = self.rounding(f"{at}.self_attn.k", k), self.rounding(f"{at}.self_attn.v", v)
        x = x + self.linear(f"{at}.self_attn.o_proj", attended(q, k, v, causal=True))
        normed = self.rms_norm(f"{at}.post_attention_layernorm", x)
        gate, up = (self.linear(f"{at}.mlp.{name}_proj", normed) for name in ("gate", "up"))
        return x + self.linear(f"{at}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)

    def stem(self, pixels: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows, class token first, and their angles [rows, head_dim / 2]: the patch's row, then its column."""
        half = self.config.vision.head_dim // 2
        patches = self.linear("visual.patch_embed.proj", pixels)
        x = np.concatenate([self.w["visual.class_embedding"][None], patches])
        angles = (positions[:, :, None] * 10000.0 ** -(np.arange(0, half, 2) / half)).reshape(-1, half)
        angles = np.concatenate([self.w["visual.class_pos_emb"], angles])
        return self.layer_norm("visual.pre_layernorm", x, self.config.vision.layer_norm_eps), angles

    def block(self, index: int, x: np.ndarray, angles: np.ndarray) -> np.ndarray:
        """A block of the tower over one image's rows."""
        at, c = f"visual.blocks.{index}", self.config.vision
        parts = np.split(self.linear(f"{at}.attn.qkv", self.layer_norm(f"{at}.norm1", x, 1e-5)), 3, axis=-1)
        q, k, v = (part.reshape(len(x), c.num_heads, -1) for part in parts)
        x = x + self.linear(f"{at}.attn.proj", attended(rotated(q, angles), rotated(k, angles), v, causal=False))
        hidden = gelu(self.linear(f"{at}.mlp.fc1", self.layer_norm(f"{at}.norm2", x, 1e-5)), c.hidden_act)
        return x + self.linear(f"{at}.mlp.fc2", hidden)

    def merger(self, x: np.ndarray) -> np.ndarray:
        """One image's rows, class token first -> [tokens, D]."""
        normed = self.layer_norm("visual.merger.ln_q", x[1:], self.config.vision.layer_norm_eps)
        joined = normed.reshape(len(normed) // self.config.vision.merge_unit, -1)
        return self.linear("visual.merger.mlp.2", gelu(self.linear("visual.merger.mlp.0", joined), "gelu"))

    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        """x W + b, x rounded first."""
        self.taps[path] = x
        return self.rounding(path, x) @ self.w[f"{path}.weight"] + self.w.get(f"{path}.bias", 0)

    def rms_norm(self, path: str, x: np.ndarray) -> np.ndarray:
        """Over the last axis."""
        mean = np.square(x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.config.text.rms_norm_eps) * self.w[f"{path}.weight"]

    def layer_norm(self, path: str, x: np.ndarray, eps: float) -> np.ndarray:
        """Over the last axis."""
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps)
        return unit * self.w[f"{path}.weight"] + self.w[f"{path}.bias"]


def rotated(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x [rows, heads, d] turned in the planes (k, k + d/2) by angles [rows, d/2]."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """q [rows, heads, d] over k, v [rows, kv_heads, d], one head after the other: [rows, heads * d]."""
    group, out = q.shape[1] // k.shape[1], np.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(q.shape[2])
        if causal:
            scores[np.triu_indices(len(scores), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // group]
    return out.reshape(len(out), -1)


def gelu(x: np.ndarray, kind: str) -> np.ndarray:
    """The exact one, or the quick one."""
    if kind == "quick_gelu":
        return x / (1 + np.exp(-1.702 * x))
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

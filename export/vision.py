"""The vision graph: RICE-ViT and its merger. Source: SPEC of the model, section 2.

Contract: `pixel_values [images, patches, patch_dim]` in the graph's format, rows in merge order, and
`patch_positions [patches, 2]` int64 (row, column of each patch, in the same order) ->
`image_embeds [images, patches / merge^2, text_hidden_size]`. All images of a call share one grid. Each
image attends within itself only, so there is no mask. A video's frames are images.
"""

import onnx_ir as ir
from onnxscript import nn

from ..config import VisionConfig
from ..precision import FP32, FloatFormat
from .layers import (
    LayerNorm,
    Linear,
    Weight,
    attention,
    gelu,
    heads_first,
    ir_dtype,
    merge_heads,
    rotary_angles,
    rotate,
    split_heads,
)
from .patterns import Op, Value

BLOCK_EPS = 1e-5  # the reference hard-codes it in the blocks, whatever the config says
ROPE_THETA = 10000.0
INT64_MAX = 2**63 - 1


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel: one product per flattened patch."""

    def __init__(self, c: VisionConfig, fmt: FloatFormat) -> None:
        super().__init__()
        kernel = [c.hidden_size, c.in_channels, c.patch_size, c.patch_size]
        self.proj = Linear(c.patch_dim, c.hidden_size, fmt, source_shape=kernel)

    def forward(self, op: Op, pixel_values: Value) -> Value:
        return self.proj(op, pixel_values)


class Attention(nn.Module):
    """Full self-attention inside each image, class token included."""

    def __init__(self, c: VisionConfig, fmt: FloatFormat) -> None:
        super().__init__()
        self.qkv = Linear(c.hidden_size, 3 * c.hidden_size, fmt, bias=True)
        self.proj = Linear(c.hidden_size, c.hidden_size, fmt, bias=True)
        self.c, self.fmt = c, fmt

    def forward(self, op: Op, x: Value, cos: Value, sin: Value) -> Value:
        heads, head_dim = self.c.num_heads, self.c.head_dim
        parts = op.Split(self.qkv(op, x), num_outputs=3, axis=-1, _outputs=3)
        q, k, v = (heads_first(op, split_heads(op, part, heads, head_dim)) for part in parts)
        q, k = rotate(op, q, cos, sin, self.fmt), rotate(op, k, cos, sin, self.fmt)
        y = attention(op, q, k, v, None, self.fmt)
        return self.proj(op, merge_heads(op, y, self.c.hidden_size))


class MLP(nn.Module):
    def __init__(self, c: VisionConfig, fmt: FloatFormat) -> None:
        super().__init__()
        self.fc1 = Linear(c.hidden_size, c.intermediate_size, fmt, bias=True)
        self.fc2 = Linear(c.intermediate_size, c.hidden_size, fmt, bias=True)
        self.act = c.hidden_act

    def forward(self, op: Op, x: Value) -> Value:
        return self.fc2(op, gelu(op, self.fc1(op, x), self.act))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, c: VisionConfig, fmt: FloatFormat) -> None:
        super().__init__()
        self.norm1 = LayerNorm(c.hidden_size, BLOCK_EPS, fmt)
        self.norm2 = LayerNorm(c.hidden_size, BLOCK_EPS, fmt)
        self.attn = Attention(c, fmt)
        self.mlp = MLP(c, fmt)

    def forward(self, op: Op, x: Value, cos: Value, sin: Value) -> Value:
        x = op.Add(x, self.attn(op, self.norm1(op, x), cos, sin))
        return op.Add(x, self.mlp(op, self.norm2(op, x)))


class Merger(nn.Module):
    """Joins the patches of one merge unit (consecutive rows) into one token of the decoder's width."""

    def __init__(self, c: VisionConfig, fmt: FloatFormat) -> None:
        super().__init__()
        self.joined = c.hidden_size * c.merge_unit
        self.ln_q = LayerNorm(c.hidden_size, c.layer_norm_eps, fmt)
        # The reference's Sequential: Linear, GELU (always the exact one), Linear.
        self.mlp = nn.ModuleList(
            [
                Linear(self.joined, self.joined, fmt, bias=True),
                Gelu(),
                Linear(self.joined, c.text_hidden_size, fmt, bias=True),
            ]
        )

    def forward(self, op: Op, x: Value) -> Value:
        x = op.Reshape(self.ln_q(op, x), [0, -1, self.joined])
        x.shape = ir.Shape(["images", "image_tokens", self.joined])
        for layer in self.mlp:
            x = layer(op, x)
        return x


class Gelu(nn.Module):
    def forward(self, op: Op, x: Value) -> Value:
        return gelu(op, x, "gelu")


class VisionTower(nn.Module):
    """Everything under `visual.` in the checkpoint."""

    def __init__(self, c: VisionConfig, fmt: FloatFormat) -> None:
        super().__init__("visual")
        self.c = c
        self.class_embedding = Weight([c.hidden_size], ir_dtype(fmt))
        # Used as rotary angles, which stay in float32.
        self.class_pos_emb = Weight([1, c.head_dim // 2], ir_dtype(FP32))
        self.patch_embed = PatchEmbed(c, fmt)
        self.pre_layernorm = LayerNorm(c.hidden_size, c.layer_norm_eps, fmt)
        self.blocks = nn.ModuleList([Block(c, fmt) for _ in range(c.depth)])
        self.merger = Merger(c, fmt)

    def forward(self, op: Op, pixel_values: Value, patch_positions: Value) -> Value:
        x, cos, sin = self.embed(op, pixel_values, patch_positions)
        for block in self.blocks:
            x = block(op, x, cos, sin)
        return self.merge(op, x)

    def embed(self, op: Op, pixel_values: Value, patch_positions: Value) -> tuple[Value, Value, Value]:
        """What the first block reads: rows [images, rows, hidden], class token first, and cos and sin."""
        x = self.patch_embed(op, pixel_values)
        images = op.Shape(x, start=0, end=1)
        x = self.prepend_class_token(op, x, images)
        cos, sin = self.rotary(op, patch_positions, images)
        return self.pre_layernorm(op, x), cos, sin

    def merge(self, op: Op, x: Value) -> Value:
        """What the last block gives, without the class token, as tokens [images, image_tokens, text_hidden]."""
        patches = op.Slice(x, [1], [INT64_MAX], [1])
        patches.shape = ir.Shape(["images", "patches", self.c.hidden_size])
        return self.merger(op, patches)

    def prepend_class_token(self, op: Op, x: Value, images: Value) -> Value:
        """[images, patches, hidden] -> [images, rows, hidden], with 1 + patches rows."""
        hidden = self.c.hidden_size
        class_token = op.Expand(self.class_embedding, op.Concat(images, [1, hidden], axis=0))
        class_token.shape = ir.Shape(["images", 1, hidden])
        x = op.Concat(class_token, x, axis=1)
        x.shape = ir.Shape(["images", "rows", hidden])
        return x

    def rotary(self, op: Op, positions: Value, images: Value) -> tuple[Value, Value]:
        """cos and sin, float32 [images, rows, head_dim / 2].

        A patch's angles are its row's, then its column's; the class token's are learned.
        """
        half = self.c.head_dim // 2
        angles = op.Reshape(rotary_angles(op, positions, ROPE_THETA, half), [-1, half])
        angles.shape = ir.Shape(["patches", half])
        angles = op.Concat(self.class_pos_emb, angles, axis=0)
        angles.shape = ir.Shape(["rows", half])
        angles = op.Expand(op.Unsqueeze(angles, [0]), op.Concat(images, [1, 1], axis=0))
        angles.shape = ir.Shape(["images", "rows", half])
        return op.Cos(angles), op.Sin(angles)

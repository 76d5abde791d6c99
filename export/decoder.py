"""The decoder graph: Qwen3 with a static KV cache updated in place. Source: SPEC of the model, section 3.

One graph serves prefill, chunked prefill, decode and verification of drafted tokens. Cache row =
position, so one comparison, `arange(valid_length) <= position`, covers causality, padding and rows
not yet written; it is explicit because some parsers drop Attention's own length input.

An INT8 cache holds codes under one scale each for a layer's keys and values. TensorScatter takes no codes in
TensorRT, so they are written by ScatterND; ONNX Runtime writes either in place.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from ..config import TextConfig
from ..precision import FloatFormat
from ..precision.codes import INT8
from .layers import (
    Linear,
    RMSNorm,
    Weight,
    attention,
    from_format,
    heads_first,
    ir_dtype,
    merge_heads,
    rotary_angles,
    rotate,
    share_feed,
    split_heads,
)
from .patterns import Op, Value


@dataclass
class Step:
    """What every layer of one call shares. cache_rows: where ScatterND writes, for an INT8 cache."""

    cos: Value
    sin: Value
    mask: Value
    write_indices: Value
    valid_length: Value
    cache_rows: Value | None = None


class Attention(nn.Module):
    """Grouped-query attention with per-head normalisation of queries and keys."""

    def __init__(self, c: TextConfig, fmt: FloatFormat) -> None:
        super().__init__()
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, fmt, c.attention_bias)
        self.k_proj = Linear(c.hidden_size, keys, fmt, c.attention_bias)
        self.v_proj = Linear(c.hidden_size, keys, fmt, c.attention_bias)
        share_feed(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = Linear(queries, c.hidden_size, fmt, c.attention_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, fmt)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, fmt)
        self.c, self.fmt = c, fmt
        self.k_scale: Weight | None = None
        self.v_scale: Weight | None = None

    def quantize_cache(self) -> None:
        """Keep keys and values as INT8 codes."""
        self.k_scale = Weight([], ir_dtype(self.fmt), computed=True)
        self.v_scale = Weight([], ir_dtype(self.fmt), computed=True)

    def forward(self, op: Op, x: Value, step: Step, past_key: Value, past_value: Value) -> tuple[Value, Value, Value]:
        c = self.c
        q = self.q_norm(op, split_heads(op, self.q_proj(op, x), c.num_attention_heads, c.head_dim))
        k = self.k_norm(op, split_heads(op, self.k_proj(op, x), c.num_key_value_heads, c.head_dim))
        v = split_heads(op, self.v_proj(op, x), c.num_key_value_heads, c.head_dim)
        q = rotate(op, heads_first(op, q), step.cos, step.sin, self.fmt)
        k = rotate(op, heads_first(op, k), step.cos, step.sin, self.fmt)
        key, keys = self.update(op, past_key, k, self.k_scale, step)
        value, values = self.update(op, past_value, heads_first(op, v), self.v_scale, step)
        y = attention(op, q, keys, values, step.mask, self.fmt)
        y = self.o_proj(op, merge_heads(op, y, c.num_attention_heads * c.head_dim))
        return y, key, value

    def update(self, op: Op, past: Value, new: Value, scale: Value | None, step: Step) -> tuple[Value, Value]:
        """Write the new rows into the cache; returns the cache and its valid part, in the graph's format."""
        if scale is None:
            present = op.TensorScatter(past, new, step.write_indices, axis=2)
            return present, self.valid(op, present, step)
        # No zero point: with one, ONNX Runtime 1.32 moves the codes on to UINT8 half-way and refuses its own result.
        present = op.ScatterND(past, step.cache_rows, op.QuantizeLinear(new, scale, output_dtype=INT8.onnx_type))
        return present, op.DequantizeLinear(self.valid(op, present, step), scale)

    def valid(self, op: Op, present: Value, step: Step) -> Value:
        """The rows of a cache that are in use."""
        valid = op.Slice(present, [0], step.valid_length, [2])
        valid.shape = ir.Shape(["batch", self.c.num_key_value_heads, "valid_length", self.c.head_dim])
        return valid


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: TextConfig, fmt: FloatFormat) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, fmt)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, fmt)
        share_feed(self.gate_proj, self.up_proj)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, fmt)

    def forward(self, op: Op, x: Value) -> Value:
        gate = self.gate_proj(op, x)
        silu = op.Mul(gate, op.Sigmoid(gate))
        return self.down_proj(op, op.Mul(silu, self.up_proj(op, x)))


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, c: TextConfig, fmt: FloatFormat) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, fmt)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, fmt)
        self.self_attn = Attention(c, fmt)
        self.mlp = MLP(c, fmt)

    def forward(self, op: Op, x: Value, step: Step, past_key: Value, past_value: Value) -> tuple[Value, Value, Value]:
        y, key, value = self.self_attn(op, self.input_layernorm(op, x), step, past_key, past_value)
        x = op.Add(x, y)
        return op.Add(x, self.mlp(op, self.post_attention_layernorm(op, x))), key, value


class Model(nn.Module):
    """Everything under `model.` in the checkpoint but the embedding table, which stays on the host."""

    def __init__(self, c: TextConfig, fmt: FloatFormat) -> None:
        super().__init__("model")
        self.c = c
        self.layers = nn.ModuleList([Layer(c, fmt) for _ in range(c.num_hidden_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, fmt)
        self.int8_cache = False

    def quantize_cache(self) -> None:
        """Keep the KV cache as INT8 codes."""
        self.int8_cache = True
        for module in self.modules():
            if isinstance(module, Attention):
                module.quantize_cache()

    def forward(
        self,
        op: Op,
        x: Value,
        position_ids: Value,
        write_indices: Value,
        valid_length: Value,
        logits_indices: Value,
        past: list[tuple[Value, Value]],
    ) -> tuple[Value, list[tuple[Value, Value]]]:
        step = self.step(op, position_ids, write_indices, valid_length)
        present = []
        for layer, (past_key, past_value) in zip(self.layers, past, strict=True):
            x, key, value = layer(op, x, step, past_key, past_value)
            present.append((key, value))
        rows = op.GatherND(x, op.Unsqueeze(logits_indices, [2]), batch_dims=1)
        return self.norm(op, rows), present

    def step(self, op: Op, position_ids: Value, write_indices: Value, valid_length: Value) -> Step:
        """What all layers of a call share."""
        cos, sin = self.rotary(op, position_ids)
        mask = self.mask(op, position_ids, valid_length)
        rows = self.cache_rows(op, position_ids, write_indices) if self.int8_cache else None
        return Step(cos, sin, mask, write_indices, valid_length, rows)

    def rotary(self, op: Op, position_ids: Value) -> tuple[Value, Value]:
        """cos and sin of the angles, float32 [batch, tokens, head_dim / 2]."""
        angles = rotary_angles(op, position_ids, self.c.rope_theta, self.c.head_dim)
        return op.Cos(angles), op.Sin(angles)

    def mask(self, op: Op, position_ids: Value, valid_length: Value) -> Value:
        """Which cache rows each token sees: bool [batch, 1, tokens, valid_length]."""
        rows = numbers_below(op, valid_length, "valid_length")
        return op.LessOrEqual(rows, op.Unsqueeze(position_ids, [1, 3]))

    def cache_rows(self, op: Op, position_ids: Value, write_indices: Value) -> Value:
        """Where in [batch, kv_heads, max_length, head_dim] the new rows go: int64 [batch, kv_heads, tokens, 3]."""
        heads = self.c.num_key_value_heads
        tokens, batch = op.Shape(position_ids, start=1, end=2), op.Shape(position_ids, start=0, end=1)
        rows = op.Add(op.Unsqueeze(write_indices, [1]), numbers_below(op, tokens, "tokens"))
        sequences = numbers_below(op, batch, "batch")
        head = op.initializer(ir.tensor(np.arange(heads).reshape(1, heads, 1)), name="cache_heads")
        shape = op.Concat(batch, [heads], tokens, axis=0)

        def everywhere(place: Value) -> Value:
            spread = op.Expand(place, shape)
            spread.shape = ir.Shape(["batch", heads, "tokens"])
            return op.Unsqueeze(spread, [3])

        places = (op.Unsqueeze(sequences, [1, 2]), head, op.Unsqueeze(rows, [1]))
        return op.Concat(*map(everywhere, places), axis=3)


def numbers_below(op: Op, count: Value, dimension: str) -> Value:
    """0, 1, ... count - 1, for an int64 count [1]. dimension: what their number is called."""
    numbers = op.Range(0, op.Squeeze(count, [0]), 1)
    numbers.shape = ir.Shape([dimension])
    return numbers


class Decoder(nn.Module):
    """The language model with its head; logits come out in float32."""

    def __init__(self, c: TextConfig, fmt: FloatFormat) -> None:
        super().__init__()
        self.model = Model(c, fmt)
        self.lm_head = Linear(c.hidden_size, c.vocab_size, fmt)
        self.fmt = fmt

    def forward(self, op: Op, *inputs: Value, past: list[tuple[Value, Value]]) -> tuple[Value, list]:
        hidden, present = self.model(op, *inputs, past)
        return from_format(op, self.lm_head(op, hidden), self.fmt), present

"""What the exported graphs are made of, as the cpu engine takes it: each pattern of nodes becomes one description.

A pattern is read from the value it makes, backwards. It says what the nodes compute and nothing of how; what is not the
pattern raises MismatchError, which names the value.
"""

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from .graph import Graph, MismatchError, attribute, sides

HEADS_FIRST = [0, 2, 1, 3]  # tokens and heads change places


@dataclass(frozen=True, slots=True)
class Linear:
    """A product with weights: MatMul with a constant, or with DequantizeLinear of one, and a bias.

    source: what is multiplied, before its rounding. scale: of that rounding to INT8; None where there is none.
    block: inputs that share a scale; 0: all of them.
    """

    source: str
    weight: str
    scales: tuple[str, ...] = ()
    block: int = 0
    scale: float | None = None
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNormalization, or LayerNormalization where there is a bias."""

    source: str
    weight: str
    eps: float
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys or values: a product split in heads, normalised and rotated where there is a norm or an angle."""

    source: str
    norm: Norm | None
    cosines: str | None


@dataclass(frozen=True, slots=True)
class Attention:
    """softmax(scale q k^T) v of split heads, over a cache (its input's name) or over the keys themselves.

    head_dim: of the reshape that splits the queries.
    """

    query: Heads
    key: Heads
    value: Heads
    scale: float
    heads: int
    kv_heads: int
    head_dim: int
    cache: str | None


@dataclass(frozen=True, slots=True)
class Gated:
    """gate sigmoid(gate) up."""

    gate: str
    up: str


@dataclass(frozen=True, slots=True)
class Gelu:
    """An activation: gelu, gelu_tanh or quick_gelu."""

    source: str
    kind: str


def linear(graph: Graph, value: str) -> Linear:
    """x W, or x W + b."""
    node, bias = graph.made_by(value, "MatMul", "Add"), None
    if node.op_type == "Add":
        found = next(((x, b) for x, b in sides(node) if graph.is_constant(b)), None)
        if found is None:
            raise MismatchError(f"{graph.path}: {value} is a sum of two values where the cpu engine knows a bias alone")
        node, bias = graph.made_by(found[0], "MatMul"), found[1]
    source, scale = rounding(graph, node.input[0])
    if graph.is_constant(node.input[1]):
        return Linear(source, node.input[1], bias=bias, scale=scale)
    weights = graph.made_by(node.input[1], "DequantizeLinear")
    scales: tuple[str, ...] = (weights.input[1],)
    if not graph.is_constant(scales[0]):  # NVFP4's, in FP8 under a scale of their own
        inner = graph.made_by(scales[0], "DequantizeLinear")
        scales = (inner.input[0], inner.input[1])
    block = attribute(weights, "block_size", 0)
    return Linear(source, weights.input[0], scales, block, scale, bias)


def rounding(graph: Graph, value: str) -> tuple[str, float | None]:
    """What a product reads, before it is rounded to INT8, and the scale; FP8's rounding is left out."""
    if not graph.is_made_by(value, "DequantizeLinear"):
        return value, None
    codes = graph.made_by(value, "DequantizeLinear")
    node = graph.made_by(codes.input[0], "QuantizeLinear")
    eight_bit_floats = len(node.input) < 3
    return node.input[0], None if eight_bit_floats else graph.number(node.input[1])


def norm(graph: Graph, value: str) -> Norm:
    """Normalisation over the last axis."""
    node = graph.made_by(value, "RMSNormalization", "LayerNormalization")
    if attribute(node, "axis", -1) != -1:
        raise MismatchError(f"{graph.path}: {value} is normalised over more than the last axis")
    bias = node.input[2] if node.op_type == "LayerNormalization" else None
    return Norm(node.input[0], node.input[1], attribute(node, "epsilon", 1e-5), bias)


def gated(graph: Graph, value: str) -> Gated:
    """The activation of a gated MLP."""
    node = graph.made_by(value, "Mul")
    for silu, up in sides(node):
        if graph.is_made_by(silu, "Mul"):
            inner = graph.made_by(silu, "Mul")
            for gate, sigmoid in sides(inner):
                if graph.is_made_by(sigmoid, "Sigmoid") and graph.made_by(sigmoid, "Sigmoid").input[0] == gate:
                    return Gated(gate, up)
    raise MismatchError(f"{graph.path}: {value} is a product where the cpu engine knows a gated activation alone")


def gelu(graph: Graph, value: str) -> Gelu:
    """GELU in its three forms."""
    node = graph.made_by(value, "Gelu", "Mul")
    if node.op_type == "Gelu":
        return Gelu(node.input[0], "gelu_tanh" if attribute(node, "approximate", b"none") == b"tanh" else "gelu")
    for x, factor in sides(node):
        if graph.is_made_by(factor, "Sigmoid"):
            inner = graph.made_by(graph.made_by(factor, "Sigmoid").input[0], "Mul")
            if inner.input[0] == x and abs(graph.number(inner.input[1]) - 1.702) < 1e-2:
                return Gelu(x, "quick_gelu")
    raise MismatchError(f"{graph.path}: {value} is a product where the cpu engine knows an activation alone")


def attention(graph: Graph, value: str) -> Attention:
    """Attention whose heads are merged again: Reshape of Transpose."""
    merged = graph.made_by(graph.made_by(value, "Reshape").input[0], "Transpose")
    _check_perm(graph, merged, HEADS_FIRST)
    if graph.is_made_by(merged.input[0], "Attention"):
        node = graph.made_by(merged.input[0], "Attention")
        query, keys, values = node.input[:3]
        scale, mask = attribute(node, "scale"), next((name for name in node.input[3:] if name), None)
    else:
        query, keys, values, scale, mask = _products(graph, merged.input[0])
    cache, key = _written(graph, keys)
    _check_mask(graph, value, mask, cache)
    _, new_values = _written(graph, values)
    q = split(graph, query)
    shape, kv_shape = (split_shape(graph, x) for x in (query, key))
    return Attention(q, split(graph, key), split(graph, new_values), scale, shape[0], kv_shape[0], shape[1], cache)


def _products(graph: Graph, value: str) -> tuple[str, str, str, float, str | None]:
    """Attention in plain products: queries, keys, values, the scale of the scores, and the mask if there is one."""
    weighted = graph.made_by(graph.made_by(value, "Reshape").input[0], "MatMul")
    values = graph.made_by(weighted.input[1], "Unsqueeze").input[0]
    scores, mask = graph.made_by(weighted.input[0], "Softmax").input[0], None
    if graph.is_made_by(scores, "Where"):
        where = graph.made_by(scores, "Where")
        mask, scores = graph.made_by(where.input[0], "Unsqueeze").input[0], where.input[1]
    product = graph.made_by(scores, "MatMul")
    columns = graph.made_by(product.input[1], "Transpose")
    _check_perm(graph, columns, [0, 1, 2, 4, 3])
    keys = graph.made_by(columns.input[0], "Unsqueeze").input[0]
    scaled = graph.made_by(graph.made_by(product.input[0], "Reshape").input[0], "Mul")
    return scaled.input[0], keys, values, graph.number(scaled.input[1]), mask


def _check_mask(graph: Graph, value: str, mask: str | None, cache: str | None) -> None:
    """Over a cache a token sees the rows up to its own; without one, all."""
    if (mask is None) != (cache is None):
        raise MismatchError(f"{graph.path}: {value} is attention {'with' if mask else 'without'} a mask")
    if mask is not None:
        compared = graph.made_by(mask, "LessOrEqual")
        graph.made_by(compared.input[0], "Range")
        if graph.made_by(compared.input[1], "Unsqueeze").input[0] != "position_ids":
            raise MismatchError(f"{graph.path}: the mask {mask} is not of position_ids")


def _written(graph: Graph, value: str) -> tuple[str | None, str]:
    """The cache input that new rows are written to, and the rows; no cache where they are read as they are."""
    if graph.is_made_by(value, "DequantizeLinear"):  # an INT8 cache
        value = graph.made_by(value, "DequantizeLinear").input[0]
    if not graph.is_made_by(value, "Slice"):
        return None, value
    node = graph.made_by(graph.made_by(value, "Slice").input[0], "TensorScatter", "ScatterND")
    if node.op_type == "TensorScatter":
        return node.input[0], node.input[1]
    return node.input[0], graph.made_by(node.input[2], "QuantizeLinear").input[0]


def split(graph: Graph, value: str) -> Heads:
    """Heads of a product's columns, [batch, heads, tokens, head_dim]."""
    cosines = None
    if graph.is_made_by(value, "RotaryEmbedding"):
        node = graph.made_by(value, "RotaryEmbedding")
        angles_of = [
            graph.made_by(name, kind).input[0] for name, kind in zip(node.input[1:3], ("Cos", "Sin"), strict=True)
        ]
        if angles_of[0] != angles_of[1] or attribute(node, "interleaved", 0):
            raise MismatchError(f"{graph.path}: {node.output[0]} is not turned by one angle, half by half")
        value, cosines = node.input[0], node.input[1]
    heads = graph.made_by(value, "Transpose")
    _check_perm(graph, heads, HEADS_FIRST)
    found = norm(graph, heads.input[0]) if graph.is_made_by(heads.input[0], "RMSNormalization") else None
    reshaped = graph.made_by(found.source if found else heads.input[0], "Reshape")
    return Heads(reshaped.input[0], found, cosines)


def split_shape(graph: Graph, value: str) -> tuple[int, int]:
    """How many heads a value is split in, and their width."""
    while not graph.is_made_by(value, "Reshape"):
        value = graph.made_by(value, "RotaryEmbedding", "Transpose", "RMSNormalization").input[0]
    shape = graph.constant(graph.made_by(value, "Reshape").input[1]).tolist()
    return int(shape[2]), int(shape[3])


def _check_perm(graph: Graph, node: NodeProto, perm: list[int]) -> None:
    if list(attribute(node, "perm", [])) != perm:
        raise MismatchError(f"{graph.path}: {node.output[0]} is transposed by {attribute(node, 'perm')}, not {perm}")


def residual(graph: Graph, value: str) -> tuple[str, str] | None:
    """The stream and what is added to it, for a sum of two computed values; None for anything else."""
    if not graph.is_made_by(value, "Add"):
        return None
    node = graph.made_by(value, "Add")
    if any(graph.is_constant(i) for i in node.input):
        return None
    return graph.root(node.input[0]), node.input[1]


def angles(graph: Graph, cosines: str) -> tuple[np.ndarray, str]:
    """Inverse frequencies [width / 2] of rotary angles, and the positions that they multiply."""
    node = graph.made_by(cosines, "Cos")
    product = graph.made_by(node.input[0], "Mul")
    frequencies = graph.constant(product.input[1]).reshape(-1)
    return frequencies, graph.made_by(product.input[0], "Unsqueeze").input[0]


def parts(graph: Graph, value: str) -> tuple[str, int]:
    """A value that is one of a Split's parts: what is split, and which part; of others, themselves and 0."""
    if not graph.is_made_by(value, "Split"):
        return value, 0
    node = graph.made_by(value, "Split")
    return node.input[0], list(node.output).index(value)

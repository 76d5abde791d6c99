"""From an exported graph to a program: patterns (patterns.py) become steps, weights are packed (pack.py).

What is merged: queries, keys and values into one product; gate and up into one, whose columns alternate; bias,
activation and residual sum into the product that they follow; normalisation and rounding into one pass over the rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from onnx import TensorProto

from ...runtime.cpu_library import LANES, MOST_WIDTH, UNIT_VALUES
from . import pack
from .graph import Graph, MismatchError, attribute
from .patterns import Attention, Linear, Norm, angles, attention, gated, gelu, linear, norm, parts, residual
from .program import Program, WeightsFile

COMPUTE = ("fp32", "bf16", "int8")  # what products run in whose weights a bundle stores as floats
# Inputs that share a scale of a row, where it is not the weights' blocks that say so: the most that divide a product's.
# Sums are brought to floats once a group, so that short ones cost time; long ones let one outlier spoil more.
GROUPS = (512, 256, 128)
ALL_ROWS, ANSWER_ROWS = 0, 1  # decoder: indices of a call's counts
PATCHES, ROWS, TOKENS = 0, 1, 2  # vision

Report = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Form:
    """How a product runs: kinds of its rows and weights, inputs that share a scale, and that of the rows if fixed."""

    rows: str
    weights: str
    group: int
    scale: float = 0.0


class Compiler:
    """One graph on its way to a program."""

    def __init__(self, graph: Graph, part: str, compute: str, file: WeightsFile, report: Report) -> None:
        self.graph, self.compute, self.file, self.report = graph, compute, file, report
        self.program = Program(part)

    def form(self, one: Linear, joined: int = 1) -> Form:
        """How a product runs. joined: rows that make one row of it."""
        inputs = self.graph.shape(one.weight)[0]
        kind = self.graph.dtype(one.weight)
        part = inputs // joined
        group = next((g for g in GROUPS if part % g == 0), part)
        if kind == TensorProto.INT4 and inputs % 8 == 0:
            return Form("int8", "codes4", gcd(one.block or group, part))
        if kind == TensorProto.INT8 and not one.block and inputs % 4 == 0:
            return Form("int8", "codes8", group, one.scale or 0.0)
        if self.compute == "int8" and not one.scales and inputs % 4 == 0:
            return Form("int8", "codes8", group)
        return Form("fp32", "floats", 1) if self.compute == "fp32" else Form("bf16", "pairs", 2)

    def product(
        self, linears: Sequence[Linear], form: Form, rows: int, out: str, *, epilogue: str = "write", **place: int
    ) -> None:
        """Multiply the rows that were prepared last: one step for all linears, their columns side by side or gated.

        place: stride and column of `out`, where they are not the product's width and 0.
        """
        matrices = [self._codes(one, form) for one in linears]
        join = pack.gated if epilogue == "gated" else _side_by_side
        codes = join(*(codes for codes, _ in matrices)) if len(matrices) > 1 else matrices[0][0]
        scales = [scale for _, scale in matrices if scale is not None]
        inputs, columns = codes.shape
        outputs = sum(self.graph.shape(one.weight)[1] for one in linears)
        n = outputs // 2 if epilogue == "gated" else outputs
        packed = _PACKERS[form.weights](codes)
        w, s = self.file.add(packed), None
        self.program.bytes_per_row += packed.nbytes
        if scales:
            packed_scales = pack.pack_scales(join(*scales) if len(scales) > 1 else scales[0])
            s = self.file.add(packed_scales)
            self.program.bytes_per_row += packed_scales.nbytes
        stride = place.get("stride", n)
        self.program.need(out, rows, 4 * stride)
        self.program.step(
            "product",
            rows=rows,
            out=out,
            kind=form.rows,
            weights=form.weights,
            epilogue=epilogue,
            n=n,
            k=inputs,
            group=form.group,
            stride=stride,
            column=place.get("column", 0),
            w=w,
            s=s,
            b=self._bias(linears, columns),
        )
        self.report(self.file.size, 0, linears[0].weight)

    def _bias(self, linears: Sequence[Linear], columns: int) -> int | None:
        if all(one.bias is None for one in linears):
            return None
        values = [
            self.graph.constant(one.bias) if one.bias else np.zeros(self.graph.shape(one.weight)[1], np.float32)
            for one in linears
        ]
        return self.file.add(pack.padded(np.concatenate(values), pack.whole_panels(columns)))

    def _codes(self, one: Linear, form: Form) -> tuple[np.ndarray, np.ndarray | None]:
        """A matrix in its form: codes [in, out] and scales [groups, out], or floats and None."""
        values = self.graph.constant(one.weight)
        if form.weights in ("floats", "pairs"):
            return self._dequantized(one, values), None
        if not one.scales:
            most = np.abs(values).max(axis=0)
            scale = np.where(most > 0, most / np.float32(127), np.float32(1)).astype(np.float32)
            return np.rint(values / scale).astype(np.int8), scale[None]
        scales = self.graph.constant(one.scales[0]).reshape(-1, values.shape[1])
        if form.weights == "codes4" and len(scales) != values.shape[0] // form.group:
            scales = np.repeat(scales, values.shape[0] // form.group // len(scales), axis=0)
        return values, scales

    def _dequantized(self, one: Linear, values: np.ndarray) -> np.ndarray:
        if not one.scales:
            return values
        scales = self.graph.constant(one.scales[0])
        if len(one.scales) > 1:
            scales = scales * self.graph.number(one.scales[1])
        if one.block:
            scales = np.repeat(scales, one.block, axis=0)
        return values.astype(np.float32) * scales

    def rows(self, source: str, form: Form, rows: int, width: int, *, before: Norm | None = None, **more: Any) -> None:
        """Prepare the rows of a buffer for a product of `form`: normalised where there is a norm.

        more: joined (rows that make one), skip_first, prologue, stride.
        """
        joined = more.pop("joined", 1)
        n = width * joined
        target = more.pop("target", rows)
        groups = n // form.group if form.rows == "int8" else 0
        self.program.need("units", target, -(-n // UNIT_VALUES[form.rows]) * 4)
        self.program.need("scales", target, 4 * max(1, groups))
        self.program.need("sums", target, 4 * max(1, groups))
        settings = {"stride": width, **more, **self._norm(before)}
        self.program.step(
            "rows", rows=rows, in_=source, kind=form.rows, n=n, k=width, group=form.group, scale=form.scale, **settings
        )

    def floats(self, source: str, out: str, rows: int, width: int, before: Norm) -> None:
        """Normalise rows from one buffer of floats to another."""
        self.program.need(out, rows, 4 * width)
        settings = self._norm(before)
        self.program.step(
            "rows", rows=rows, in_=source, out=out, kind="fp32", n=width, k=width, stride=width, **settings
        )

    def _norm(self, before: Norm | None) -> dict[str, Any]:
        if before is None:
            return {}
        weight = self.file.add(self.graph.constant(before.weight))
        if before.bias is None:
            return {"prologue": "rms_norm", "eps": before.eps, "w": weight}
        bias = self.file.add(self.graph.constant(before.bias))
        return {"prologue": "layer_norm", "eps": before.eps, "w": weight, "b": bias}

    def attend(self, found: Attention, products: Sequence[Linear], stream: str, rows: int, layer: int) -> str:
        """Attention of the stream's normalised rows; returns the buffer of its merged heads."""
        program = self.program
        program.heads, program.kv_heads, program.head_dim = found.heads, found.kv_heads, found.head_dim
        program.layers = max(program.layers, layer + 1)
        before = norm(self.graph, products[0].source)
        if self.graph.root(before.source) != stream or any(one.source != products[0].source for one in products):
            raise MismatchError(
                f"{self.graph.path}: the attention over {products[0].source} does not read the stream alone"
            )
        if found.head_dim % LANES or found.head_dim > MOST_WIDTH or found.heads % found.kv_heads:
            raise MismatchError(
                f"{self.graph.path}: {found.heads} heads of {found.head_dim} over {found.kv_heads}, where the cpu "
                f"engine knows whole groups of heads, of a multiple of {LANES} up to {MOST_WIDTH}"
            )
        queries, keys = found.heads * found.head_dim, found.kv_heads * found.head_dim
        stride, column = queries + 2 * keys, 0
        forms = [self.form(one) for one in products]
        width = self.graph.shape(products[0].weight)[0]
        together = [list(products)] if len(set(forms)) == 1 else [[one] for one in products]
        for group in together:
            self.rows("stream", self.form(group[0]), rows, width, before=before)
            self.product(group, self.form(group[0]), rows, "heads", stride=stride, column=column)
            column += sum(self.graph.shape(one.weight)[1] for one in group)
        if column != stride:
            raise MismatchError(
                f"{self.graph.path}: {column} columns make {found.heads} and twice {found.kv_heads} heads"
            )
        shape = {"heads": found.heads, "kv_heads": found.kv_heads, "head_dim": found.head_dim, "layer": layer}
        program.need("queries", rows, queries)
        program.need("query_scales", rows, 4 * found.heads)
        program.need("query_sums", rows, 4 * found.heads)
        program.need("attention", rows, 4 * queries)
        norms, eps = self._head_norms(found)
        program.step("heads", rows=rows, in_="heads", stride=stride, b=norms, eps=eps, scale=found.scale, **shape)
        program.step("attention", rows=rows, out="attention", causal=int(found.cache is not None), **shape)
        return "attention"

    def _head_norms(self, found: Attention) -> tuple[int | None, float | None]:
        if found.query.norm is None or found.key.norm is None:
            if found.query.norm is not found.key.norm:
                raise MismatchError(f"{self.graph.path}: queries or keys alone are normalised")
            return None, None
        both = [self.graph.constant(n.weight) for n in (found.query.norm, found.key.norm)]
        return self.file.add(np.concatenate(both)), found.query.norm.eps


def _side_by_side(*matrices: np.ndarray) -> np.ndarray:
    return np.concatenate(matrices, axis=-1)


_PACKERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "codes4": pack.pack_int4,
    "codes8": pack.pack_int8,
    "pairs": pack.pack_bf16,
    "floats": pack.pack_fp32,
}


def _stream(graph: Graph, value: str) -> tuple[str, list[tuple[str, str]]]:
    """Where a stream begins, and what is added to it, in order: (the stream before, what is added)."""
    found = []
    while (pair := residual(graph, value)) is not None:
        found.append(pair)
        value = pair[0]
    return value, found[::-1]


def compile_decoder(graph: Graph, compute: str, file: WeightsFile, report: Report) -> Program:
    """The decoder's program: inputs_embeds -> logits of the rows asked for. Raises MismatchError."""
    c = Compiler(graph, "decoder", compute, file, report)
    head = linear(graph, graph.root("logits"))
    last = norm(graph, head.source)
    gather = graph.made_by(last.source, "GatherND")
    start, added = _stream(graph, graph.root(gather.input[0]))
    if start != "inputs_embeds" or graph.made_by(gather.input[1], "Unsqueeze").input[0] != "logits_indices":
        raise MismatchError(
            f"{graph.path}: its stream begins with {start}, or its logits are not chosen by logits_indices"
        )
    cosines = None
    for stream, value in added:
        out = linear(graph, value)
        if graph.is_made_by(out.source, "Reshape"):
            found = attention(graph, out.source)
            cosines = found.query.cosines
            layer = int((found.cache or ".-1").rpartition(".")[2])
            three = [linear(graph, heads.source) for heads in (found.query, found.key, found.value)]
            source = c.attend(found, three, stream, ALL_ROWS, layer)
            width = found.heads * found.head_dim
            c.rows(source, c.form(out), ALL_ROWS, width)
        else:
            _gated_mlp(c, out, stream)
        c.product([out], c.form(out), ALL_ROWS, "stream", epilogue="add")
    if cosines is None:
        raise MismatchError(f"{graph.path} has no attention")
    frequencies, positions = angles(graph, cosines)
    if graph.made_by(positions, "Cast").input[0] != "position_ids":
        raise MismatchError(f"{graph.path}: its angles are not of position_ids")
    c.program.frequencies = [float(f) for f in frequencies]
    width = graph.shape(head.weight)[0]
    c.program.need("last", ANSWER_ROWS, 4 * width)
    c.program.step("gather", rows=ANSWER_ROWS, in_="stream", out="last", k=width)
    c.rows("last", c.form(head), ANSWER_ROWS, width, before=last)
    c.product([head], c.form(head), ANSWER_ROWS, "output")
    return c.program


def _gated_mlp(c: Compiler, out: Linear, stream: str) -> None:
    """Up to the rows that the last product of a gated MLP reads."""
    graph = c.graph
    pair = gated(graph, out.source)
    gate, up = linear(graph, pair.gate), linear(graph, pair.up)
    before = norm(graph, gate.source)
    if graph.root(before.source) != stream or up.source != gate.source or gate.bias or up.bias:
        raise MismatchError(
            f"{graph.path}: the MLP at {out.weight} does not read the normalised stream alone, without biases"
        )
    width, inner = graph.shape(gate.weight)
    if c.form(gate) == c.form(up):
        c.rows("stream", c.form(gate), ALL_ROWS, width, before=before)
        c.product([gate, up], c.form(gate), ALL_ROWS, "inner", epilogue="gated")
        c.rows("inner", c.form(out), ALL_ROWS, inner)
        return
    for column, one in enumerate((gate, up)):
        c.rows("stream", c.form(one), ALL_ROWS, width, before=before)
        c.product([one], c.form(one), ALL_ROWS, "both", stride=2 * inner, column=column * inner)
    c.rows("both", c.form(out), ALL_ROWS, inner, prologue="swiglu", stride=2 * inner)


def compile_vision(graph: Graph, compute: str, file: WeightsFile, report: Report) -> Program:
    """The vision tower's program: pixel_values and positions -> image_embeds. Raises MismatchError."""
    c = Compiler(graph, "vision", compute, file, report)
    second = linear(graph, graph.root("image_embeds"))
    activation = gelu(graph, second.source)
    first = linear(graph, activation.source)
    join = graph.made_by(first.source, "Reshape")
    joined_norm = norm(graph, join.input[0])
    patches = graph.made_by(joined_norm.source, "Slice").input[0]
    start, added = _stream(graph, graph.root(patches))
    cosines = _embed(c, start)
    for stream, value in added:
        out = linear(graph, value)
        if graph.is_made_by(out.source, "Reshape"):
            found = attention(graph, out.source)
            whole = parts(graph, found.query.source)[0]
            places = [parts(graph, heads.source) for heads in (found.query, found.key, found.value)]
            if places != [(whole, 0), (whole, 1), (whole, 2)] or found.query.cosines != cosines:
                raise MismatchError(f"{graph.path}: {whole} is not split into queries, keys and values")
            source = c.attend(found, [linear(graph, whole)], stream, ROWS, 0)
            c.rows(source, c.form(out), ROWS, found.heads * found.head_dim)
        else:
            act = gelu(graph, out.source)
            up = linear(graph, act.source)
            before = norm(graph, up.source)
            if graph.root(before.source) != stream:
                raise MismatchError(f"{graph.path}: the MLP at {out.weight} does not read the stream")
            width, inner = graph.shape(up.weight)
            c.rows("stream", c.form(up), ROWS, width, before=before)
            c.product([up], c.form(up), ROWS, "inner", epilogue=act.kind)
            c.rows("inner", c.form(out), ROWS, inner)
        c.product([out], c.form(out), ROWS, "stream", epilogue="add")
    width = graph.shape(joined_norm.weight)[0]
    inputs, inner = graph.shape(first.weight)
    joined = inputs // width
    form = c.form(first, joined)
    c.rows("stream", form, ROWS, width, before=joined_norm, joined=joined, skip_first=1, target=TOKENS)
    c.product([first], form, TOKENS, "inner", epilogue=activation.kind)
    c.rows("inner", c.form(second), TOKENS, inner)
    c.product([second], c.form(second), TOKENS, "output")
    return c.program


def _embed(c: Compiler, value: str) -> str:
    """Patches to the stream that the first block reads; returns the cosines of its angles."""
    graph = c.graph
    before = norm(graph, value)
    concat = graph.made_by(before.source, "Concat")
    token = graph.made_by(concat.input[0], "Expand").input[0]
    patch = linear(graph, concat.input[1])
    if attribute(concat, "axis") != 1 or graph.root(patch.source) != "pixel_values":
        raise MismatchError(f"{graph.path}: its stream does not begin with a class token and patches")
    inputs, width = graph.shape(patch.weight)
    form = c.form(patch)
    if form.rows == "int8" and not patch.scales:
        form = Form("bf16", "pairs", 2)  # a thousandth of the work, and it reads pixels
    c.rows("input", form, PATCHES, inputs)
    c.program.need("input", PATCHES, 4 * inputs)
    c.product([patch], form, PATCHES, "embedded")
    c.program.need("joined", ROWS, 4 * width)
    c.program.step("prepend", rows=ROWS, in_="embedded", out="joined", k=width, w=c.file.add(graph.constant(token)))
    c.floats("joined", "stream", ROWS, width, before)
    return _vision_angles(c)


def _vision_angles(c: Compiler) -> str:
    """Reads the angles' constants from the graph's only cosines."""
    graph = c.graph
    (cosines,) = [node.output[0] for node in graph.model.graph.node if node.op_type == "Cos"]
    node = graph.made_by(graph.made_by(cosines, "Cos").input[0], "Expand")
    both = graph.made_by(graph.made_by(node.input[0], "Unsqueeze").input[0], "Concat")
    product = graph.made_by(graph.made_by(both.input[1], "Reshape").input[0], "Mul")
    positions = graph.made_by(graph.made_by(product.input[0], "Unsqueeze").input[0], "Cast").input[0]
    if positions != "patch_positions":
        raise MismatchError(f"{graph.path}: its angles are not of patch_positions")
    c.program.class_angles = [float(f) for f in graph.constant(both.input[0]).reshape(-1)]
    c.program.frequencies = [float(f) for f in graph.constant(product.input[1]).reshape(-1)]
    return cosines


COMPILERS = {"vision": compile_vision, "decoder": compile_decoder}

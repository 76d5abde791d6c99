"""From a configuration to the two graphs, as onnx_ir models whose weights are still to be written."""

import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from ..config import ModelConfig, TextConfig
from ..precision import float_format
from ..precision.plan import Plan
from .decoder import Decoder
from .layers import Weight, apply_plan, ir_dtype
from .patterns import Value
from .vision import VisionTower

OPSET = 24
IR_VERSION = 11

# What each named input or output means, for the manifest and for readers of the file.
MEANINGS = {
    "pixel_values": "flattened patches of images of one size, rows in merge order",
    "patch_positions": "row and column of each patch, in the same order",
    "image_embeds": "one row per image token, in the decoder's width",
    "inputs_embeds": "token embeddings, image rows stitched in",
    "position_ids": "position of each token in its sequence; also its cache row",
    "write_indices": "cache row of the first token of each sequence",
    "valid_length": "cache rows in use by the longest sequence after this call",
    "logits_indices": "which token rows of this call to return logits for",
    "logits": "next-token logits of the chosen rows",
}


class Weights:
    """The parameters of one graph by checkpoint name."""

    def __init__(self, module: nn.Module) -> None:
        self.by_name: dict[str, Weight] = {}
        for parameter in module.parameters():
            assert isinstance(parameter, Weight)
            assert parameter.name is not None
            self.by_name[parameter.name] = parameter


def build_vision(config: ModelConfig, plan: Plan) -> tuple[ir.Model, Weights]:
    """The vision graph of `config` in the precisions of `plan`, and its weights."""
    c, fmt = config.vision, float_format(plan.dtype)
    builder = _builder("vision")
    pixel_values = builder.input("pixel_values", ir_dtype(fmt), ["images", "patches", c.patch_dim])
    positions = builder.input("patch_positions", ir.DataType.INT64, ["patches", 2])
    tower = VisionTower(c, fmt)
    apply_plan(tower, "vision", plan)
    embeds = tower(builder.op, pixel_values, positions)
    embeds.shape = ir.Shape(["images", "image_tokens", c.text_hidden_size])
    builder.add_output(embeds, "image_embeds")
    return _finish(builder.graph), Weights(tower)


def build_decoder(config: ModelConfig, plan: Plan, max_length: int) -> tuple[ir.Model, Weights]:
    """The decoder graph of `config` in the precisions of `plan` with `max_length` cache rows, and its weights."""
    c, fmt = config.text, float_format(plan.dtype)
    builder = _builder("decoder")
    int64 = ir.DataType.INT64
    inputs = (
        builder.input("inputs_embeds", ir_dtype(fmt), ["batch", "tokens", c.hidden_size]),
        builder.input("position_ids", int64, ["batch", "tokens"]),
        builder.input("write_indices", int64, ["batch"]),
        builder.input("valid_length", int64, [1]),
        builder.input("logits_indices", int64, ["batch", "rows"]),
    )
    decoder = Decoder(c, fmt)
    apply_plan(decoder, "decoder", plan)
    if plan.kv_cache == "int8":
        decoder.model.quantize_cache()
    cache_type = ir.DataType.INT8 if plan.kv_cache == "int8" else ir_dtype(fmt)
    logits, present = decoder(builder.op, *inputs, past=_cache_inputs(builder, c, cache_type, max_length))
    builder.add_output(logits, "logits")
    for i, (key, value) in enumerate(present):
        builder.add_output(key, f"present_key.{i}")
        builder.add_output(value, f"present_value.{i}")
    return _finish(builder.graph), Weights(decoder)


def _cache_inputs(
    builder: GraphBuilder, c: TextConfig, dtype: ir.DataType, max_length: int
) -> list[tuple[Value, Value]]:
    shape: list[int | str | None] = ["batch", c.num_key_value_heads, max_length, c.head_dim]

    def buffer(name: str) -> Value:
        return builder.input(name, dtype, shape)

    return [(buffer(f"past_key.{i}"), buffer(f"past_value.{i}")) for i in range(c.num_hidden_layers)]


def _builder(name: str) -> GraphBuilder:
    return GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name))


def _finish(graph: ir.Graph) -> ir.Model:
    for value in (*graph.inputs, *graph.outputs):
        meaning = MEANINGS.get(value.name or "")
        if meaning:
            value.doc_string = meaning
    for node in graph:
        node.metadata_props.pop("pkg.onnxscript.class_hierarchy", None)
        node.metadata_props.pop("pkg.onnxscript.name_scopes", None)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="onevision-edge")

"""What the tests of the network interpreter share: parsing, small graphs, bundles of every precision, their inputs."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onevision_edge.calibration.recipe import Methods
from onevision_edge.engines.interpreter.network import Network
from onevision_edge.precision.plan import Rule, default_plan

OPSET = 24
METHODS = Methods(smoothquant=False, awq=False, gptq=False)  # other numbers in the same graph, in a tenth of the time

# All that can be asked of a graph: every precision in either graph, heads of three kinds, both caches.
PLANS = {
    "int8": default_plan("int8", vision="int8", kv_cache="int8"),
    "int8-weight": default_plan("int8-weight", vision="int8-weight", lm_head="float"),
    "int4": default_plan("int4", vision="int4", kv_cache="int8"),
    "fp8": default_plan("fp8", vision="fp8", lm_head="fp8"),
    "nvfp4": default_plan("nvfp4", vision="nvfp4"),
    "float": default_plan("float", kv_cache="int8"),
}
# Linears that share an input but not its codes: each kind of codes is made once, by the first that wants it.
PLANS["mixed"] = default_plan("fp8", vision="int4", kv_cache="int8").with_rules(
    Rule("decoder", f"model.layers.*.{module}", precision)
    for module, precision in (("k_proj", "int8"), ("v_proj", "int8"), ("o_proj", "nvfp4"), ("gate_proj", "int4"))
)


def token_rows(placeholder: int = 60) -> dict[str, np.ndarray]:
    """Two rows of twelve tokens with an image of four each: the random checkpoint has no tokenizer."""
    random = np.random.default_rng(0)
    ids = random.integers(0, placeholder, (2, 12))
    ids[:, 2:6] = placeholder
    pixels = random.standard_normal((32, 588)).astype(np.float32)
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": np.array([[1, 4, 4]] * 2)}


def parsed(trt: Any, path: Path) -> SimpleNamespace:
    """A graph's network as TensorRT has it, as read, and what must outlive it."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    read = parser.parse_from_file(str(path))
    assert read, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return SimpleNamespace(logger=logger, builder=builder, parser=parser, trt=network, read=Network.read(trt, network))


def onnx_type(array: np.ndarray) -> int:
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))


def graph(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, np.ndarray],
    outputs: Sequence[str],
    constants: dict[str, np.ndarray] | None = None,
    free: Sequence[str] = (),
) -> Path:
    """Write a graph whose inputs have the shapes and types of arrays; those in `free` share a free first dimension."""

    def declared(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
        shape: list[Any] = list(array.shape)
        if name in free and array.ndim > 1:
            shape[0] = "batch"
        return helper.make_tensor_value_info(name, onnx_type(array), shape)

    stored = [tensor(name, array) for name, array in (constants or {}).items()]
    bare = [onnx.ValueInfoProto(name=name) for name in outputs]
    made = helper.make_graph(list(nodes), "g", [declared(n, a) for n, a in inputs.items()], bare, stored)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11)
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.save(typed, path)
    return path


def tensor(name: str, array: np.ndarray) -> onnx.TensorProto:
    """An initializer of any type; 4-bit values are packed."""
    from onevision_edge.precision.codes import pack

    return helper.make_tensor(name, onnx_type(array), array.shape, pack(array).tobytes(), raw=True)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """A node of space-separated inputs ("-": none) and outputs."""
    given = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, given, outputs.split(), name=f"part/{op}_{outputs.split()[0]}", **attributes)


def vision_inputs(read: Network, side: int = 4, images: int = 2) -> dict[str, np.ndarray]:
    """Random images of side x side patches."""
    types = {tensor.name: tensor.dtype for tensor in read.inputs}
    pixels = np.random.default_rng(1).standard_normal((images, side * side, 588)).astype(np.float32)
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    positions = np.stack([rows, columns], -1).reshape(side // 2, 2, side // 2, 2, 2).swapaxes(1, 2).reshape(-1, 2)
    return {"pixel_values": pixels.astype(types["pixel_values"]), "patch_positions": positions}


def decoder_inputs(
    read: Network, caches: dict[str, np.ndarray], embeds: np.ndarray, starts: Sequence[int]
) -> dict[str, np.ndarray]:
    """One call that appends embeds [batch, tokens, D] from each sequence's start on; every row's logits are wanted."""
    types = {tensor.name: tensor.dtype for tensor in read.inputs}
    tokens, begin = embeds.shape[1], np.array(starts)
    return {
        "inputs_embeds": embeds.astype(np.float32).astype(types["inputs_embeds"]),
        "position_ids": begin[:, None] + np.arange(tokens),
        "write_indices": begin,
        "valid_length": np.array([begin.max() + tokens]),
        "logits_indices": np.repeat(np.arange(tokens)[None], len(begin), axis=0),
        **caches,
    }


def empty_caches(read: Network, batch: int) -> dict[str, np.ndarray]:
    return {t.name: np.zeros((batch, *t.shape[1:]), t.dtype) for t in read.inputs if t.name.startswith("past_")}


def advance(caches: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
    """The caches of the next call: what the last one gave."""
    for name in caches:
        caches[name] = outputs[name.replace("past_", "present_")]

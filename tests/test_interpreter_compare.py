"""What a comparison must catch: networks that differ from the graph ONNX Runtime runs in one place, which it must name.

TensorRT parses the damaged graph, ONNX Runtime runs the sound one; in the first case the parser itself does the damage.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpreting as shared
import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onevision_edge
from onevision_edge.engines.interpreter import bounds
from onevision_edge.engines.interpreter.compare import Comparison, compare
from onevision_edge.engines.interpreter.network import Layer, Tensor
from onevision_edge.errors import OneVisionError

trt = pytest.importorskip(
    "tensorrt_rtx_bindings",
    reason="TensorRT-RTX is not installed: pip install --no-deps tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings",
)


node = shared.node
RNG = np.random.default_rng(0)
Damage = Callable[[onnx.GraphProto], None]


@pytest.fixture(scope="module")
def decoder(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float16 decoder of a random checkpoint whose key projection is square."""
    root = tmp_path_factory.mktemp("sound")
    made = tiny(text_config__hidden_size=64, text_config__head_dim=32, text_config__num_attention_heads=4)
    onevision_edge.export(made.write(root / "c"), root / "b", dtype="fp16", max_length=32, parts=["decoder"])
    return root / "b" / "decoder.onnx"


def damaged(sound: Path, damage: Damage, path: Path) -> Comparison:
    """The network of a damaged copy against the sound graph."""
    model = onnx.load(sound)
    damage(model.graph)
    onnx.save(model, path)
    read = shared.parsed(trt, path).read
    embeds = np.random.default_rng(3).standard_normal((2, 6, 64))
    inputs = shared.decoder_inputs(read, shared.empty_caches(read, 2), embeds, (0, 3))
    return compare(trt, read, sound, inputs)


def named(graph: onnx.GraphProto, part: str) -> onnx.NodeProto:
    """The first node whose name has a part."""
    return next(made for made in graph.node if part in made.name)


def test_a_sound_graph_has_no_departure(decoder: Path, tmp_path: Path) -> None:
    found = damaged(decoder, lambda graph: None, tmp_path / "g.onnx")
    assert found.first is None
    assert found.unused_inputs == found.unmatched == ()
    assert found.outputs["logits"] < 0.02
    assert 0 < max(found.stages.values()) < 0.02
    assert "model/layers.1/self_attn/q_proj" in found.stages


def test_a_dropped_length_input(tmp_path: Path) -> None:
    """The parser drops Attention's nonpad_kv_seqlen, and says nothing."""
    half = {name: RNG.standard_normal((2, 2, n, 16)).astype(np.float16) for name, n in (("q", 3), ("k", 8), ("v", 8))}
    inputs = {**half, "lengths": np.array([5, 8])}
    made = [node("Mul", "q q", "p"), node("Attention", "p k v - - - lengths", "y", scale=0.25)]
    path = shared.graph(tmp_path / "g.onnx", made, inputs, ["y"])
    read = shared.parsed(trt, path).read
    found = compare(trt, read, path, inputs)
    assert found.unused_inputs == ("lengths",)
    assert found.first is not None
    assert (found.first.tensor, found.first.what) == ("y", "value")
    assert found.first.excess > 20
    assert found.first.difference > 0.05
    # The same where every row counts: nothing departs, but the input is still told of.
    full = compare(trt, read, path, {**half, "lengths": np.array([8, 8])})
    assert full.first is None
    assert full.unused_inputs == ("lengths",)


def test_lengths_set_on_the_parsed_network(tmp_path: Path) -> None:
    """IAttention has an input for them, which the parser does not set: set by hand, nothing departs."""
    half = {name: RNG.standard_normal((2, 2, n, 16)).astype(np.float16) for name, n in (("q", 3), ("k", 8), ("v", 8))}
    path = shared.graph(
        tmp_path / "g.onnx",
        [node("Attention", "q k v - - - lengths", "y", scale=0.25)],
        {**half, "lengths": np.array([5, 8])},
        ["y"],
    )
    made = shared.parsed(trt, path)
    start = next(
        layer
        for layer in map(made.trt.get_layer, range(made.trt.num_layers))
        if layer.type == trt.LayerType.ATTENTION_INPUT
    )
    start.__class__ = trt.IAttentionInputLayer
    lengths = next(made.trt.get_input(i) for i in range(made.trt.num_inputs) if made.trt.get_input(i).name == "lengths")
    start.attention.key_value_lengths = made.trt.add_cast(lengths, trt.int32).get_output(0)
    found = compare(trt, made.trt, path, {**half, "lengths": np.array([5, 8])})
    assert found.first is None
    assert found.unused_inputs == ()
    assert found.compared == 1


def test_a_wrong_mask(decoder: Path, tmp_path: Path) -> None:
    def strict(graph: onnx.GraphProto) -> None:
        named(graph, "LessOrEqual").op_type = "Less"

    found = damaged(decoder, strict, tmp_path / "g.onnx")
    assert found.first is not None
    assert "LessOrEqual" in found.first.layer
    assert (found.first.tensor, found.first.excess) == ("v_model.LessOrEqual_8", np.inf)
    # Each layer runs on ONNX Runtime's mask, so nothing after it is blamed; the whole run shows the harm.
    assert len(found.departures) == 1
    assert not found.outputs["logits"] < 0.02  # tokens that see nothing are NaN


def test_a_mask_that_attention_does_not_get(decoder: Path, tmp_path: Path) -> None:
    def unmasked(graph: onnx.GraphProto) -> None:
        del named(graph, "layers.1/self_attn/Attention").input[3]

    found = damaged(decoder, unmasked, tmp_path / "g.onnx")
    assert found.first is not None
    assert found.first.stage == "model/layers.1/self_attn"
    assert "Attention_node" in found.first.layer
    assert found.first.excess > 20
    assert len(found.departures) == 1


def test_a_transposed_weight(decoder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"

    def transposed(graph: onnx.GraphProto) -> None:
        stored = next(tensor for tensor in graph.initializer if tensor.name == name)
        stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(stored).T), name))

    found = damaged(decoder, transposed, tmp_path / "g.onnx")
    assert [(d.layer, d.what) for d in found.departures] == [(name, "constant")]
    assert found.outputs["logits"] > 0.1


def test_a_weight_transposed_on_its_way(decoder: Path, tmp_path: Path) -> None:
    """The constant is right, the product is not."""
    name = "model.layers.1.self_attn.k_proj.weight"

    def turned(graph: onnx.GraphProto) -> None:
        made = named(graph, "layers.1/self_attn/k_proj/MatMul")
        made.input[1] = "turned"
        graph.node.insert(0, helper.make_node("Transpose", [name], ["turned"], perm=[1, 0]))

    found = damaged(decoder, turned, tmp_path / "g.onnx")
    assert found.first is not None
    assert "k_proj/MatMul" in found.first.layer
    assert found.first.excess > 100
    assert len(found.departures) == 1


def test_a_missing_cast_down_and_up(tmp_path: Path) -> None:
    """float32 through float16 and back, or not: the same types, 13 bits more."""
    inputs = {"x": RNG.standard_normal((4, 8)).astype(np.float32)}
    sound = [
        node("Neg", "x", "a"),
        node("Cast", "a", "b", to=10),
        node("Cast", "b", "c", to=1),
        node("Add", "c x", "y"),
    ]
    path = shared.graph(tmp_path / "g.onnx", sound, inputs, ["y"])
    without = [sound[0], node("Cast", "a", "c", to=1), sound[3]]
    read = shared.parsed(trt, shared.graph(tmp_path / "without.onnx", without, inputs, ["y"])).read
    found = compare(trt, read, path, inputs)
    assert found.first is not None
    assert (found.first.tensor, found.first.what, found.first.excess) == ("c", "value", np.inf)
    assert 0 < found.first.difference < 2**-10
    assert found.unmatched == ("b",)


def test_a_missing_cast_that_changes_a_type(decoder: Path, tmp_path: Path) -> None:
    """Rotary embedding in float16: its angles are cast, its input is not cast up."""

    def in_half(graph: onnx.GraphProto) -> None:
        made = named(graph, "layers.0/self_attn/RotaryEmbedding")
        up = next(other for other in graph.node if made.input[0] in other.output)
        made.input[0] = up.input[0]
        for index in (1, 2):
            cast = helper.make_node("Cast", [made.input[index]], [f"half_{index}"], to=10)
            made.input[index] = f"half_{index}"
            graph.node.insert(list(graph.node).index(made), cast)
        graph.node.remove(up)
        kept = [value for value in graph.value_info if value.name != made.output[0]]
        del graph.value_info[:]
        graph.value_info.extend(kept)

    found = damaged(decoder, in_half, tmp_path / "g.onnx")
    assert found.first is not None
    assert "layers.0/self_attn/RotaryEmbedding" in found.first.layer
    assert found.first.what == "type"
    assert len(found.unmatched) == 1


def test_another_epsilon(decoder: Path, tmp_path: Path) -> None:
    def larger(graph: onnx.GraphProto) -> None:
        made = named(graph, "layers.1/input_layernorm")
        next(attribute for attribute in made.attribute if attribute.name == "epsilon").f = 1e-2

    found = damaged(decoder, larger, tmp_path / "g.onnx")
    assert found.first is not None
    assert found.first.stage == "model/layers.1/input_layernorm"
    assert len(found.departures) == 1


def test_another_shape(tmp_path: Path) -> None:
    inputs = {"x": RNG.standard_normal((4, 4)).astype(np.float32)}
    path = shared.graph(
        tmp_path / "g.onnx", [node("ReduceSum", "x a", "y", keepdims=1)], inputs, ["y"], {"a": np.array([1])}
    )
    flat = shared.graph(
        tmp_path / "f.onnx", [node("ReduceSum", "x a", "y", keepdims=0)], inputs, ["y"], {"a": np.array([1])}
    )
    found = compare(trt, shared.parsed(trt, flat).read, path, inputs)
    assert found.first is not None
    assert found.first.what == "shape"
    assert "another shape" in str(found.first)


def test_infinity_is_not_close(tmp_path: Path) -> None:
    """A float16 product that overflows in the place of a quotient that does not."""
    inputs = {"x": np.full((1, 4), 300, np.float16)}
    path = shared.graph(tmp_path / "g.onnx", [node("Div", "x x", "y")], inputs, ["y"])
    large = shared.graph(tmp_path / "l.onnx", [node("Mul", "x x", "y")], inputs, ["y"])
    found = compare(trt, shared.parsed(trt, large).read, path, inputs)
    assert found.first is not None
    assert found.first.difference == np.inf


# Bounds


@pytest.mark.parametrize("terms", [16, 1024, 9728])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_product_s_bound_holds_and_is_not_idle(dtype: Any, terms: int) -> None:
    """Sums in another order stay within it, and a product one value of which is off by 1/16 does not."""
    a, b = (RNG.standard_normal(shape).astype(np.float32).astype(dtype) for shape in ((8, terms), (terms, 8)))
    layer = Layer(
        "MATRIX_MULTIPLY", "l", ("a", "b"), (Tensor("y", np.dtype(dtype), (8, 8)),), {"op0": "NONE", "op1": "NONE"}
    )
    first, second = a.astype(np.float32), b.astype(np.float32)
    y = (first @ second).astype(dtype)
    allowed = bounds.error(layer, [a, b], [None, None], y)
    assert allowed is not None
    allowed = allowed + bounds.rounding(y)
    backwards = np.zeros((8, 8), np.float32)
    for k in range(terms - 1, -1, -1):
        backwards += np.outer(first[:, k], second[k])
    difference = np.abs(backwards.astype(dtype).astype(np.float32) - y.astype(np.float32))
    assert (difference <= allowed).all()
    damaged_row = first.copy()
    damaged_row[:, 0] += 1
    off = np.abs((damaged_row @ second).astype(dtype).astype(np.float32) - y.astype(np.float32))
    if not (dtype == ml_dtypes.bfloat16 and terms > 1024):  # there 1/256 of the sum is more than one value of it
        assert (off > allowed).any()


def test_an_unknown_way_of_errors_is_refused() -> None:
    layer = Layer("UNARY", "l", ("x",), (Tensor("y", np.dtype(np.float32), (1,)),), {"op": "EXP"})
    x = np.ones(1, np.float32)
    with pytest.raises(OneVisionError, match=r"layer l \(UNARY\): no bound is known"):
        bounds.error(layer, [x], [x * np.float32(1e-7)], x)


def test_a_node_that_onnx_runtime_cannot_run(tmp_path: Path) -> None:
    inputs = {"x": np.ones((2, 3), np.float32)}
    path = shared.graph(tmp_path / "g.onnx", [node("Relu", "x", "y")], inputs, ["y"])
    read = shared.parsed(trt, path).read
    model = onnx.load(path)
    model.graph.node[0].op_type = "Unheard"
    onnx.save(model, path)
    with pytest.raises(OneVisionError, match=r"g\.onnx: ONNX Runtime cannot run node part/Relu_y"):
        compare(trt, read, path, inputs)

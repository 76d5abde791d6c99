"""From graphs to programs: every precision's patterns become the steps that they should; edited ones are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import interpreting
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper

import onevision_edge
from onevision_edge.bundle import Bundle
from onevision_edge.engines.cpu import pack
from onevision_edge.engines.cpu.build import build_cpu
from onevision_edge.engines.cpu.compile import COMPILERS
from onevision_edge.engines.cpu.graph import Graph, MismatchError
from onevision_edge.engines.cpu.patterns import attention, linear, residual
from onevision_edge.engines.cpu.program import ALIGNMENT, Program, WeightsFile
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.plan import Plan, Rule, default_plan
from onevision_edge.runtime.cpu_library import Library

# Wide enough for INT4's blocks of 128, and a tower whose rows are narrower than one.
WIDTHS = {
    "text_config__hidden_size": 128,
    "text_config__intermediate_size": 256,
    "text_config__head_dim": 32,
    "vision_config__hidden_size": 64,
    "vision_config__intermediate_size": 128,
}
# By precision: bytes' products of a layer, by the values of a row that share a scale; and how far logits may be from
# the plain graph's without other rounding (relative L2 norm). Each rounding of rows to INT8 adds an error of about
# 0.6 % (a step of the largest of some hundred normals, / sqrt 12), each layer has six of them with attention's: 2 to
# 3 % after four layers of two graphs. A graph that rounds rows itself, by static scales, doubles that; FP8's rows,
# which the cpu engine does not round, are off by 2.5 % each there. Doubled for other machines' sums.
PLANS: dict[str, tuple[Plan, float]] = {
    "fp32": (default_plan("float", "fp32"), 0.03),
    "fp16": (default_plan("float", "fp16"), 0.03),
    "int8": (default_plan("int8", vision="int8"), 0.08),
    "int8-weight": (default_plan("int8-weight", vision="int8-weight"), 0.05),
    "int4": (default_plan("int4", vision="int4"), 0.05),
    "fp8": (default_plan("fp8", vision="fp8"), 0.16),
    "nvfp4": (default_plan("nvfp4", vision="nvfp4"), 0.03),
    "cache": (default_plan("float", kv_cache="int8"), 0.03),
    "int4 and cache": (default_plan("int4", "fp32", kv_cache="int8"), 0.05),
    "mixed": (interpreting.PLANS["mixed"], 0.08),
}
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def bundle(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random checkpoint's bundle under a plan, made once; changes are those of the checkpoint."""
    root = tmp_path_factory.mktemp("compiled")
    np.savez(root / "rows.npz", **interpreting.token_rows())

    def made(plan: Plan, **changes: Any) -> Path:
        checkpoint, path = (root / f"{kind}{abs(hash((repr(plan), repr(changes))))}" for kind in "cb")
        if not path.exists():
            source = tiny(**{**WIDTHS, **changes}).write(checkpoint)
            if not plan.quantized:
                onevision_edge.export(source, path, dtype=plan.dtype, max_length=64)
            else:
                data: dict[str, Any] = {"calibration": root / "rows.npz", "calibration_samples": 2, "evaluate": False}
                methods = interpreting.METHODS
                onevision_edge.quantize(source, path, plan=plan, methods=methods, max_length=64, threads=1, **data)
        return path

    return made


def compiled_program(path: Path, part: str, folder: Path, floats: str = "bf16") -> Program:
    """A graph's program; its weights are written into a folder."""
    opened = Bundle.open(path)
    file = WeightsFile(folder / "weights")
    try:
        return COMPILERS[part](Graph(opened.path(opened.graph(part).file)), floats, file, lambda *_: None)
    finally:
        file.close()


def steps_of(program: Program, op: str) -> list[dict[str, Any]]:
    return [step for step in program.steps if step["op"] == op]


def difference(path: Path, **rows: np.ndarray) -> float:
    """Of logits from the plain graph's, relative."""
    ours = onevision_edge.load(path, engines="cpu", threads=1).logits(**rows)
    theirs = onevision_edge.load(path, engines=False, exact=True, threads=1).logits(**rows)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


# Every precision


@pytest.mark.parametrize("precision", PLANS)
def test_every_precision_answers_as_its_graph(bundle: Made, compiled: Callable[[str], Library], precision: str) -> None:
    plan, limit = PLANS[precision]
    path = bundle(plan)
    build_cpu(path, floats="fp32", check=False, overwrite=True)
    assert 0 < difference(path, **interpreting.token_rows()) < limit


@pytest.mark.parametrize("floats", ["fp32", "bf16", "int8"])
def test_floats_run_as_asked(bundle: Made, compiled: Callable[[str], Library], tmp_path: Path, floats: str) -> None:
    """Coarser floats add their own rounding: 8 bits of BF16, or INT8's."""
    path = bundle(PLANS["fp16"][0])
    kinds = {"fp32": {"floats"}, "bf16": {"pairs"}, "int8": {"codes8"}}[floats]
    for part in ("vision", "decoder"):
        found = [step["weights"] for step in steps_of(compiled_program(path, part, tmp_path, floats), "product")]
        assert set(found[1:]) == kinds
        assert found[0] == ("pairs" if (floats, part) == ("int8", "vision") else next(iter(kinds)))  # it reads pixels
    build_cpu(path, floats=floats, check=False, overwrite=True)
    assert difference(path, **interpreting.token_rows()) < {"fp32": 0.03, "bf16": 0.04, "int8": 0.07}[floats]


@pytest.mark.parametrize(
    ("precision", "layers", "head"),
    [
        ("int8", {("codes8", 128), ("codes8", 256)}, ("codes8", 128)),
        ("int8-weight", {("codes8", 128), ("codes8", 256)}, ("codes8", 128)),
        ("int4", {("codes4", 128)}, ("codes8", 128)),
        ("fp8", {("pairs", 2)}, ("codes8", 128)),
        ("nvfp4", {("pairs", 2)}, ("codes8", 128)),
        ("fp16", {("pairs", 2)}, ("pairs", 2)),
    ],
)
def test_products_run_in_the_codes_that_are_stored(
    bundle: Made, tmp_path: Path, precision: str, layers: set[tuple[str, int]], head: tuple[str, int]
) -> None:
    """Three products of four in a layer are merged ones; a bundle's static scales round the rows."""
    program = compiled_program(bundle(PLANS[precision][0]), "decoder", tmp_path)
    products = steps_of(program, "product")
    assert {(step["weights"], step["group"]) for step in products[:-1]} == layers
    assert (products[-1]["weights"], products[-1]["group"]) == head
    assert [step["epilogue"] for step in products] == ["write", "add", "gated", "add"] * 2 + ["write"]
    assert [step["n"] for step in products[:4]] == [256, 128, 256, 128]
    static = [step.get("scale", 0) > 0 for step in steps_of(program, "rows")]
    assert static == [precision == "int8"] * 8 + [False]
    assert [step["op"] for step in program.steps[:5]] == ["rows", "product", "heads", "attention", "rows"]
    assert (program.layers, program.heads, program.kv_heads, program.head_dim) == (2, 4, 2, 32)


@pytest.mark.parametrize(("inputs", "block"), [(96, 32), (256, 128)])
def test_int4_keeps_its_blocks(bundle: Made, tmp_path: Path, inputs: int, block: int) -> None:
    path = bundle(default_plan("int4"), text_config__hidden_size=inputs)
    first = steps_of(compiled_program(path, "decoder", tmp_path), "product")[0]
    assert (first["weights"], first["group"]) == ("codes4", block)


def test_rows_that_are_joined_are_rounded_one_by_one(bundle: Made, tmp_path: Path) -> None:
    """The merger reads four rows of 64 as one of 256, whose weights share scales by 128."""
    program = compiled_program(bundle(PLANS["int4"][0]), "vision", tmp_path)
    (rows,) = (step for step in steps_of(program, "rows") if step.get("skip_first"))
    assert (rows["n"], rows["k"], rows["group"]) == (256, 64, 64)


def test_queries_keys_and_values_of_different_precisions(
    bundle: Made, compiled: Callable[[str], Library], tmp_path: Path
) -> None:
    """Products of their own, side by side; and so are gate and up."""
    rules = (
        Rule("decoder", f"model.layers.*.{module}", precision)
        for module, precision in (
            ("k_proj", "int8"),
            ("v_proj", "fp8"),
            ("up_proj", "int8-weight"),
            ("o_proj", "float"),
        )
    )
    path = bundle(default_plan("int4").with_rules(rules))
    program = compiled_program(path, "decoder", tmp_path)
    products = steps_of(program, "product")[:7]
    placed = [(step["weights"], step["column"], step["n"], step["stride"]) for step in products]
    assert placed == [
        ("codes4", 0, 128, 256),
        ("codes8", 128, 64, 256),
        ("pairs", 192, 64, 256),
        ("pairs", 0, 128, 128),
        ("codes4", 0, 256, 512),
        ("codes8", 256, 256, 512),
        ("codes4", 0, 128, 128),
    ]
    assert [step.get("prologue") for step in steps_of(program, "rows")[:7]] == [
        *["rms_norm"] * 3,
        None,
        *["rms_norm"] * 2,
        "swiglu",
    ]
    build_cpu(path, check=False, overwrite=True)
    assert difference(path, **interpreting.token_rows()) < 0.08


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_attention_with_biases(bundle: Made, compiled: Callable[[str], Library], tmp_path: Path, dtype: str) -> None:
    path = bundle(default_plan("float", dtype), text_config__attention_bias=True)
    products = steps_of(compiled_program(path, "decoder", tmp_path), "product")
    assert [("b" in step) for step in products[:4]] == [True, True, False, False]
    build_cpu(path, floats="fp32", check=False, overwrite=True)
    assert difference(path, **interpreting.token_rows()) < 0.03


@pytest.mark.parametrize(
    ("activation", "epilogue"),
    [("gelu", "gelu"), ("quick_gelu", "quick_gelu"), ("gelu_pytorch_tanh", "gelu_tanh")],
)
def test_every_activation_of_the_tower(
    bundle: Made, compiled: Callable[[str], Library], tmp_path: Path, activation: str, epilogue: str
) -> None:
    """The merger's is the exact one, whatever the blocks have."""
    path = bundle(PLANS["fp32"][0], vision_config__hidden_act=activation)
    found = [step["epilogue"] for step in steps_of(compiled_program(path, "vision", tmp_path), "product")]
    assert found == ["write", *["write", "add", epilogue, "add"] * 2, "gelu", "write"]
    build_cpu(path, floats="fp32", check=False, overwrite=True)
    assert difference(path, **interpreting.token_rows()) < 0.03


def test_widths_that_no_code_divides(bundle: Made, compiled: Callable[[str], Library], tmp_path: Path) -> None:
    """INT8 comes four to a unit; products of other widths run in BF16."""
    path = bundle(PLANS["int8-weight"][0], text_config__intermediate_size=42, text_config__hidden_size=30)
    products = steps_of(compiled_program(path, "decoder", tmp_path), "product")
    assert [step["weights"] for step in products[:4]] == ["pairs", "codes8", "pairs", "pairs"]
    build_cpu(path, check=False, overwrite=True)
    assert difference(path, **interpreting.token_rows()) < 0.05


@pytest.mark.parametrize("changes", [{"text_config__head_dim": 24}, {"text_config__head_dim": 272}])
def test_heads_that_no_vector_divides_are_refused(bundle: Made, tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(MismatchError, match=f"4 heads of {changes['text_config__head_dim']} over 2, where the cpu"):
        compiled_program(bundle(PLANS["fp32"][0], **changes), "decoder", tmp_path)


# Files


def test_a_program_lies_in_its_file(bundle: Made, tmp_path: Path) -> None:
    """Weights begin at a vector, within the file, and two vectors may be read behind them."""
    program = compiled_program(bundle(PLANS["int4"][0]), "decoder", tmp_path)
    size = (tmp_path / "weights").stat().st_size
    places = [step[name] for step in program.steps for name in ("w", "s", "b") if name in step]
    assert all(place % ALIGNMENT == 0 and place + 2 * ALIGNMENT <= size for place in places)
    assert json.loads(json.dumps(program.steps)) == program.steps


def test_equal_small_arrays_are_stored_once(tmp_path: Path) -> None:
    file = WeightsFile(tmp_path / "weights")
    ones, large = np.ones(16, np.float32), np.zeros(1 << 15, np.float32)
    assert [file.add(ones), file.add(np.zeros(1)), file.add(ones.copy())] == [0, 64, 0]
    assert file.add(large) != file.add(large)
    file.close()
    assert (tmp_path / "weights").stat().st_size == file.size == 128 + 2 * large.nbytes + 2 * ALIGNMENT


# Layouts, by plain loops

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 70))


@settings(deadline=None, max_examples=20)
@given(SHAPES, st.integers(0, 9))
def test_packed_int8_and_int4_are_the_definition(shape: tuple[int, int], seed: int) -> None:
    inputs, outputs = 8 * shape[0], shape[1]
    random = np.random.default_rng(seed)
    codes = random.integers(-128, 128, (inputs, outputs), np.int8)
    eight = pack.pack_int8(codes)
    nibbles = random.integers(-8, 8, (inputs, outputs), np.int8)
    four = pack.pack_int4(nibbles)
    panels = -(-outputs // 32)
    assert (eight.shape, four.shape) == ((panels, inputs // 4, 32, 4), (panels, inputs // 8, 32, 4))
    for panel, row, lane in product(range(panels), range(inputs), range(32)):
        column, unit = 32 * panel + lane, row // 4
        inside = column < outputs
        assert eight[panel, unit, lane, row % 4] == (int(codes[row, column]) + 128 if inside else 128)
        both = int(four[panel, unit // 2, lane, row % 4])
        assert (both >> 4 if unit % 2 else both & 15) == (int(nibbles[row, column]) + 8 if inside else 8)


@settings(deadline=None, max_examples=20)
@given(SHAPES, st.integers(0, 9))
def test_packed_floats_and_scales_are_the_definition(shape: tuple[int, int], seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    pairs, floats, scales = pack.pack_bf16(matrix), pack.pack_fp32(matrix), pack.pack_scales(matrix)
    panels = -(-shape[1] // 32)
    assert pairs.shape == (panels, -(-shape[0] // 2), 32, 2)
    assert floats.shape == scales.shape == (panels, shape[0], 32)
    for panel, row, lane in product(range(panels), range(2 * pairs.shape[1]), range(32)):
        column = 32 * panel + lane
        value = matrix[row, column] if row < shape[0] and column < shape[1] else np.float32(0)
        assert pairs[panel, row // 2, lane, row % 2] == pack.bf16_bits(np.array([value]))[0]
        if row < shape[0]:
            assert floats[panel, row, lane] == scales[panel, row, lane] == value


@given(st.floats(-(2.0**127), 2.0**127, width=32))
def test_bf16_is_rounded_half_to_even(value: float) -> None:
    import ml_dtypes

    one = np.float32([value])
    assert pack.bf16_bits(one)[0] == one.astype(ml_dtypes.bfloat16).view(np.uint16)[0]


@given(st.integers(1, 3), st.integers(1, 40))
def test_gated_columns_alternate_by_sixteens(rows: int, columns: int) -> None:
    gate = np.arange(1, rows * columns + 1).reshape(rows, columns)
    found = pack.gated(gate, -gate)
    assert found.shape == (rows, -(-columns // 16) * 32)
    for row, column in product(range(rows), range(found.shape[1])):
        own = column // 32 * 16 + column % 16
        value = gate[row, own] if own < columns else 0
        assert found[row, column] == (value if column // 16 % 2 == 0 else -value)


# Graphs that are edited by hand


class Edited:
    """A part's graph in a folder of its own, to be changed."""

    def __init__(self, path: Path, part: str, folder: Path) -> None:
        opened = Bundle.open(path)
        self.part, self.folder = part, folder
        self.source = opened.path(opened.graph(part).file)
        self.model = onnx.load(self.source, load_external_data=False)
        data = self.source.with_name(self.source.name + ".data")
        (folder / data.name).symlink_to(data)

    def node(self, op: str, name: str = "", index: int = 0) -> NodeProto:
        """The node of a kind whose first output has a name's words in it."""
        return [n for n in self.model.graph.node if n.op_type == op and name in n.output[0]][index]

    def refused(self) -> str:
        """Why the graph, as it is now, is not compiled."""
        onnx.save(self.model, self.folder / self.source.name)
        file = WeightsFile(self.folder / "weights")
        with pytest.raises(MismatchError) as refusal:
            COMPILERS[self.part](Graph(self.folder / self.source.name), "bf16", file, lambda *_: None)
        file.discard()
        return str(refusal.value)


@pytest.fixture
def edited(bundle: Made, tmp_path: Path) -> Callable[..., Edited]:
    def opened(part: str = "decoder", precision: str = "fp16") -> Edited:
        return Edited(bundle(PLANS[precision][0]), part, tmp_path)

    return opened


@pytest.mark.parametrize(
    ("part", "op", "name", "other"),
    [
        ("decoder", "Sigmoid", "layers.1.mlp", "Tanh"),
        ("decoder", "Mul", "layers.0.mlp", "Div"),
        ("decoder", "RMSNormalization", "layers.1.input_layernorm", "LpNormalization"),
        ("decoder", "MatMul", "layers.0.self_attn.k_proj", "MatMulInteger"),
        ("decoder", "MatMul", "layers.0.mlp.down_proj", "Gemm"),
        ("decoder", "RotaryEmbedding", "layers.1.self_attn", "Identity"),
        ("decoder", "TensorScatter", "present_value.1", "Identity"),
        ("decoder", "Slice", "layers.0.self_attn", "Identity"),
        ("decoder", "Attention", "layers.0.self_attn", "Identity"),
        ("decoder", "Cos", "", "Tan"),
        ("decoder", "GatherND", "", "Gather"),
        ("vision", "Gelu", "blocks.1.mlp", "Relu"),
        ("vision", "Gelu", "merger", "Elu"),
        ("vision", "LayerNormalization", "merger", "Softmax"),
        ("vision", "Split", "blocks.0", "Identity"),
        ("vision", "Attention", "blocks.1", "Identity"),
        ("vision", "Concat", "visual.Concat_4", "Sum"),
    ],
)
def test_a_node_of_another_kind_is_refused(
    edited: Callable[..., Edited], part: str, op: str, name: str, other: str
) -> None:
    """By the name of the value that it makes, or of one that is made of it."""
    graph = edited(part)
    node = graph.node(op, name)
    names = set(node.output)
    for _ in range(3):
        names.update(o for n in graph.model.graph.node if names & set(n.input) for o in n.output)
    node.op_type = other
    message = graph.refused()
    assert str(graph.folder / graph.source.name) in message
    assert any(value in message for value in names), message


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_a_transpose_by_another_order_is_refused(edited: Callable[..., Edited], precision: str, index: int) -> None:
    """Of queries, keys (in plain products twice), values and merged heads."""
    graph = edited("decoder", precision)
    node = graph.node("Transpose", "layers.1.self_attn", index)
    perm = list(helper.get_attribute_value(node.attribute[0]))
    node.attribute[0].CopyFrom(helper.make_attribute("perm", [*perm[:-2], perm[-1], perm[-2]]))
    assert f"{node.output[0]} is transposed by" in graph.refused()


@pytest.mark.parametrize("precision", ["fp16", "fp32", "cache"])
def test_another_mask_is_refused(edited: Callable[..., Edited], precision: str) -> None:
    """A mask by other positions, of another comparison, or none."""
    graph = edited("decoder", precision)
    compared = graph.node("LessOrEqual")
    unsqueezed = next(n for n in graph.model.graph.node if n.output[0] == compared.input[1])
    unsqueezed.input[0] = "write_indices"
    assert f"the mask {compared.output[0]} is not of position_ids" in graph.refused()
    unsqueezed.input[0] = "position_ids"
    compared.op_type = "Less"
    assert f"{compared.output[0]} is made by Less" in graph.refused()
    compared.op_type = "LessOrEqual"
    if precision == "fp16":
        node = graph.node("Attention", "layers.1")
        del node.input[3:]
        merged = next(
            n for n in graph.model.graph.node if n.op_type == "Reshape" and "layers.1.self_attn" in n.input[0]
        )
        assert "is attention without a mask" in graph.refused()
        assert merged.output


def test_a_tower_with_a_mask_is_refused(edited: Callable[..., Edited]) -> None:
    graph = edited("vision")
    graph.node("Attention", "blocks.0").input.append("patch_positions")
    assert "is attention with a mask" in graph.refused()


def test_other_angles_are_refused(edited: Callable[..., Edited]) -> None:
    graph = edited()
    node = graph.node("RotaryEmbedding", "layers.0")
    cosines, sines = node.input[1], node.input[2]
    node.input[2] = cosines
    assert f"{cosines} is made by Cos" in graph.refused()
    node.input[2] = sines
    node.attribute.append(helper.make_attribute("interleaved", 1))
    assert f"{node.output[0]} is not turned by one angle" in graph.refused()
    node.attribute.pop()
    graph.node("Cast", "model.Cast").input[0] = "write_indices"
    assert "its angles are not of position_ids" in graph.refused()


def test_other_streams_are_refused(edited: Callable[..., Edited]) -> None:
    """A layer that reads another layer's sum, an MLP whose halves read different values."""
    graph = edited()
    first, second = (graph.node("RMSNormalization", f"layers.{i}.post_attention") for i in (0, 1))
    stream = second.input[0]
    second.input[0] = first.input[0]
    assert "does not read the normalised stream alone" in graph.refused()
    second.input[0] = stream
    graph.node("MatMul", "layers.0.mlp.up_proj").input[0] = graph.node("RMSNormalization", "layers.0.input").output[0]
    assert "model.layers.0.mlp.down_proj.weight does not read the normalised stream" in graph.refused()


def test_weights_outside_their_file_are_refused(edited: Callable[..., Edited]) -> None:
    graph = edited()
    (graph.folder / "decoder.onnx.data").unlink()
    (graph.folder / "decoder.onnx.data").write_bytes(bytes(100))
    onnx.save(graph.model, graph.folder / "decoder.onnx")
    opened = Graph(graph.folder / "decoder.onnx")
    with pytest.raises(OneVisionError, match=r"lm_head.weight lies beyond the end of decoder.onnx.data"):
        opened.constant("lm_head.weight")
    (graph.folder / "decoder.onnx.data").unlink()
    with pytest.raises(OneVisionError, match="which is no file beside it"):
        Graph(graph.folder / "decoder.onnx").constant("lm_head.weight")
    with pytest.raises(MismatchError, match="logits is computed where the cpu engine knows constants alone"):
        opened.constant("logits")


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "decoder.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(OneVisionError, match="is not an ONNX graph"):
        Graph(tmp_path / "decoder.onnx")


def test_patterns_describe_what_they_read(bundle: Made) -> None:
    """One layer, pattern by pattern, under a quantised cache and static scales."""
    path = bundle(replace(PLANS["int8"][0], kv_cache="int8"))
    graph = Graph(path / "decoder.onnx")
    head = linear(graph, graph.root("logits"))
    assert (head.weight.startswith("lm_head"), head.scale, head.bias) == (True, None, None)
    stream, added = residual(graph, graph.root(graph.made_by(next(_last(graph)), "GatherND").input[0])) or ("", "")
    down = linear(graph, added)
    assert down.weight.startswith("model.layers.1.mlp.down_proj.weight")
    assert down.scale is not None
    assert down.scale > 0
    pair = residual(graph, stream)
    assert pair is not None
    found = attention(graph, linear(graph, pair[1]).source)
    assert (found.heads, found.kv_heads, found.head_dim, found.cache) == (4, 2, 32, "past_key.1")
    assert found.scale == pytest.approx(32**-0.5)
    assert found.query.norm is not None
    assert found.query.norm.eps == pytest.approx(1e-6)
    assert (found.value.norm, found.value.cosines) == (None, None)
    assert found.query.cosines == found.key.cosines


def _last(graph: Graph) -> Any:
    head = linear(graph, graph.root("logits"))
    yield graph.made_by(head.source, "RMSNormalization").input[0]

"""Other checkpoints of the family against a float64 forward pass; broken ones against their refusal."""

import json
import struct
import tempfile
from collections.abc import Callable, Mapping
from math import erf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import onevision_edge
from onevision_edge.errors import OneVisionError
from onevision_edge.export.checkpoint import Checkpoint, locate, read_safetensors_header

Tiny = Callable[..., Any]


# The model in float64, from its specification: one image, one sequence, no cache.


def layer_norm(x: np.ndarray, w: Mapping[str, np.ndarray], name: str, eps: float) -> np.ndarray:
    x = x - x.mean(1, keepdims=True)
    return x / np.sqrt((x**2).mean(1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x * weight / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def linear(x: np.ndarray, w: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    weight = w[f"{name}.weight"]
    return x @ weight.reshape(len(weight), -1).T + w.get(f"{name}.bias", 0.0)


def turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotary embedding: the halves of each head are the parts of complex numbers, turned by the angles."""
    real, imaginary = np.split(x, 2, axis=-1)
    z = (real + 1j * imaginary) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """[heads, tokens, d] queries over [kv_heads, tokens, d] keys and values -> [tokens, heads * d]."""
    k, v = (np.repeat(x, len(q) // len(k), axis=0) for x in (k, v))
    scores = np.exp(np.einsum("hid,hjd->hij", q, k) / np.sqrt(q.shape[-1]))
    scores = np.tril(scores) if causal else scores
    weights = scores / scores.sum(-1, keepdims=True)
    return np.einsum("hij,hjd->ihd", weights, v).reshape(q.shape[1], -1)


GELU: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def image_embeds(
    c: Mapping[str, Any], w: Mapping[str, np.ndarray], rows: np.ndarray, height: int, width: int
) -> np.ndarray:
    heads, merge, eps = c["num_heads"], c["spatial_merge_size"], c["layer_norm_eps"]
    head_dim = c["hidden_size"] // heads
    cells = np.arange(height * width).reshape(height // merge, merge, width // merge, merge)
    row, column = np.divmod(cells.transpose(0, 2, 1, 3).ravel(), width)
    frequencies = 10000.0 ** (-np.arange(head_dim // 4) / (head_dim / 4))
    angles = np.hstack([np.outer(row, frequencies), np.outer(column, frequencies)])
    angles = np.vstack([w["visual.class_pos_emb"], angles])
    x = np.vstack([w["visual.class_embedding"], linear(rows, w, "visual.patch_embed.proj")])
    x = layer_norm(x, w, "visual.pre_layernorm", eps)
    for i in range(c["depth"]):
        block = f"visual.blocks.{i}"
        qkv = linear(layer_norm(x, w, f"{block}.norm1", 1e-5), w, f"{block}.attn.qkv")
        q, k, v = qkv.reshape(len(x), 3, heads, head_dim).transpose(1, 2, 0, 3)
        x = x + linear(attend(turned(q, angles), turned(k, angles), v, False), w, f"{block}.attn.proj")
        y = linear(layer_norm(x, w, f"{block}.norm2", 1e-5), w, f"{block}.mlp.fc1")
        x = x + linear(GELU[c["hidden_act"]](y), w, f"{block}.mlp.fc2")
    joined = layer_norm(x[1:], w, "visual.merger.ln_q", eps).reshape(height * width // merge**2, -1)
    return linear(GELU["gelu"](linear(joined, w, "visual.merger.mlp.0")), w, "visual.merger.mlp.2")


def decoder_logits(c: Mapping[str, Any], w: Mapping[str, np.ndarray], x: np.ndarray, theta: float) -> np.ndarray:
    head_dim, eps = c["head_dim"], c["rms_norm_eps"]
    angles = np.outer(np.arange(len(x)), theta ** (-np.arange(head_dim // 2) / (head_dim / 2)))
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = rms_norm(x, w[f"{layer}.input_layernorm.weight"], eps)
        q, k, v = (
            linear(y, w, f"{layer}.self_attn.{p}_proj").reshape(len(x), -1, head_dim).transpose(1, 0, 2) for p in "qkv"
        )
        q = turned(rms_norm(q, w[f"{layer}.self_attn.q_norm.weight"], eps), angles)
        k = turned(rms_norm(k, w[f"{layer}.self_attn.k_norm.weight"], eps), angles)
        x = x + linear(attend(q, k, v, True), w, f"{layer}.self_attn.o_proj")
        y = rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        gate = linear(y, w, f"{layer}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, w, f"{layer}.mlp.up_proj"), w, f"{layer}.mlp.down_proj")
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T


def expected_logits(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> np.ndarray:
    w = {name: values.astype(np.float64) for name, values in tensors.items()}
    text, ids = config["text_config"], inputs["input_ids"][0]
    x = w["model.embed_tokens.weight"][ids]
    _, height, width = inputs["image_grid_thw"][0]
    x[ids == config["image_token_id"]] = image_embeds(config["vision_config"], w, inputs["pixel_values"], height, width)
    theta = text.get("rope_theta") or text["rope_parameters"]["rope_theta"]
    return decoder_logits(text, w, x, theta)


def one_image(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Random pixel rows of one image of 2 x 3 merged tokens between random text."""
    rng, v = np.random.default_rng(1), config["vision_config"]
    merge = v["spatial_merge_size"]
    text = rng.integers(0, 50, 9)
    ids = np.concatenate([text[:4], np.full(6, config["image_token_id"]), text[4:]])
    rows = rng.standard_normal((6 * merge**2, v["in_channels"] * v["patch_size"] ** 2)).astype(np.float32)
    return {
        "input_ids": ids[None],
        "pixel_values": rows,
        "image_grid_thw": np.array([[1, 2 * merge, 3 * merge]]),
    }


def assert_logits_right(checkpoint: Path, config: Mapping[str, Any], tensors: Any, tmp_path: Path) -> None:
    onevision_edge.export(checkpoint, tmp_path / "bundle", dtype="fp32", max_length=32)
    inputs = one_image(config)
    logits = onevision_edge.load(tmp_path / "bundle", threads=1).logits(**inputs)[0]
    expected = expected_logits(config, tensors, inputs)
    assert np.abs(expected).max() > 1
    assert np.abs(logits - expected).max() < 1e-4


FAMILY: dict[str, dict[str, Any]] = {
    "as it is": {},
    "tied head": {"tied": True},
    "attention bias": {"text_config__attention_bias": True},
    "one query head per key head": {"text_config__num_key_value_heads": 4},
    "one key head": {"text_config__num_key_value_heads": 1},
    "head_dim": {"text_config__head_dim": 10},
    "epsilons": {"text_config__rms_norm_eps": 0.3, "vision_config__layer_norm_eps": 0.2},
    "rope_theta": {"text_config__rope_theta": 77.0},
    "rope_parameters": {
        "text_config__rope_theta": None,
        "text_config__rope_parameters": {"rope_theta": 50.0, "rope_type": "default"},
    },
    "ids": {"image_token_id": 3, "video_token_id": 2, "text_config__vocab_size": 55},
    "merge of 3": {"vision_config__spatial_merge_size": 3},
    "no merge": {"vision_config__spatial_merge_size": 1},
    "patches and channels": {"vision_config__patch_size": 5, "vision_config__in_channels": 1},
    "vision heads": {"vision_config__num_heads": 4, "vision_config__depth": 1},
    "tanh gelu": {"vision_config__hidden_act": "gelu_pytorch_tanh"},
    "quick gelu": {"vision_config__hidden_act": "quick_gelu"},
}


@pytest.mark.parametrize("changes", FAMILY.values(), ids=list(FAMILY))
def test_every_number_comes_from_the_config(tiny: Tiny, tmp_path: Path, changes: dict[str, Any]) -> None:
    made = tiny(**changes)
    assert_logits_right(made.write(tmp_path / "c"), made.config, made.tensors, tmp_path)


@pytest.mark.parametrize("long_names", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_published_forms(tiny: Tiny, tmp_path: Path, dtype: str, shards: int, long_names: bool) -> None:
    made = tiny()
    directory = made.write(tmp_path / "c", dtype, long_names, shards)
    rounded = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): values
        for path in directory.glob("*.safetensors")
        for name, values in load_file(path).items()
    }
    assert rounded.keys() == made.tensors.keys()
    assert_logits_right(directory, made.config, rounded, tmp_path)


def test_values_are_those_the_safetensors_library_reads(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny().write(tmp_path, "BF16")
    checkpoint, expected = Checkpoint.open(directory), load_file(directory / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), values)
        blocks = [block.copy() for block in checkpoint.read_rows(name, 3)]
        np.testing.assert_array_equal(np.concatenate(blocks), values)


def test_tying_follows_the_tensor_not_the_config(tiny: Tiny, tmp_path: Path) -> None:
    untied = tiny(tie_word_embeddings=True, text_config__tie_word_embeddings=True)
    assert not Checkpoint.open(untied.write(tmp_path / "untied")).tied
    tied = tiny(tied=True, tie_word_embeddings=False)
    assert Checkpoint.open(tied.write(tmp_path / "tied")).tied


# Refusals.


def refusal(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message of the refusal: one line, one or two sentences."""
    with pytest.raises(OneVisionError) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def encoded(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file from its parts, lies included."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ENTRY = entry()
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated or not safetensors"),
    "header length cut": (b"\x08\0\0", "truncated or not safetensors"),
    "length past the end": (encoded({}, length=1000), "header of 1000 bytes in a file of 10"),
    "enormous length": (encoded({}, length=2**64 - 1), "truncated or not safetensors"),
    "length too short": (encoded({"a": ENTRY}, bytes(8), length=9), "not valid JSON"),
    "not JSON": (encoded(b"{garbage"), "not valid JSON"),
    "not UTF-8": (encoded(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "deeply nested": (encoded(b"[" * 100_000), "not valid JSON"),
    "a list": (encoded([1]), "not an object"),
    "a tensor twice": (
        encoded(b'{"a": %b, "a": %b}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(8)),
        "names a twice",
    ),
    "entry is a number": (encoded({"a": 3}), "tensor a has a malformed"),
    "entry without dtype": (encoded({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "malformed"),
    "dtype is a list": (encoded({"a": entry(dtype=["F32"])}, bytes(8)), "tensor a has a malformed"),
    "shape is an object": (encoded({"a": entry(shape={})}, bytes(8)), "tensor a has a malformed"),
    "shape negative": (encoded({"a": entry(shape=[-2])}, bytes(8)), "tensor a has a malformed"),
    "shape boolean": (encoded({"a": entry(shape=[True, 2])}, bytes(8)), "tensor a has a malformed"),
    "shape fractional": (encoded({"a": entry(shape=[2.0])}, bytes(8)), "tensor a has a malformed"),
    "shape huge": (
        encoded({"a": entry(shape=[2**70])}, bytes(8)),
        "tensor a claims [1180591620717411303424]",
    ),
    "shape of thousands of digits": (encoded(b'{"a": {"shape": [%b]}}' % (b"9" * 9999)), "not valid JSON"),
    "three offsets": (encoded({"a": entry(offsets=[0, 8, 8])}, bytes(8)), "tensor a has a malformed"),
    "offsets negative": (encoded({"a": entry(offsets=[-8, 0])}, bytes(8)), "tensor a has a malformed"),
    "offsets boolean": (encoded({"a": entry(offsets=[False, 8])}, bytes(8)), "tensor a has a malformed"),
    "offsets reversed": (encoded({"a": entry("I8", [0], [8, 0])}, bytes(8)), "tensor a has a malformed"),
    "offsets past the end": (encoded({"a": entry(offsets=[0, 2**80])}, bytes(8)), "truncated: tensor a ends"),
    "data cut": (encoded({"a": ENTRY}, bytes(7)), "truncated: tensor a ends at byte"),
    "shape does not fit": (encoded({"a": entry(shape=[3])}, bytes(8)), "tensor a claims [3] F32 but holds 8"),
    "dtype does not fit": (encoded({"a": entry("BF16")}, bytes(8)), "tensor a claims [2] BF16 but holds 8"),
    "overlap": (encoded({"a": ENTRY, "b": entry(offsets=[4, 12])}, bytes(12)), "tensor b overlaps"),
    "gap before": (
        encoded({"a": entry(offsets=[4, 12])}, bytes(12)),
        "tensor a overlaps its neighbour or leaves",
    ),
    "gap between": (encoded({"a": ENTRY, "b": entry(offsets=[12, 20])}, bytes(20)), "leaves a gap"),
    "bytes after the last": (encoded({"a": ENTRY}, bytes(12)), "4 bytes after the last tensor"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=list(BROKEN))
def test_broken_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert message in refusal(read_safetensors_header, path)


def test_every_truncation_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny().write(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for size in [*range(9), header_end // 2, header_end - 1, header_end, header_end + 1, len(content) - 1]:
        path.write_bytes(content[:size])
        assert str(path) in refusal(Checkpoint.open, tmp_path)


def read_bytes(content: bytes) -> None:
    """A header either reads or is refused: no other exception may come out."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        try:
            tensors = read_safetensors_header(Path(file.name))
        except OneVisionError:
            return
        assert sum(tensor.size for tensor in tensors.values()) <= len(content)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    read_bytes(content)


numbers = st.integers() | st.integers(0, 16) | st.booleans() | st.floats()
json_values = st.recursive(
    st.none() | numbers | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8"]) | json_values,
        "shape": st.lists(numbers, max_size=2) | json_values,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | json_values, max_size=3)


@settings(max_examples=500, deadline=None)
@given(headers | json_values, st.binary(max_size=16))
def test_any_header(header: Any, data: bytes) -> None:
    read_bytes(encoded(header, data))


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/passwd",
        "/x.safetensors",
        "sub/x.safetensors",
        "..",
        "x.bin",
        "a\0.safetensors",
        "\ud800.safetensors",
        3,
        None,
    ],
)
def test_an_index_may_only_name_files_beside_it(tiny: Tiny, tmp_path: Path, file: Any) -> None:
    directory = tiny().write(tmp_path / "c")
    (directory / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    message = refusal(Checkpoint.open, directory)
    assert "weight_map places lm_head.weight in" in message


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index(tiny: Tiny, tmp_path: Path, index: str) -> None:
    directory = tiny().write(tmp_path, shards=2)
    (directory / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(Checkpoint.open, directory)


def test_a_shard_is_missing(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny().write(tmp_path, shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors does not exist" in refusal(Checkpoint.open, directory)


def test_the_index_places_a_tensor_in_the_wrong_shard(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny().write(tmp_path, shards=2)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["visual.nothing"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    assert "tensor visual.nothing is missing, but the index" in refusal(Checkpoint.open, directory)


def test_a_tensor_under_both_names(tiny: Tiny, tmp_path: Path) -> None:
    made = tiny()
    made.tensors["model.language_model.norm.weight"] = made.tensors["model.norm.weight"]
    assert "model.norm.weight is stored twice" in refusal(Checkpoint.open, made.write(tmp_path))


def export_refusal(checkpoint: Path, dtype: str = "fp32") -> str:
    output = checkpoint.parent / "bundle"
    message = refusal(onevision_edge.export, checkpoint, output, dtype=dtype, max_length=32)
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == [checkpoint.name]
    return message


@pytest.mark.parametrize(
    "name",
    [
        "visual.class_pos_emb",
        "visual.blocks.1.attn.qkv.bias",
        "visual.merger.mlp.2.weight",
        "model.layers.1.self_attn.k_norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_missing_tensor(tiny: Tiny, tmp_path: Path, name: str) -> None:
    made = tiny()
    del made.tensors[name]
    assert f"tensor {name} is missing" in export_refusal(made.write(tmp_path / "c"))


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.embed_tokens.weight", "visual.patch_embed.proj.weight", "model.norm.weight"],
)
def test_a_wrong_shape(tiny: Tiny, tmp_path: Path, name: str) -> None:
    made = tiny()
    shape = made.tensors[name].shape
    made.tensors[name] = made.tensors[name][:-1]
    message = export_refusal(made.write(tmp_path / "c"))
    assert f"tensor {name} has shape {[shape[0] - 1, *shape[1:]]}" in message
    assert f"config.json asks for {list(shape)}" in message


def test_a_transposed_tensor(tiny: Tiny, tmp_path: Path) -> None:
    made = tiny()
    name = "model.layers.0.mlp.up_proj.weight"
    made.tensors[name] = np.ascontiguousarray(made.tensors[name].T)
    assert f"tensor {name} has shape [24, 40]" in export_refusal(made.write(tmp_path / "c"))


@pytest.mark.parametrize(("dtype", "spelling"), [(np.int8, "I8"), (np.float64, "F64")])
def test_an_unsupported_dtype(tiny: Tiny, tmp_path: Path, dtype: Any, spelling: str) -> None:
    made = tiny()
    directory = made.write(tmp_path / "c")
    changed = made.tensors | {"model.norm.weight": made.tensors["model.norm.weight"].astype(dtype)}
    save_file(changed, directory / "model.safetensors")
    assert f"tensor model.norm.weight has dtype {spelling}; supported: BF16" in export_refusal(directory)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "visual.blocks.0.mlp.fc1.weight", "model.norm.weight"])
def test_weights_that_are_not_numbers(tiny: Tiny, tmp_path: Path, name: str, value: float, dtype: str) -> None:
    made = tiny()
    made.tensors[name].flat[5] = value
    message = export_refusal(made.write(tmp_path / "c", "BF16"), dtype)
    assert f"tensor {name} holds NaN or infinity" in message


def test_weights_beyond_float16(tiny: Tiny, tmp_path: Path) -> None:
    made = tiny()
    made.tensors["lm_head.weight"][3, 3] = -70000.0
    checkpoint = made.write(tmp_path / "c")
    message = export_refusal(checkpoint, "fp16")
    assert "tensor lm_head.weight reaches 7e+04, beyond fp16's 65504: export with --dtype bf16 or fp32" in message
    onevision_edge.export(checkpoint, tmp_path / "bundle", dtype="bf16", max_length=32)


def test_weights_beyond_bfloat16(tiny: Tiny, tmp_path: Path) -> None:
    made = tiny()
    made.tensors["lm_head.weight"][3, 3] = np.finfo(np.float32).max
    assert "export with --dtype fp32" in export_refusal(made.write(tmp_path / "c"), "bf16")


def test_only_pickled_weights(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny().write(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "pickled weights" in refusal(Checkpoint.open, directory)


def test_no_weights(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny().write(tmp_path)
    (directory / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(Checkpoint.open, directory)


def test_not_a_checkpoint_directory(tmp_path: Path) -> None:
    assert "does not exist: give a checkpoint directory" in refusal(Checkpoint.open, tmp_path / "nothing")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "is a file: give the checkpoint's directory" in refusal(Checkpoint.open, file)


def test_demo_is_the_shipped_checkpoint_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("demo").parts[-2:] == ("demo", "checkpoint")
    assert locate("./demo") == locate(Path("demo")) == Path("demo")

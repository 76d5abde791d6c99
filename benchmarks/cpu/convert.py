"""Conversions that need a peer's own packages, run in its interpreter.

python -m cpu.convert gguf FOLDER OUT              python -m cpu.convert openvino-vision ONNX OUT
python -m cpu.convert llama-quantize GGUF OUT Q4_0 python -m cpu.convert openvino-vision-int8 ONNX OUT
"""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .worker import merge_order

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CALIBRATION_GRIDS = ((16, 16), (12, 20))


def gguf_names(layers: int) -> Iterator[tuple[str, str]]:
    """A checkpoint's tensors with GGUF's names for them; the head is not tied."""
    yield "model.embed_tokens", "token_embd"
    for i in range(layers):
        yield from ((f"model.layers.{i}.{ours}", f"blk.{i}.{theirs}") for ours, theirs in GGUF_NAMES.items())
    yield "model.norm", "output_norm"
    yield "lm_head", "output"


def write_gguf(folder: str, output: str) -> None:
    """A Qwen3ForCausalLM folder as GGUF without a tokenizer: matrices in BF16, norms in FP32, read one by one."""
    import gguf
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(output, "qwen3")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    _write_tensors(writer, Path(folder), list(gguf_names(c.num_hidden_layers)))


def _write_tensors(writer: Any, folder: Path, names: list[tuple[str, str]]) -> None:
    import gguf
    import torch
    from safetensors import safe_open

    files = [safe_open(shard, framework="pt") for shard in sorted(folder.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    bf16 = gguf.GGMLQuantizationType.BF16
    for ours, theirs in names:
        shape = where[f"{ours}.weight"].get_slice(f"{ours}.weight").get_shape()
        if len(shape) == 1:
            writer.add_tensor_info(f"{theirs}.weight", shape, np.dtype(np.float32), 4 * shape[0])
        else:
            in_bytes = [shape[0], 2 * shape[1]]
            nbytes = in_bytes[0] * in_bytes[1]
            writer.add_tensor_info(f"{theirs}.weight", in_bytes, np.dtype(np.uint8), nbytes, raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for ours, _ in names:
        tensor = where[f"{ours}.weight"].get_tensor(f"{ours}.weight")
        values = tensor.float() if tensor.ndim == 1 else tensor.bfloat16().view(torch.uint8)
        writer.write_tensor_data(values.numpy())
    writer.close()


def llama_quantize(source: str, output: str, kind: str) -> None:
    """GGUF as llama.cpp quantises it: Q4_0 has a head in Q6_K, Q8_0 one in Q8_0."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot quantise {source}")


def openvino_vision(source: str, output: str) -> None:
    """The tower's ONNX graph in FP32 with its attention as one operator, which OpenVINO does not find by itself."""
    import openvino

    openvino.save_model(_fused(openvino.Core().read_model(source)), output, compress_to_fp16=False)


def openvino_vision_int8(source: str, output: str) -> None:
    """The same with products in INT8, by nncf's post-training quantisation for transformers."""
    import nncf
    import openvino

    random = np.random.default_rng(0)
    rows = [
        {
            "pixel_values": random.standard_normal((1, height * width, 588), np.float32),
            "patch_positions": merge_order(height, width),
        }
        for height, width in CALIBRATION_GRIDS
    ]
    quantized = nncf.quantize(
        _fused(openvino.Core().read_model(source)),
        nncf.Dataset(rows),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(rows),
    )
    openvino.save_model(quantized, output, compress_to_fp16=False)


def _fused(model: Any) -> Any:
    """Softmax and the products around it, as export/layers.py writes them, replaced by ScaledDotProductAttention."""
    from openvino import opset13

    for softmax in [node for node in model.get_ordered_ops() if node.get_type_name() == "Softmax"]:
        scores = softmax.input_value(0).get_node()
        (product,) = (user.get_node() for user in softmax.output(0).get_target_inputs())
        (merged,) = (user.get_node() for user in product.output(0).get_target_inputs())
        q = scores.input_value(0).get_node().input_value(0)
        k = scores.input_value(1).get_node().input_value(0).get_node().input_value(0)
        v = product.input_value(1).get_node().input_value(0)
        mask, scale = opset13.constant(np.float32(0)), opset13.constant(np.float32(1))  # queries are scaled before
        attention = opset13.scaled_dot_product_attention(q, k, v, mask, scale)
        for user in list(merged.output(0).get_target_inputs()):
            user.replace_source_output(attention.output(0))
    model.validate_nodes_and_infer_types()
    return model


CONVERSIONS = {
    "gguf": write_gguf,
    "llama-quantize": llama_quantize,
    "openvino-vision": openvino_vision,
    "openvino-vision-int8": openvino_vision_int8,
}

if __name__ == "__main__":
    CONVERSIONS[sys.argv[1]](*sys.argv[2:])

"""Who is measured, and what: the table of engines and the table of cells."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import Files


@dataclass(frozen=True, slots=True)
class Text:
    """How an engine keeps the text half: bits of a weight in the layers and in the head, scales included, of a key."""

    layers: float
    head: float
    cache: float


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine in one configuration.

    worker: module:class. options: what it takes besides the model, which `files` makes.
    """

    name: str
    worker: str
    files: Callable[[Files], Path]
    options: Mapping[str, Any] = field(default_factory=dict)
    text: Text | None = None
    vision: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is this package."""
        return self.worker.startswith("cpu.ours:")


_Q4_0, _Q8_0 = Text(4.5, 6.5625, 16), Text(8.5, 8.5, 16)
_NNCF, _BUILDER, _BF16 = Text(4.125, 8, 8.25), Text(5, 5, 32), Text(16, 16, 16)
_OURS, _OURS_CPU = Text(4.25, 8, 32), Text(4.25, 8, 8.25)

# Ours come first; the last of them that there is stands for us.
ENGINES = (
    Engine("ours, plain", "cpu.ours:Model", Files.bundle, text=_OURS, vision=True),
    Engine("ours, cpu engine", "cpu.ours:Model", Files.built_bundle, {"engines": "cpu"}, _OURS_CPU, vision=True),
    Engine("llama.cpp Q4_0", "cpu.llama:Text", Files.gguf_q4, {"flash_attention": False}, _Q4_0),
    Engine("llama.cpp Q4_0, flash", "cpu.llama:Text", Files.gguf_q4, {"flash_attention": True}, _Q4_0),
    Engine("llama.cpp Q8_0", "cpu.llama:Text", Files.gguf_q8, {"flash_attention": False}, _Q8_0),
    Engine("llama.cpp Q8_0, flash", "cpu.llama:Text", Files.gguf_q8, {"flash_attention": True}, _Q8_0),
    Engine("OpenVINO GenAI INT4", "cpu.openvino:Pipeline", Files.openvino_text, {}, _NNCF),
    Engine("OpenVINO GenAI INT4, f32", "cpu.openvino:Pipeline", Files.openvino_text, {"hint": "f32"}, _NNCF),
    Engine("ORT-GenAI INT4", "cpu.onnx_genai:Text", Files.onnx_genai, text=_BUILDER),
    Engine("PyTorch BF16", "cpu.pytorch:Text", Files.qwen3, text=_BF16),
    Engine("PyTorch BF16, compiled", "cpu.pytorch:Text", Files.qwen3, {"compiled": True}, _BF16),
    Engine("OpenVINO tower BF16", "cpu.openvino:Vision", Files.openvino_vision, {"hint": "bf16"}, vision=True),
    Engine("OpenVINO tower INT8", "cpu.openvino:Vision", Files.openvino_vision_int8, {"hint": "bf16"}, vision=True),
    Engine("PyTorch tower BF16", "cpu.pytorch:Vision", Files.checkpoint, vision=True),
    Engine("PyTorch tower BF16, compiled", "cpu.pytorch:Vision", Files.checkpoint, {"compiled": True}, vision=True),
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A call of a worker: its method and arguments.

    tokens: what a rate counts, None where seconds are given. ours: of our engines alone, or of the peers' alone.
    """

    method: str
    arguments: tuple[int, ...]
    tokens: int | None = None
    ours: bool | None = None

    def applies(self, engine: Engine) -> bool:
        """Whether it is taken of an engine."""
        if self.ours is not None and self.ours != engine.ours:
            return False
        return engine.vision if self.method == "vision" else engine.text is not None


IMAGE, PROMPT = (52, 74), 64  # 1036 x 728 pixels
IMAGE_TOKENS = IMAGE[0] * IMAGE[1] // 4
STEPS = 32

MEASUREMENTS = {
    "decode 256": Measurement("decode", (256, STEPS), 1),
    "decode 2048": Measurement("decode", (2048, STEPS), 1),
    "prefill 512": Measurement("prefill", (512,), 512),
    "prefill 2048": Measurement("prefill", (2048,), 2048),
    "vision 1024": Measurement("vision", (32, 32)),
    "vision 3848": Measurement("vision", IMAGE),
    "first token": Measurement("first_token", (*IMAGE, PROMPT), ours=True),
    "prompt": Measurement("prefill", (IMAGE_TOKENS + PROMPT,), ours=False),
}
# Cells with the measurements that each takes of us and of peers; a peer's first token is the sum of its two parts.
CELLS = {
    **{name: (name,) for name in MEASUREMENTS if name not in ("first token", "prompt")},
    "first token": ("first token", "vision 3848", "prompt"),
}


def weight_bytes(text: Text, shape: Mapping[str, int]) -> float:
    """Bytes of weights that a decode step reads. shape: text_config of a checkpoint."""
    layers, head = weights(shape)
    return (layers * text.layers + head * text.head) / 8


def cache_bytes(text: Text, shape: Mapping[str, int], context: int) -> float:
    """Bytes of keys and values that a decode step reads behind so many tokens."""
    rows = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * context
    return rows * shape["head_dim"] * text.cache / 8


def weights(shape: Mapping[str, int]) -> tuple[int, int]:
    """Weights in the products of all layers, and in the head."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] + shape["num_key_value_heads"]
    layer = hidden * (2 * heads * shape["head_dim"] + 3 * shape["intermediate_size"])
    return shape["num_hidden_layers"] * layer, shape["vocab_size"] * hidden

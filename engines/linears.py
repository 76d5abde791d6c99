"""The products with weights of both graphs, by the checkpoint's names, and what they multiply."""

from ..bundle import Manifest
from ..config import ModelConfig
from ..precision.plan import Plan


def plan_of(manifest: Manifest) -> Plan:
    """The plan that a bundle's products follow: floats throughout where it was not quantised."""
    if manifest.quantization is not None:
        return Plan.from_dict(manifest.quantization["plan"])
    return Plan("float", next(iter(manifest.graphs.values())).dtype)


def linears(part: str, config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every Linear of `vision` or `decoder`, in the order of the graph."""
    return _vision(config) if part == "vision" else _decoder(config)


def _vision(config: ModelConfig) -> dict[str, tuple[int, int]]:
    v = config.vision
    hidden, joined = v.hidden_size, v.hidden_size * v.merge_unit
    found = {"visual.patch_embed.proj": (v.patch_dim, hidden)}
    for i in range(v.depth):
        block = f"visual.blocks.{i}"
        found |= {f"{block}.attn.qkv": (hidden, 3 * hidden), f"{block}.attn.proj": (hidden, hidden)}
        found |= {f"{block}.mlp.fc1": (hidden, v.intermediate_size), f"{block}.mlp.fc2": (v.intermediate_size, hidden)}
    return found | {"visual.merger.mlp.0": (joined, joined), "visual.merger.mlp.2": (joined, v.text_hidden_size)}


def _decoder(config: ModelConfig) -> dict[str, tuple[int, int]]:
    t = config.text
    hidden, queries, keys = t.hidden_size, t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    found: dict[str, tuple[int, int]] = {}
    for i in range(t.num_hidden_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        found |= {f"{attention}.q_proj": (hidden, queries), f"{attention}.k_proj": (hidden, keys)}
        found |= {f"{attention}.v_proj": (hidden, keys), f"{attention}.o_proj": (queries, hidden)}
        found |= {f"{mlp}.{name}_proj": (hidden, t.intermediate_size) for name in ("gate", "up")}
        found |= {f"{mlp}.down_proj": (t.intermediate_size, hidden)}
    return found | {"lm_head": (hidden, t.vocab_size)}

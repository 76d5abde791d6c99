"""Which module of the model an operation belongs to, by the names that backends give their operations.

A node of an exported graph is named by its module's path: model/layers.1/self_attn/q_proj/MatMul_node_51.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NODE = re.compile(r"((?:[\w.]+/)+)([A-Za-z]\w*?)_node_\d+")
_CAST = re.compile(r"InsertedPrecisionFreeCast_(?:v_)?([\w.]+)\.[^.]+$")  # of a value, or of a constant
ROOTS = {"vision": "visual", "decoder": "model"}
_DECODER = {  # a module's products by the buffer that they write, and the normalisation before them
    "heads": ("self_attn.qkv_proj", "input_layernorm"),
    "stream": ("self_attn.o_proj", None),
    "inner": ("mlp.gate_up_proj", "post_attention_layernorm"),
    "both": ("mlp.gate_up_proj", "post_attention_layernorm"),
    "stream again": ("mlp.down_proj", None),
}
_TOWER = {
    "heads": ("attn.qkv", "norm1"),
    "stream": ("attn.proj", None),
    "inner": ("mlp.fc1", "norm2"),
    "stream again": ("mlp.fc2", None),
}
_TOKENS = 2  # of a tower's program: rows that are the merger's
_NORMS = ("rms_norm", "layer_norm")


def node_module(name: str) -> str | None:
    """The module in a node's name, or in that of a cast that was put before or behind it; None for other names."""
    if found := _NODE.search(name):
        return found[1].rstrip("/").replace("/", ".")
    cast = _CAST.match(name)
    return cast[1] if cast else None


def node_operation(name: str) -> str | None:
    """The operator in a node's name."""
    found = _NODE.search(name)
    return found[2] if found else None


def node_modules(names: Sequence[str], root: str) -> list[str]:
    """Modules of nodes in the order in which they ran. A name without a path belongs to the node before it.

    Such are nodes that ONNX Runtime made of several, as BiasGelu of a sum and what follows it.
    """
    found, last = [], root
    for name in names:
        last = node_module(name) or last
        found.append(last)
    return found


def step_modules(steps: Sequence[Mapping[str, Any]], part: str) -> list[str]:
    """Modules of the steps of a cpu engine's program, by the order in which every layer has its steps.

    Queries, keys and values are one product, qkv_proj, and so are gate and up, gate_up_proj. What a step prepares
    belongs to the normalisation in it, or else to the product that it is for.
    """
    tower = part == "vision"
    found: list[str] = []
    product = _Product("", "")
    for step, place in reversed(list(zip(steps, _places(steps), strict=True))):
        if step["op"] == "product":
            product = _product(step, place, tower)
        found.append(_module(step, place, product, tower))
    return found[::-1]


@dataclass(frozen=True, slots=True)
class _Place:
    """Of a step: its layer, and whether the layer's attention has been added to the stream already."""

    layer: int
    attended: bool

    def prefix(self, tower: bool) -> str:
        """Of the layer's modules."""
        return f"visual.blocks.{self.layer}." if tower else f"model.layers.{self.layer}."


@dataclass(frozen=True, slots=True)
class _Product:
    """The module of a product, and the normalisation before it, if any."""

    module: str
    norm: str


def _places(steps: Sequence[Mapping[str, Any]]) -> list[_Place]:
    """Every layer adds two products to the stream: its attention's and its MLP's."""
    found, added = [], 0
    for step in steps:
        found.append(_Place(added // 2, added % 2 == 1))
        added += step["op"] == "product" and step["out"] == "stream"
    return found


def _product(step: Mapping[str, Any], place: _Place, tower: bool) -> _Product:
    """By the buffer that a product writes."""
    out = str(step["out"])
    if out == "output":
        return _Product("visual.merger.mlp.2", "") if tower else _Product("lm_head", "model.norm")
    if out == "embedded":
        return _Product("visual.patch_embed.proj", "")
    if tower and step["rows"] == _TOKENS:
        return _Product("visual.merger.mlp.0", "visual.merger.ln_q")
    again = out == "stream" and place.attended
    name, norm = (_TOWER if tower else _DECODER)["stream again" if again else out]
    return _Product(place.prefix(tower) + name, place.prefix(tower) + norm if norm else "")


def _module(step: Mapping[str, Any], place: _Place, product: _Product, tower: bool) -> str:
    """product: the step itself, or the next one that is a product."""
    op, normalises = step["op"], step.get("prologue") in _NORMS
    if op in ("heads", "attention"):
        return place.prefix(tower) + ("attn" if tower else "self_attn")
    if op == "prepend":
        return "visual"
    if tower and op == "rows" and step.get("out") == "stream":
        return "visual.pre_layernorm"
    return product.norm if product.norm and (normalises or op == "gather") else product.module

"""The network that TensorRT makes of a graph, run on this machine and held against ONNX Runtime, layer by layer.

A prompt, a chunk behind it and single tokens for the decoder, the cache going from one to the next; one image and two
for the vision graph. Inputs are drawn from a fixed seed: rows of the embedding table, and normal pixels.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..bundle import Bundle, Progress, no_progress
from ..errors import OneVisionError
from ..precision import float_format, from_float32
from ..runtime.images import patch_positions
from ..runtime.memory import memory_field
from ..runtime.stitching import EmbeddingTable
from .dialects import Dialect, create_network, parse
from .interpreter.compare import Comparison, compare
from .interpreter.interpreter import Interpreter
from .interpreter.network import Network, Tensor
from .linears import linears

# Tokens and first position of each decoder call.
_CALLS = {"prefill of 9": (9, 0), "chunk of 5": (5, 9), "decode": (1, 14), "decode again": (1, 15)}
_IMAGES = {"one image": (1, 4, 6), "two images": (2, 6, 4)}  # images, height and width in patches


@dataclass(frozen=True, slots=True)
class Check:
    """One call of one graph. difference: the largest difference of its float outputs that are no cache."""

    part: str
    call: str
    comparison: Comparison

    @property
    def difference(self) -> float:
        """Of the logits, or of the image embeddings."""
        outputs = self.comparison.outputs
        return max(found for name, found in outputs.items() if not name.startswith("present_"))

    @property
    def verdict(self) -> str:
        """What is wrong first, or that nothing is."""
        if self.comparison.unused_inputs:
            return f"the network reads no {', '.join(self.comparison.unused_inputs)}"
        return str(self.comparison.first or "every layer agrees")

    @property
    def passed(self) -> bool:
        """Whether every layer gives what ONNX Runtime gives, but for rounding."""
        return not self.comparison.unused_inputs and not self.comparison.departures


def check_graphs(
    bundle: Bundle, parts: tuple[str, ...], dialect: Dialect, progress: Progress = no_progress
) -> list[Check]:
    """Compare the networks of a bundle's graphs, as a dialect's parser makes them, with ONNX Runtime.

    Needs no GPU. Raises OneVisionError where a graph cannot be parsed or run, or this machine's memory cannot hold
    its weights in float32, which the reference needs.
    """
    trt = dialect.load()
    calls = len(_CALLS) * ("decoder" in parts) + len(_IMAGES) * ("vision" in parts)
    found: list[Check] = []
    for part in parts:
        _check_memory(bundle, part)
        log = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(log)
        network = create_network(trt, dialect.name, builder)
        path = bundle.path(bundle.graph(part).file)
        parser = parse(trt, dialect, network, log, path)
        read = Network.read(trt, network)
        del parser, network, builder  # what was read needs none of them
        for call, inputs in _inputs(bundle, part, read):
            progress(len(found), calls, f"{part}, {call}")
            found.append(Check(part, call, compare(trt, read, path, inputs)))
    progress(calls, calls, "done")
    return found


def _inputs(bundle: Bundle, part: str, network: Network) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    given = {tensor.name: tensor for tensor in network.inputs}
    random = np.random.default_rng(0)
    if part == "vision":
        for call, (images, height, width) in _IMAGES.items():
            pixels = random.standard_normal((images, height * width, given["pixel_values"].shape[-1]))
            merge = bundle.manifest.model.vision.spatial_merge_size
            positions = patch_positions(height, width, merge)
            yield call, {"pixel_values": pixels.astype(given["pixel_values"].dtype), "patch_positions": positions}
        return
    caches = {name: np.zeros(_one(t), t.dtype) for name, t in given.items() if name.startswith("past_")}
    interpreter = Interpreter(network)
    for call, (tokens, start) in _CALLS.items():
        inputs = {**caches, **_decoder_inputs(bundle, given, tokens, start, random)}
        yield call, inputs
        # Caches that are written where they lie are filled now; the others are handed on.
        outputs = interpreter.run(inputs)
        caches = {name: outputs[name.replace("past_", "present_")] for name in caches}


def _decoder_inputs(
    bundle: Bundle, given: Mapping[str, Tensor], tokens: int, start: int, random: np.random.Generator
) -> dict[str, np.ndarray]:
    return {
        "inputs_embeds": _embeds(bundle, given["inputs_embeds"], tokens, random),
        "position_ids": np.arange(start, start + tokens)[None],
        "write_indices": np.array([start]),
        "valid_length": np.array([start + tokens]),
        "logits_indices": np.arange(tokens)[None],
    }


def _embeds(bundle: Bundle, tensor: Tensor, tokens: int, random: np.random.Generator) -> np.ndarray:
    """Rows of the table where the bundle has one: what the decoder was made for."""
    table = bundle.manifest.embedding
    if table is None:
        values = random.standard_normal((1, tokens, tensor.shape[-1])).astype(np.float32)
        return from_float32(values, float_format(bundle.graph("decoder").dtype)).view(tensor.dtype)
    rows = EmbeddingTable(bundle.path(table.file), table)[random.integers(0, table.shape[0], (1, tokens))]
    return np.ascontiguousarray(rows).view(tensor.dtype)


def _one(tensor: Tensor) -> tuple[int, ...]:
    """The shape for one sequence."""
    return tuple(1 if size == -1 else size for size in tensor.shape)


def _check_memory(bundle: Bundle, part: str) -> None:
    """The reference holds every value of the graph, dequantised weights among them."""
    spec, model = bundle.graph(part), bundle.manifest.model
    parameters = sum(inputs * outputs for inputs, outputs in linears(part, model).values())
    sizes = [[n for n in t.shape if isinstance(n, int)] for t in spec.inputs if t.name.startswith("past_")]
    cache = sum(4 * math.prod(size) for size in sizes)
    needed, available = 4 * parameters + 3 * cache, memory_field("MemAvailable")
    if available is not None and needed > available:
        raise OneVisionError(
            f"the check of the {part} graph of {model.text.num_hidden_layers} layers needs about {needed / 1e9:.0f} GB "
            f"of memory, {available / 1e9:.0f} are free: check a smaller bundle of the same plan, or elsewhere"
        )

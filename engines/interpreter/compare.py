"""A parsed TensorRT network against ONNX Runtime on the same inputs: which layer is the first that departs.

The parser keeps the names of ONNX values. Each layer runs on ONNX Runtime's own values for its inputs, so that a layer
answers for what it does and not for the rounding of those before it; where the parser makes several layers of one
node, the group does. See bounds.py for what may differ.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arithmetic import FLOATS, wide
from .bounds import Error, error, rounding
from .interpreter import Interpreter, run_layer
from .network import Layer, Network
from .reference import Reference


@dataclass(frozen=True, slots=True)
class Departure:
    """A layer that gives another value than ONNX Runtime on equal inputs.

    tensor: the value, by its ONNX name. what: "value", "type", "shape" or "constant". excess: how many times what
    rounding explains, at most; infinite where nothing may differ. difference: there, or else the largest.
    """

    layer: str
    stage: str
    tensor: str
    what: str
    difference: float
    excess: float

    def __str__(self) -> str:
        where = f"{self.layer}, which makes {self.tensor}"
        if self.what == "type":
            return f"{where}, gives it another type"
        if self.what == "shape":
            return f"{where}, gives it another shape"
        return f"{where}, departs by {self.difference:.3g}, {self.excess:.3g} times what rounding explains"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found.

    departures: in the order of the network. stages: the largest difference of any float value of a module, errors of
    all layers before it included; outputs: the same of each output. unused_inputs: what the graph reads and the network
    does not. compared: values held against each other. unmatched: values of the graph that the network has none for.
    """

    departures: tuple[Departure, ...]
    stages: Mapping[str, float]
    outputs: Mapping[str, float]
    unused_inputs: tuple[str, ...]
    compared: int
    unmatched: tuple[str, ...]

    @property
    def first(self) -> Departure | None:
        """The first layer that departs."""
        return self.departures[0] if self.departures else None


def compare(trt: Any, network: Any, graph_path: str | os.PathLike[str], inputs: Mapping[str, np.ndarray]) -> Comparison:
    """Run a parsed trt.INetworkDefinition and the graph at `graph_path` on the same inputs.

    trt: the module the network is from. inputs: all of both, in their types; they are not written to. Raises
    OneVisionError where either cannot run. Holds all values of the graph in memory, and one constant at a time.
    """
    read = network if isinstance(network, Network) else Network.read(trt, network)
    reference = Reference(graph_path)
    values = reference.values(inputs)
    departures = _departures(read, reference, values, inputs)
    stages, outputs = _accumulated(read, values, inputs)
    matched = [name for name in values if name in read.tensors]
    return Comparison(
        tuple(departures),
        stages,
        outputs,
        tuple(name for name in read.unused_inputs if name in reference.used),
        len(matched) - len(reference.inputs),
        tuple(name for name in values if name not in read.tensors),
    )


def _departures(
    network: Network, reference: Reference, values: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> list[Departure]:
    """Each layer on ONNX Runtime's values where it has them."""
    given = {name: array.copy() for name, array in inputs.items()}
    errors: dict[str, Error] = dict.fromkeys(given)
    found = []
    last = _readers(network)
    for index, layer in enumerate(network.layers):
        arrays = [None if name is None else given[name] for name in layer.inputs]
        known = [None if name is None else errors[name] for name in layer.inputs]
        name = layer.outputs[0].name
        # A cache is written where it lies; a later run must find it as it was.
        arrays = [array.copy() if array is not None and layer.type == "KV_CACHE_UPDATE" else array for array in arrays]
        result = run_layer(layer, arrays)
        wanted = _constant(layer, reference) if layer.constant is not None else values.get(name)
        allowed = error(layer, arrays, known, result, inner=wanted is None)
        if wanted is not None:
            departure = _judged(layer, name, result, wanted, allowed)
            if departure is not None:
                found.append(departure)
            if departure is None or departure.what in ("value", "constant"):
                result, allowed = wanted, None
        given[name], errors[name] = result, allowed
        for finished in last[index]:
            del given[finished], errors[finished]
    return found


def _readers(network: Network) -> list[list[str]]:
    """For each layer the tensors that no later one reads."""
    last = {name: index for index, layer in enumerate(network.layers) for name in layer.inputs if name is not None}
    result: list[list[str]] = [[] for _ in network.layers]
    for name, index in last.items():
        result[index].append(name)
    return result


def _constant(layer: Layer, reference: Reference) -> np.ndarray | None:
    """The initializer that a constant layer is named after."""
    return reference.constant(layer.name) if layer.name in reference.constants else None


def _judged(layer: Layer, name: str, result: np.ndarray, wanted: np.ndarray, allowed: Error) -> Departure | None:
    def departure(what: str, difference: float = np.inf, excess: float = np.inf) -> Departure:
        return Departure(layer.name, layer.stage, name, what, difference, excess)

    if result.dtype != wanted.dtype:
        return departure("type")
    if result.shape != wanted.shape:
        return departure("shape")
    difference = _difference(result, wanted)
    if not difference.any():
        return None
    if allowed is None:
        return departure("constant" if layer.constant is not None else "value", float(difference.max()))
    with np.errstate(invalid="ignore"):
        excess = difference / (allowed + rounding(wanted))
    # Infinity over infinity: a value that overflows explains everything but another value than infinity.
    excess = np.where(np.isnan(excess), np.float32(np.inf), excess)
    worst = int(excess.argmax())
    if excess.flat[worst] <= 1:
        return None
    return departure("value", float(difference.flat[worst]), float(excess.flat[worst]))


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Magnitudes of differences; NaN and infinity differ from all but themselves, infinitely."""
    if a.dtype.kind in "iub" and a.itemsize == 8:
        return np.abs(a - b)
    first, second = (wide(x) if x.dtype in FLOATS else x.astype(np.float32) for x in (a, b))
    with np.errstate(invalid="ignore"):
        difference = np.abs(first - second)
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    return np.where(same, np.float32(0), np.where(np.isnan(difference), np.float32(np.inf), difference))


def _accumulated(
    network: Network, values: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> tuple[dict[str, float], dict[str, float]]:
    """The largest difference per stage and per output when the network runs as a whole."""
    stages: dict[str, float] = {}
    outputs: dict[str, float] = {}
    names = {tensor.name for tensor in network.outputs}

    def observe(layer: Layer, results: list[np.ndarray]) -> None:
        for tensor, result in zip(layer.outputs, results, strict=True):
            wanted = values.get(tensor.name)
            if wanted is None:
                continue
            alike = result.shape == wanted.shape
            largest = float(_difference(result, wanted).max(initial=0)) if alike else np.inf
            if tensor.dtype in FLOATS:
                stages[layer.stage] = max(stages.get(layer.stage, 0.0), largest)
            if tensor.name in names:
                outputs[tensor.name] = largest

    Interpreter(network).run({name: array.copy() for name, array in inputs.items()}, observe)
    return stages, outputs

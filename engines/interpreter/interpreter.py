"""Executes a network layer by layer, and checks every tensor against what TensorRT says of it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...errors import OneVisionError
from .kernels import KERNELS, Kernel
from .network import Layer, Network, Tensor

Observer = Callable[[Layer, list[np.ndarray]], None]
DEFAULT_KEPT_BYTES = 1 << 30


class Interpreter:
    """A network that runs on the CPU.

    kept_bytes: how much of what depends on constants alone (dequantised weights above all) is kept between runs; the
    rest is made again in each. kernels: what layer types compute, for those that are not to run as they are.
    """

    def __init__(
        self, network: Network, kept_bytes: int = DEFAULT_KEPT_BYTES, kernels: Mapping[str, Kernel] = KERNELS
    ) -> None:
        self.network, self._kernels = network, kernels
        self._budget = kept_bytes
        self._kept: dict[str, np.ndarray] = {}
        self._fixed = _fixed(network)
        self._last_use = _last_use(network)

    def run(self, inputs: Mapping[str, np.ndarray], observe: Observer | None = None) -> dict[str, np.ndarray]:
        """The outputs by name.

        inputs: every input of the network, in its type (bfloat16 as ml_dtypes has it) and shape. A cache that
        KV_CACHE_UPDATE writes is written in the array given, and that array is the output. observe: called
        with each layer and its outputs, which it must not change or keep beyond the call without a copy.
        Raises OneVisionError, naming the layer, for what does not fit.
        """
        values = self._checked(inputs)
        outputs = {tensor.name for tensor in self.network.outputs}
        idle = self._idle() if observe is None else set()
        for index, layer in enumerate(self.network.layers):
            if index in idle:
                continue
            results = self._execute(layer, values)
            values.update(zip((tensor.name for tensor in layer.outputs), results, strict=True))
            if observe is not None:
                observe(layer, results)
            for name in self._last_use[index]:
                if name not in outputs:
                    values.pop(name, None)
        return {tensor.name: values[tensor.name] for tensor in self.network.outputs}

    def _execute(self, layer: Layer, values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if all(tensor.name in self._kept for tensor in layer.outputs):
            return [self._kept[tensor.name] for tensor in layer.outputs]
        if not layer.outputs:
            raise layer.error("it has no output")
        result = run_layer(layer, [None if name is None else values[name] for name in layer.inputs], self._kernels)
        if layer.outputs[0].name in self._fixed:
            self._keep(layer.outputs[0].name, result)
        return [result]

    def _idle(self) -> set[int]:
        """Constants, and layers of constants alone, that only kept values are made of."""
        idle: set[int] = set()
        wanted = {tensor.name for tensor in self.network.outputs}
        for index in range(len(self.network.layers) - 1, -1, -1):
            layer = self.network.layers[index]
            names = {tensor.name for tensor in layer.outputs}
            if not names & wanted and (layer.type == "CONSTANT" or names & self._fixed):
                idle.add(index)
            elif not names <= self._kept.keys():
                wanted.update(name for name in layer.inputs if name is not None)
        return idle

    def _keep(self, name: str, value: np.ndarray) -> None:
        """Keep a value within the budget. What shares the memory of something kept, or of a constant, is free."""
        if value.base is not None:
            return
        if value.nbytes <= self._budget:
            self._budget -= value.nbytes
            self._kept[name] = value

    def _checked(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = {tensor.name: tensor for tensor in self.network.inputs}
        if set(inputs) != set(wanted):
            raise OneVisionError(f"inputs {sorted(inputs)} where the network has {sorted(wanted)}")
        for name, array in inputs.items():
            problem = _mismatch(wanted[name], array)
            if problem:
                raise OneVisionError(f"input {name} {problem}")
        return dict(inputs)


def run_layer(layer: Layer, inputs: Sequence[np.ndarray | None], kernels: Mapping[str, Kernel] = KERNELS) -> np.ndarray:
    """The output of one layer. Raises OneVisionError for one that is not what the network says."""
    result = kernels[layer.type](layer, inputs)
    problem = _mismatch(layer.outputs[0], result)
    if problem:
        raise layer.error(f"its output {layer.outputs[0].name} {problem}")
    return result


def _mismatch(tensor: Tensor, array: np.ndarray) -> str:
    """How an array contradicts a tensor, or ""."""
    if array.dtype != tensor.dtype:
        return f"is {array.dtype} where the network says {tensor.dtype}"
    fits = array.ndim == len(tensor.shape) and all(
        size in (-1, given) for size, given in zip(tensor.shape, array.shape, strict=True)
    )
    return "" if fits else f"has shape {array.shape} where the network says {tensor.shape}"


def _fixed(network: Network) -> set[str]:
    """Tensors, but for constants themselves, that depend on constants alone."""
    known: set[str] = set()
    fixed: set[str] = set()
    for layer in network.layers:
        names = {tensor.name for tensor in layer.outputs}
        if layer.type == "CONSTANT":
            known |= names
        elif layer.inputs and all(name in known for name in layer.inputs if name is not None):
            known |= names
            fixed |= names
    return fixed


def _last_use(network: Network) -> list[list[str]]:
    """For each layer the tensors that nothing reads after it."""
    last: dict[str, int] = {}
    for index, layer in enumerate(network.layers):
        last.update({tensor.name: index for tensor in layer.outputs})
        last.update({name: index for name in layer.inputs if name is not None})
    result: list[list[str]] = [[] for _ in network.layers]
    for name, index in last.items():
        result[index].append(name)
    return result

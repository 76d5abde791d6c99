"""The most that libraries reach in products of square matrices, a worker like the engines."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .worker import seconds

SIZES = (1024, 2048, 4096)
REPEATS = 5


class Peaks:
    """Operations a second of the size that is fastest."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def torch_rate(self, kind: str) -> float:
        """PyTorch's, in FP32 or BF16."""
        import torch

        torch.set_num_threads(self.threads)
        dtype = {"FP32": torch.float32, "BF16": torch.bfloat16}[kind]
        pairs = [(torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)) for n in SIZES]
        return best_rate([(len(a), lambda a=a, b=b: a @ b) for a, b in pairs])

    def onnx_rate(self, kind: str) -> float:
        """ONNX Runtime's: MatMul in FP32, or MatMulInteger of u8 activations and constant s8 weights."""
        calls = []
        for n in SIZES:
            session = self._session(n, kind == "INT8")
            random = np.random.default_rng(0)
            a = random.integers(0, 255, (n, n)).astype(np.uint8 if kind == "INT8" else np.float32)
            calls.append((n, lambda session=session, a=a: session.run(None, {"a": a})))
        return best_rate(calls)

    def _session(self, n: int, integers: bool) -> Any:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        weights = np.random.default_rng(1).integers(-127, 127, (n, n)).astype(np.int8 if integers else np.float32)
        kinds = (TensorProto.UINT8, TensorProto.INT32) if integers else (TensorProto.FLOAT, TensorProto.FLOAT)
        graph = helper.make_graph(
            [helper.make_node("MatMulInteger" if integers else "MatMul", ["a", "b"], ["y"])],
            "product",
            [helper.make_tensor_value_info("a", kinds[0], [n, n])],
            [helper.make_tensor_value_info("y", kinds[1], [n, n])],
            [numpy_helper.from_array(weights, "b")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


PEAKS = {
    "PyTorch FP32": ("torch_rate", "FP32"),
    "PyTorch BF16": ("torch_rate", "BF16"),
    "ONNX Runtime FP32": ("onnx_rate", "FP32"),
    "ONNX Runtime INT8": ("onnx_rate", "INT8"),
}


def best_rate(calls: Sequence[tuple[int, Callable[[], Any]]]) -> float:
    """Operations a second of the fastest of some calls, each a product of n x n matrices."""
    return max(2 * n**3 / min(seconds(call) for _ in range(REPEATS)) for n, call in calls)

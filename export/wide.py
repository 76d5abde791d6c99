"""The same graph for an engine without FP4: NVFP4 weights as INT8 of twice their value, under half their scale.

ONNX Runtime's CPU provider has no FP4. The graph written here says INT8 where the bundle's graph says FP4, and
shares its data file for everything else; whoever loads it makes the INT8 codes and their scales from the FP4 ones
(runtime/wide.py), so that nothing is stored twice.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ..bundle import BundleWriter, PackedWeight, WideSpec
from ..precision.plan import PRECISIONS, Plan
from .graph import Weights
from .weights import Values


def wide_plan(plan: Plan) -> Plan:
    """The plan with NVFP4's numbers in INT8."""
    rules = (replace(rule, precision="int8-block16") if rule.precision == "nvfp4" else rule for rule in plan.rules)
    return replace(plan, rules=tuple(rules))


def wide_graph(
    model: ir.Model, wide: Weights, written: Weights, file: str, data: str, writer: BundleWriter, values: Values
) -> WideSpec:
    """Write `model`, whose parameters are `wide`, beside the graph whose parameters are `written`."""
    packed = []
    for name, weight in wide.by_name.items():
        stored = written.by_name[name]
        tensor = stored.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert weight.dtype is not None
        if stored.dtype == ir.DataType.FLOAT4E2M1:
            packed.append(_packed(name, written, values))
        weight.const_value = ir.ExternalTensor(
            data, tensor.offset, tensor.length, weight.dtype, shape=ir.Shape(weight.stored_shape), name=name
        )
    ir.save(model, writer.path(file))
    writer.seal(file)
    return WideSpec(file, tuple(packed))


def _packed(name: str, written: Weights, values: Values) -> PackedWeight:
    codes, scales = (written.by_name[n].const_value for n in (name, f"{name}_scale"))
    assert isinstance(codes, ir.ExternalTensor)
    assert isinstance(scales, ir.ExternalTensor)
    assert codes.offset is not None
    assert scales.offset is not None
    rows, columns = written.by_name[name].stored_shape
    tensor_scale = float(np.asarray(values[f"{name}_scale_2"]).reshape(()))
    return PackedWeight(name, (rows, columns), PRECISIONS["nvfp4"].block, codes.offset, scales.offset, tensor_scale)

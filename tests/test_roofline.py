"""The least time of a step: by hand, and what must hold of any bytes and operations."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onevision_edge.engines.roofline import arithmetic, decode_seconds, prefill_seconds
from onevision_edge.engines.targets import target
from onevision_edge.errors import OneVisionError
from onevision_edge.precision.plan import PRECISIONS

sizes = st.integers(0, 10**13)


def test_bounds_by_hand() -> None:
    orin = target("jetson-orin-nx-16gb")
    assert decode_seconds(2_048_000_000, 0, orin) == pytest.approx(0.02, rel=1e-12)  # 2.048 GB at 102.4 GB/s
    assert decode_seconds(0, 102_400, orin) == pytest.approx(1e-6, rel=1e-12)
    h100 = target("h100-80gb-sxm")
    assert prefill_seconds({"fp16": 494.5e9}, h100) == pytest.approx(1e-3, rel=1e-12)  # 989 GFLOP at 989 TFLOPS
    assert prefill_seconds({"fp16": 494.5e9, "fp8": 989.5e9}, h100) == pytest.approx(2e-3, rel=1e-12)
    assert prefill_seconds({"bf16": 494.5e9}, h100) == prefill_seconds({"fp16": 494.5e9}, h100)
    assert prefill_seconds({}, h100) == 0


@given(weights=sizes, kv=sizes, more=sizes)
def test_decode_is_linear_in_bytes(weights: int, kv: int, more: int) -> None:
    thor = target("jetson-thor-t5000")
    assert decode_seconds(weights, kv, thor) == decode_seconds(kv, weights, thor)
    parts = decode_seconds(weights, kv, thor) + decode_seconds(more, 0, thor)
    assert decode_seconds(weights + more, kv, thor) == pytest.approx(parts, rel=1e-12)
    assert decode_seconds(weights, kv, replace(thor, bandwidth=136.5e9)) == 2 * decode_seconds(weights, kv, thor)


@given(macs=st.dictionaries(st.sampled_from(["fp16", "int8", "fp8", "nvfp4"]), st.floats(0, 1e18)))
def test_prefill_adds_up(macs: dict[str, float]) -> None:
    b200 = target("b200")
    alone = [prefill_seconds({name: count}, b200) for name, count in macs.items()]
    assert prefill_seconds(macs, b200) == pytest.approx(sum(alone), rel=1e-12)
    in_fp16 = prefill_seconds({"fp16": sum(macs.values())}, b200)
    assert in_fp16 / 4 * (1 - 1e-9) <= prefill_seconds(macs, b200) <= in_fp16 * (1 + 1e-9)


def test_weights_alone_leave_the_arithmetic_as_it_was() -> None:
    computed = {name: arithmetic(precision, "fp16") for name, precision in PRECISIONS.items()}
    assert {name for name, kind in computed.items() if kind != "fp16"} == {"int8", "fp8"}
    assert (computed["int8"], computed["fp8"]) == ("int8", "fp8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sm86", r"sm86 is a compute capability, which has no bandwidth: name a device, a2, a10, .*rtx-3090$"),
        ("sm121", r"name a device, dgx-spark$"),
        ("cpu", r"cpu has no bandwidth"),
    ],
)
def test_no_bandwidth_no_bound(name: str, message: str) -> None:
    with pytest.raises(OneVisionError, match=message):
        decode_seconds(1, 1, target(name))
    with pytest.raises(OneVisionError, match=message.replace("bandwidth", "peak rates")):
        prefill_seconds({"fp16": 1}, target(name))


def test_rates_that_are_missing_are_named() -> None:
    with pytest.raises(OneVisionError, match=r"a30 has no peak rate for fp8: there are fp16, int8$"):
        prefill_seconds({"fp8": 1}, target("a30"))
    with pytest.raises(OneVisionError, match="no peak rate for fp32"):
        prefill_seconds({"fp32": 1}, target("a30"))

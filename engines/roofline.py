"""The least time a step can take on a target, from bytes and operations: a bound to compare measurements with.

Source: Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model" (2009). Decode at batch 1
uses each weight once, so memory bounds it; prefill uses it for every token, so arithmetic does.
"""

from collections.abc import Mapping

from ..errors import OneVisionError
from ..precision.plan import Precision
from .targets import Target, targets


def decode_seconds(weight_bytes: int, kv_bytes: int, target: Target) -> float:
    """Seconds of one decode step that reads so many bytes of weights, and of keys and values of all sequences.

    Raises OneVisionError where the target has no bandwidth.
    """
    if target.bandwidth is None:
        raise _unmeasured(target, "bandwidth")
    return (weight_bytes + kv_bytes) / target.bandwidth


def decode_bytes(seconds: float, target: Target) -> int:
    """Bytes that a decode step can read in so many seconds: the inverse of `decode_seconds`."""
    if target.bandwidth is None:
        raise _unmeasured(target, "bandwidth")
    return int(seconds * target.bandwidth)


def prefill_seconds(macs: Mapping[str, float], target: Target) -> float:
    """Seconds of so many multiply-adds, by what they are computed in (see `arithmetic`), one kind after the other.

    Raises OneVisionError where the target has no rate for one of them.
    """
    return sum(2 * count / _rate(name, target) for name, count in macs.items())


def arithmetic(precision: Precision, dtype: str) -> str:
    """What the products of a module are computed in: codes where its activations are quantised, the graph's dtype
    where only weights are (INT4, and NVFP4 as it is exported)."""
    return precision.activation or dtype


def _rate(name: str, target: Target) -> float:
    """BF16 runs at FP16's rate."""
    key = "fp16" if name == "bf16" else name
    if not target.rates:
        raise _unmeasured(target, "peak rates")
    if key not in target.rates:
        raise OneVisionError(f"{target.name} has no peak rate for {name}: there are {', '.join(target.rates)}")
    return target.rates[key]


def _unmeasured(target: Target, what: str) -> OneVisionError:
    if target.capability is None:
        return OneVisionError(f"{target.name} has no {what} of its own, processors differ: measure on the machine")
    named = [t.name for t in targets() if t.capability == target.capability and t.bandwidth]
    return OneVisionError(
        f"{target.name} is a compute capability, which has no {what}: name a device, {', '.join(named)}"
    )

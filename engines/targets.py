"""What an engine can be built for: a device, a compute capability, or the CPU; its precisions, limits and defaults.

A target is asked for by name: a device of devices.py (its words in any order and case, and what a driver adds, such as
NVIDIA or GeForce), a few of its words (a100, jetson-orin), a compute capability (sm80, 8.0), or cpu.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from ..errors import OneVisionError
from ..precision.plan import Plan, Rule, default_plan
from .devices import CAPABILITIES, DEVICES, SINCE, Capability, Device

LISTING = "onevision-edge targets"  # the command that lists them
_SM = re.compile(r"(?:(?:sm|compute)-?(\d{2,3})|(\d{1,2})\.(\d))[af]?")
_FILLER = {"nvidia", "geforce", "tesla"}
_SAME = {"sxm4": "sxm", "sxm5": "sxm"}
_ALIASES = {
    "gb10": "dgx-spark",
    "drive-agx-orin": "drive-orin",
    "drive-agx-thor": "drive-thor",
    "jetson-agx-thor": "jetson-thor-t5000",
    "sm101": "sm110",  # what CUDA 12 called Thor
}
# Devices that people may still name, by words; not to be taken for their successors (jetson-nano, orin-nano).
_TOO_OLD = {"xavier": "sm72", "v100": "sm70", "jetson-tx2": "sm62", "jetson-tx1": "sm53", "jetson-nano": "sm53"}
_CPU_LACKS = {
    "fp8": "ONNX Runtime's CPU kernels widen it, which gains nothing",
    "nvfp4": "ONNX Runtime's CPU kernels have no FP4",
}
_DTYPE_LACKS = {"bf16": "it came with sm80", "fp32": "TensorRT-RTX builds no FP32 products for it"}


@dataclass(frozen=True, slots=True)
class Target:
    """What an engine is built for.

    capability: None for the CPU. precisions: of int8, int4, fp8, nvfp4 (a weight-only precision needs that of its
    codes). memory: bytes, nominal. bandwidth: bytes a second. rates: dense operations a second by fp16, int8, fp8,
    nvfp4. All three are unknown (None, empty) where no device is named. dtype: what graphs compute in by default,
    of dtypes. decoder: the default precision of the decoder's layers, for `reason`.
    """

    name: str
    capability: str | None
    precisions: tuple[str, ...]
    memory: int | None
    bandwidth: float | None
    rates: Mapping[str, float] = field(hash=False)
    dtype: str
    decoder: str
    reason: str
    source: str
    dtypes: tuple[str, ...] = ("fp16", "bf16", "fp32")


# FP32 by default: ONNX Runtime widens FP16 when it loads, and maps FP32 weights from the file instead of reading them.
CPU = Target(
    "cpu",
    None,
    ("int8", "int4"),
    None,
    None,
    {},
    "fp32",
    "int4",
    "decode reads every weight for each token, and ONNX Runtime multiplies by INT4 weights as stored: "
    "an eighth of FP32's bytes",
    "ONNX Runtime 1.32, CPU provider; what runs is in tests/test_formats.py. Bandwidth and rates are the machine's own",
    ("fp32", "fp16"),
)


def targets() -> list[Target]:
    """Every device, every compute capability, and the CPU."""
    return [*map(_of_device, DEVICES), *map(_of_capability, CAPABILITIES.values()), CPU]


def target(name: str) -> Target:
    """The target of a name.

    Some of a device's words, the first among them, name every device that has them: the target is then the least of
    these in memory, bandwidth and rates. Raises OneVisionError for a name that is unknown, too old, or stands
    for devices of more than one compute capability.
    """
    wanted = "-".join(_words(name))
    wanted = _ALIASES.get(wanted, wanted)
    if wanted == CPU.name:
        return CPU
    if match := _SM.fullmatch(wanted):
        return _capability_target(match[1] or match[2] + match[3])
    words = set(wanted.split("-"))
    for old, capability in _TOO_OLD.items():
        if words.issuperset(old.split("-")) and "orin" not in words:
            raise _too_old(wanted, capability)
    found = _devices(words)
    if not found:
        raise _unknown(name, wanted)
    return _least(wanted, found)


def check(plan: Plan, target: Target) -> None:
    """Raise OneVisionError where the target cannot run a plan, naming what it can run instead."""
    missing = [need for need in plan.needs if need not in target.precisions]
    if missing:
        lacks = " and no ".join(f"{need.upper()} ({_why(need, target)})" for need in missing)
        there = _listed([precision.upper() for precision in target.precisions], "and")
        raise OneVisionError(
            f"{_title(target)} has no {lacks}, which plan {plan.name} asks for: {there} "
            f"{'runs' if len(target.precisions) == 1 else 'run'} there; "
            f"use --precision {_listed(target.precisions, 'or')}"
        )
    if plan.dtype not in target.dtypes:
        why = "ONNX Runtime has no BF16 kernels on the CPU" if target.capability is None else _DTYPE_LACKS[plan.dtype]
        raise OneVisionError(
            f"{_title(target)} does not compute in {plan.dtype.upper()} ({why}): use --dtype {target.dtype}"
        )


def recommended(target: Target) -> Plan:
    """The target's default plan: the decoder as its row says, for the reason there; the rest as in every plan."""
    plan = default_plan(target.decoder, target.dtype)

    def reasoned(rule: Rule) -> Rule:
        return replace(rule, reason=target.reason) if rule.modules == "model.layers.*" else rule

    return replace(plan, rules=tuple(map(reasoned, plan.rules)))


def _words(name: str) -> list[str]:
    words = re.split(r"[\s_/-]+", name.strip().lower())
    return [_SAME.get(word, word) for word in words if word and word not in _FILLER]


def _devices(words: set[str]) -> list[Device]:
    """The device that has exactly these words, or all that have these and more."""
    split = {device.name: device.name.split("-") for device in DEVICES}
    exact = [device for device in DEVICES if words == set(split[device.name])]
    return exact or [d for d in DEVICES if split[d.name][0] in words and words.issubset(split[d.name])]


def _of_device(device: Device) -> Target:
    return replace(
        _of_capability(CAPABILITIES[device.capability]),
        name=device.name,
        memory=device.memory * 2**30,
        bandwidth=device.bandwidth * 1e9,
        rates={precision: rate * 1e12 for precision, rate in device.rates.items()},
        decoder=device.decoder or CAPABILITIES[device.capability].decoder,
        reason=device.reason or CAPABILITIES[device.capability].reason,
        source=device.source,
    )


def _of_capability(c: Capability) -> Target:
    return Target(c.name, c.name, c.precisions, None, None, {}, "fp16", c.decoder, c.reason, c.source, c.dtypes)


def _capability_target(digits: str) -> Target:
    name = f"sm{digits}"
    if name in CAPABILITIES:
        return _of_capability(CAPABILITIES[name])
    if int(digits) < 75:
        raise _too_old(name, name)
    raise OneVisionError(f"unknown compute capability {name}: choose one of {', '.join(CAPABILITIES)}")


def _least(name: str, devices: Sequence[Device]) -> Target:
    """What all of the devices have."""
    if len({device.capability for device in devices}) > 1:
        named = [f"{device.name} ({device.capability})" for device in devices[:6]]
        raise OneVisionError(f"{name} could be {', '.join(named)}{', ...' * (len(devices) > 6)}: name one")
    if len(devices) == 1:
        return _of_device(devices[0])
    least = replace(
        devices[0],
        name=name,
        memory=min(device.memory for device in devices),
        bandwidth=min(device.bandwidth for device in devices),
        rates={key: min(device.rates[key] for device in devices) for key in devices[0].rates},
        source=f"the least of {', '.join(device.name for device in devices)}",
    )
    return _of_device(least)


def _too_old(name: str, capability: str) -> OneVisionError:
    what = name if name == capability else f"{name} ({capability})"
    return OneVisionError(
        f"{what} is not a target: TensorRT 10.15 and later, which these graphs need, starts at sm75; "
        f"the cpu target runs on its processor"
    )


def _unknown(name: str, wanted: str) -> OneVisionError:
    near = get_close_matches(wanted, [known.name for known in targets()], n=3, cutoff=0.5)
    guess = f"did you mean {_listed(near, 'or')}? " if near else ""
    return OneVisionError(
        f"unknown target {name!r}: {guess}{LISTING!r} lists them; a device that is not there runs what its "
        f"compute capability runs, of {', '.join(CAPABILITIES)}"
    )


def _title(target: Target) -> str:
    if target.capability is None:
        return "the cpu target"
    if target.name == target.capability:
        return f"{target.name} ({CAPABILITIES[target.name].examples})"
    return f"{target.name} ({target.capability})"


def _why(precision: str, target: Target) -> str:
    if target.capability is None:
        return _CPU_LACKS[precision]
    return f"it came with {SINCE[precision]}"


def _listed(names: Sequence[str], last: str) -> str:
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

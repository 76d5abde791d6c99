"""What a build will take and give, from the manifest alone: engine size, memory, time.

Sizes and build memory follow builds by TensorRT-RTX 1.7 of decoders of 3 MB to 4 GB (benchmarks/engine_builds.py, all
within a quarter), the bounds on time the roofline, device memory a count of the tensors that live at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..bundle import Manifest
from ..errors import OneVisionError
from ..precision import float_format
from ..runtime.memory import MemoryItem
from . import roofline
from .linears import linears, plan_of
from .profiles import Profile
from .targets import Target

# Bytes of an engine beside its weights: at all, for each layer, and for each layer more with quantised weights.
KERNELS = {"vision": (1.2e6, 0.2e6, 0.5e6), "decoder": (1.4e6, 0.5e6, 0.5e6)}
STORED_ONCE = ("int4", "nvfp4")  # weights that two profiles share
# Bytes of a build's peak memory: at all, for each byte of weights, and for each byte again with a second profile.
BUILD_BASE = 0.285e9
BUILD_PER_FLOAT = (3.12, 2.6)
BUILD_PER_CODE = {"int8": (3.3, 2.6), "fp8": (3.3, 2.6), "int4": (3.6, 1.5), "nvfp4": (3.6, 0.5)}


@dataclass(frozen=True, slots=True)
class PartEstimate:
    """Of one graph, in bytes: its weights, its engine, and the memory its build takes on this machine."""

    weights: int
    engine: int
    build: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of a build: per part, device memory by item, and seconds by step (empty where no device is named)."""

    parts: Mapping[str, PartEstimate]
    memory: tuple[MemoryItem, ...]
    seconds: Mapping[str, float]

    @property
    def engine_bytes(self) -> int:
        """Of all engines: what they take on disk."""
        return sum(part.engine for part in self.parts.values())

    @property
    def build_bytes(self) -> int:
        """Of the largest build: parts are built one after another."""
        return max(part.build for part in self.parts.values())

    @property
    def device_bytes(self) -> int:
        """Of all items, on the device at once."""
        return sum(item.bytes for item in self.memory)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the record."""
        return {
            "parts": {part: asdict(estimate) for part, estimate in self.parts.items()},
            "engine_bytes": self.engine_bytes,
            "build_bytes": self.build_bytes,
            "device_bytes": self.device_bytes,
            "memory": [asdict(item) for item in self.memory],
            "seconds": dict(self.seconds),
        }


def estimate(
    manifest: Manifest, parts: Sequence[str], profiles: Sequence[Profile], targets: Sequence[Target]
) -> Estimate:
    """The estimate of a build of some parts, with the profiles of `profiles.profiles`."""
    found = {}
    for part in parts:
        spec, many = manifest.graphs[part], len(profiles) if part == "decoder" else 1
        weights = sum(spec.weights.values())
        found[part] = PartEstimate(weights, engine_bytes(manifest, part, many), build_bytes(manifest, part, many))
    memory = device_memory(manifest, {part: e.engine for part, e in found.items()}, profiles)
    return Estimate(found, tuple(memory), _seconds(manifest, parts, profiles[0], targets))


def engine_bytes(manifest: Manifest, part: str, profiles: int = 1) -> int:
    """Size of an engine: weights as stored, kernels for each profile, weights of 16 and 8 bits for each profile."""
    spec = manifest.graphs[part]
    base, float_layer, quantized_layer = KERNELS[part]
    kernels = base + _layers(manifest, part) * (float_layer + quantized_layer * spec.quantized)
    again = sum(count for name, count in spec.weights.items() if name not in STORED_ONCE)
    return int(sum(spec.weights.values()) + kernels * profiles + again * (profiles - 1))


def build_bytes(manifest: Manifest, part: str, profiles: int = 1) -> int:
    """Peak memory of a build: a base, and weights several times over."""
    total = BUILD_BASE
    for name, count in manifest.graphs[part].weights.items():
        once, again = BUILD_PER_CODE.get(name, BUILD_PER_FLOAT)
        total += count * (once + again * (profiles - 1))
    return int(total)


def _layers(manifest: Manifest, part: str) -> int:
    return manifest.model.vision.depth if part == "vision" else manifest.model.text.num_hidden_layers


def device_memory(manifest: Manifest, engines: Mapping[str, int], profiles: Sequence[Profile]) -> list[MemoryItem]:
    """Bytes on the device: engines, the KV cache for the largest batch, and what lives at once at the largest sizes.

    Counted, not measured: TensorRT tells its own figure on a device alone.
    """
    wide, items = profiles[0], []
    for part, size in engines.items():
        items.append(MemoryItem(f"{part} engine", size, "weights and kernels"))
    if "decoder" in engines:
        items += _decoder_memory(manifest, wide)
    if "vision" in engines:
        items.append(_vision_memory(manifest, wide))
    return items


def _decoder_memory(manifest: Manifest, wide: Profile) -> list[MemoryItem]:
    text, spec = manifest.model.text, manifest.graphs["decoder"]
    itemsize = float_format(spec.dtype).itemsize
    cache = next(t.dtype for t in spec.inputs if t.name == "past_key.0")
    row = text.num_key_value_heads * text.head_dim
    batch, length, tokens = wide.batch.max, wide.length.max, wide.batch.max * wide.tokens.max
    stored = 2 * text.num_hidden_layers * row * (1 if cache == "int8" else itemsize)
    queries = text.num_attention_heads * text.head_dim
    widest = max(2 * queries + 2 * row, 3 * text.intermediate_size)
    activations = tokens * itemsize * (2 * text.hidden_size + widest) + tokens * length
    if cache == "int8":  # keys and values of a layer, given back their scale
        activations += 2 * batch * length * row * itemsize
    if spec.dtype == "fp32":  # no fused attention
        activations += 2 * tokens * text.num_attention_heads * length * 4
    logits = batch * wide.rows.max * text.vocab_size * (itemsize + 4)
    # TensorRT updates a cache where it lies by TensorScatter, which takes floats; an INT8 one is an output apart.
    copies, note = (2, ", in and out") if cache == "int8" else (1, "")
    return [
        MemoryItem("KV cache", copies * batch * length * stored, f"{batch} x {length} tokens of {stored} bytes{note}"),
        MemoryItem("decoder activations", activations, f"of {batch} x {wide.tokens.max} tokens, one layer at a time"),
        MemoryItem("logits", logits, f"{batch} x {wide.rows.max} rows of {text.vocab_size}"),
    ]


def _vision_memory(manifest: Manifest, wide: Profile) -> MemoryItem:
    vision = manifest.model.vision
    itemsize = float_format(manifest.graphs["vision"].dtype).itemsize
    rows = wide.images.max * (wide.patches.max + 1)
    widest = max(4 * vision.hidden_size, 2 * vision.intermediate_size)
    size = rows * itemsize * (2 * vision.hidden_size + widest + vision.patch_dim)
    if itemsize == 4:
        size += 2 * wide.images.max * vision.num_heads * (wide.patches.max + 1) ** 2 * 4
    return MemoryItem(
        "vision activations", size, f"of {wide.images.max} x {wide.patches.max} patches, a block at a time"
    )


def _seconds(manifest: Manifest, parts: Sequence[str], wide: Profile, targets: Sequence[Target]) -> dict[str, float]:
    """Least seconds of each step at the profile's largest sizes and batch 1, on the slowest of the targets."""
    devices = [t for t in targets if t.bandwidth and t.rates]
    if not devices or len(devices) < len(targets):
        return {}
    found: dict[str, float] = {}
    if "vision" in parts:
        macs = macs_of(manifest, "vision", wide.patches.max + 1)
        found["vision"] = max(roofline.prefill_seconds(macs, t) for t in devices)
    if "decoder" in parts:
        macs = macs_of(manifest, "decoder", wide.tokens.max)
        found["prefill"] = max(roofline.prefill_seconds(macs, t) for t in devices)
        weights = sum(manifest.graphs["decoder"].weights.values())
        cache = next(i.bytes for i in _decoder_memory(manifest, wide) if i.name == "KV cache") // wide.batch.max
        found["decode"] = max(
            roofline.decode_seconds(weights, cache * wide.length.opt // wide.length.max, t) for t in devices
        )
    return found


def macs_of(manifest: Manifest, part: str, tokens: int) -> dict[str, float]:
    """Multiply-adds of one sequence of so many tokens, or one image of so many rows, by what they are computed in.

    The head runs for one token, the merger for a quarter of the patches' rows.
    """
    spec, config = manifest.graphs[part], manifest.model
    plan = plan_of(manifest)
    found: dict[str, float] = {}
    for name, (inputs, outputs) in linears(part, config).items():
        rows = 1 if name == "lm_head" else tokens / config.vision.merge_unit if "merger" in name else tokens
        kind = roofline.arithmetic(plan.precision(part, name, inputs), spec.dtype)
        found[kind] = found.get(kind, 0.0) + rows * inputs * outputs
    v, t = config.vision, config.text
    if part == "vision":
        attention = 2.0 * tokens**2 * v.hidden_size * v.depth
    else:  # causal: half of the square
        attention = float(tokens**2 * t.num_attention_heads * t.head_dim * t.num_hidden_layers)
    found[spec.dtype] = found.get(spec.dtype, 0.0) + attention
    return found


def check_fits(found: Estimate, targets: Sequence[Target], ram: int | None, disk: int | None) -> None:
    """Raise OneVisionError, with numbers, where a build cannot fit.

    targets: what has a memory is held against it. ram, disk: bytes free on this machine; None: unknown, or not built
    here.
    """
    for target in targets:
        if target.memory is not None and found.device_bytes > target.memory:
            largest = ", ".join(f"{item.name} {_gb(item.bytes)}" for item in sorted(found.memory, key=_by_size)[:3])
            raise OneVisionError(
                f"{target.name} has {_gb(target.memory)} of memory, and this needs {_gb(found.device_bytes)} "
                f"({largest}): quantise further, or lower --max-batch, --max-pixels or the bundle's --max-length"
            )
    if ram is not None and found.build_bytes > ram:
        raise OneVisionError(
            f"the build needs about {_gb(found.build_bytes)} of memory, and this machine has {_gb(ram)} available: "
            "build where there is more, by the commands of --dry-run"
        )
    if disk is not None and found.engine_bytes > disk:
        raise OneVisionError(f"the engines need about {_gb(found.engine_bytes)}, and the disk has {_gb(disk)} free")


def _by_size(item: MemoryItem) -> int:
    return -item.bytes


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"

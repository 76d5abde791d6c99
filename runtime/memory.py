"""What a bundle needs in memory on a CPU: on ONNX Runtime, from its manifest alone, or in its cpu engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import Bundle, Manifest
from ..config import VisionConfig, read_json
from ..engines.cpu.record import CpuRecord, folder_of
from ..precision import float_format
from .cpu_graph import buffer_bytes, head_bytes


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One part of the plan, in bytes."""

    name: str
    bytes: int
    note: str


def memory_plan(manifest: Manifest, length: int, batch: int = 1, pixels: int = 0, chunk: int = 512) -> list[MemoryItem]:
    """Bytes of each part for `batch` sequences of `length` tokens and one image of `pixels` pixels.

    Weights count as the file maps them; kernels that repack them, or widen FP16, hold a copy besides.
    """
    items = []
    for part, spec in manifest.graphs.items():
        weights = manifest.files[f"{spec.file}.data"].size
        stored = ", ".join(sorted(spec.weights, key=lambda name: -spec.weights[name]))
        items.append(MemoryItem(f"{part} weights", weights, f"{stored}, mapped from {spec.file}.data"))
        if spec.wide is not None:
            codes = sum(w.shape[0] * w.shape[1] for w in spec.wide.weights)
            items.append(MemoryItem(f"{part} NVFP4 as INT8", codes, "made when it is loaded: there is no FP4 here"))
    if "decoder" in manifest.graphs:
        items += _decoder_items(manifest, length, batch, chunk)
    if "vision" in manifest.graphs and pixels:
        items.append(_vision_scores(manifest, pixels))
    return items


def engine_memory_plan(
    bundle: Bundle, record: CpuRecord, length: int, batch: int = 1, pixels: int = 0, chunk: int = 512
) -> list[MemoryItem]:
    """The same for a bundle's cpu engine: what is resident once a prompt of `length` tokens and an image were run."""
    manifest, items = bundle.manifest, []
    resident = process_field("VmRSS")
    if resident is not None:
        items.append(MemoryItem("Python and libraries", resident, "as this process has them now"))
    for part in record.parts:
        program = read_json(folder_of(bundle) / f"{part}.json")
        weights = record.parts[part].files[f"{part}.weights"].size
        items.append(MemoryItem(f"{part} weights", weights, f"mapped from engines/cpu/{part}.weights"))
        if part == "decoder":
            per_token = 2 * program["layers"] * program["kv_heads"] * (program["head_dim"] + 4)
            heads = 2 * program["layers"] * program["kv_heads"] * batch
            cache = heads * head_bytes(length, program["head_dim"])
            items.append(MemoryItem("KV cache", cache, f"{batch} x {length} tokens of {per_token} bytes"))
            tokens = max(min(chunk, length), batch)
            counts: tuple[int, ...] = (tokens, batch)
            note = f"for {tokens} tokens a call"
        else:
            patches = pixels // manifest.model.vision.patch_size**2
            counts = (patches, patches + 1, patches // manifest.model.vision.merge_unit)
            note = f"for an image of {patches} patches, keys and values with them"
        items.append(MemoryItem(f"{part} buffers", _buffer_bytes(program, part, counts), note))
    return items


def _buffer_bytes(program: Mapping[str, Any], part: str, counts: tuple[int, ...]) -> int:
    """What a call with so many rows of each kind takes beside the cache."""
    sizes = [{int(kind): int(n) for kind, n in each.items()} for each in program["buffers"].values()]
    found = sum(buffer_bytes(each, counts) for each in sizes)
    if part == "vision":  # keys and values of the block at work
        found += 2 * int(program["kv_heads"]) * head_bytes(counts[1], int(program["head_dim"]))
    return found


def _decoder_items(manifest: Manifest, length: int, batch: int, chunk: int) -> list[MemoryItem]:
    text = manifest.model.text
    cache = next(t.dtype for t in manifest.graphs["decoder"].inputs if t.name == "past_key.0")
    itemsize = 1 if cache == "int8" else float_format(manifest.graphs["decoder"].dtype).itemsize
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * itemsize
    tokens = min(chunk, length)
    scores = text.num_attention_heads * tokens * length * 4
    logits = batch * text.vocab_size * 4
    return [
        MemoryItem("KV cache", batch * length * per_token, f"{batch} x {length} tokens of {per_token} bytes"),
        MemoryItem("prefill attention", scores, f"scores of a chunk of {tokens} tokens, one layer"),
        MemoryItem("logits", logits, f"{batch} x {text.vocab_size} float32"),
    ]


def _vision_scores(manifest: Manifest, pixels: int) -> MemoryItem:
    vision = manifest.model.vision
    patches = pixels // vision.patch_size**2
    note = f"scores of one image of {patches} patches, one block"
    return MemoryItem("vision attention", vision_attention_bytes(vision, patches), note)


def vision_attention_bytes(config: VisionConfig, patches: int) -> int:
    """Attention scores of one image in one block, float32, and their softmax beside them."""
    return 2 * config.num_heads * (patches + 1) ** 2 * 4


def memory_field(name: str) -> int | None:
    """MemTotal, MemAvailable or another field of /proc/meminfo in bytes; None where there is no such file."""
    return _field(Path("/proc/meminfo"), name)


def process_field(name: str) -> int | None:
    """VmRSS, VmHWM or another field of this process in bytes; None where the system does not tell."""
    return _field(Path("/proc/self/status"), name)


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)

"""Inside a stage that fails: the first of its modules whose output is out of tolerance."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...calibration.rows import Row
from .distance import DistanceTally
from .gates import Gates
from .probe import model_stages, stage_rank
from .recording import Recording
from .sides import BundleSide, Side, segments
from .staged import StagedGraph
from .walk import walked_row

_VISION = ("patch_embed", "vision", "merger")
# Modules whose outputs a quantised bundle may hold under other scales, which the next one's weights take up.
_FOLDED = {
    *("input_layernorm", "post_attention_layernorm", "norm1", "norm2", "visual.merger.ln_q", "model.norm"),
    *("attn.qkv", "attn", "self_attn.v_proj", "self_attn", "mlp.up_proj", "mlp"),
}


def failed_module(
    reference: Side, side: Side, recording: Recording, judged: Mapping[str, Any], gates: Gates
) -> dict[str, Any] | None:
    """The module of the first failed stage, both stages reading what the reference's stage before gave.

    None where the stage is right by itself, where it has no modules, or where one of the sides is not ONNX graphs.
    In a quantised bundle, modules with a folded scale are passed over, so that the next one may be named for theirs.
    """
    stage = judged["first_failed_stage"]
    if not (isinstance(reference, BundleSide) and isinstance(side, BundleSide)):
        return None
    if stage not in recording.widths or stage_rank(stage)[0] in (0, 4, 7):  # preprocess, stitched, tokens: no modules
        return None
    part = "vision" if stage.startswith(_VISION) else "decoder"
    graphs = [one.staged_graph(part) for one in (reference, side)]
    if not all(isinstance(graph, StagedGraph) for graph in graphs):
        return None
    limit = gates.of(judged["subject"]["precision"]).limit("own", stage) or 0.0
    index = recording.walked[0]
    row = walked_row(recording.row(index))
    wanted, found = (_outputs(graph, part, stage, recording, index, row) for graph in graphs)
    passed = _FOLDED if side.bundle.manifest.quantization is not None else set()
    return _first_beyond(stage, {k: v for k, v in wanted.items() if k not in passed}, found, limit)


def _first_beyond(
    stage: str, wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], limit: float
) -> dict[str, Any] | None:
    for module, values in wanted.items():
        if module not in found or found[module].shape != values.shape:
            continue
        tally = DistanceTally()
        width = values.shape[-1]
        tally.add(values.reshape(-1, width), found[module].reshape(-1, width), "")
        distance = tally.distance()
        if distance is not None and not distance.relative_l2 <= limit:
            relative = distance.relative_l2 if np.isfinite(distance.relative_l2) else None
            return {"stage": stage, "module": module, "relative_l2": relative}
    return None


def _outputs(
    graph: StagedGraph, part: str, stage: str, recording: Recording, index: int, row: Row
) -> dict[str, np.ndarray]:
    stages = model_stages(recording.config.vision.depth, recording.config.text.num_hidden_layers)
    stream = recording.stream(index, stages[stages.index(stage) - 1])
    if part == "vision":
        return _vision_outputs(graph, stage, stream, row, recording)
    tokens = len(row.input_ids)
    rows = np.asarray(stream if stream is not None else np.empty((0, 0), np.float32))
    inputs = {
        "position_ids": np.arange(tokens)[None],
        "write_indices": np.zeros(1, np.int64),
        "valid_length": np.array([tokens]),
        "logits_indices": np.arange(tokens)[None],
    }
    return graph.module_outputs(stage, rows, inputs, graph.empty_caches(1))


def _vision_outputs(
    graph: StagedGraph, stage: str, stream: np.ndarray | None, row: Row, recording: Recording
) -> dict[str, np.ndarray]:
    """Of the row's first image."""
    from ...runtime.images import patch_positions

    merge = recording.config.vision.spatial_merge_size
    values, size = next(segments(row))
    rows = np.asarray(stream if stream is not None else values)[: len(values) + (stage != "patch_embed")]
    inputs = {"pixel_values": graph.floats(values)[None], "patch_positions": patch_positions(*size, merge)}
    return graph.module_outputs(stage, rows, inputs, {})

"""The walk through the stages: what passes between them, held against what the reference's stages gave.

Two passes. In the first the candidate runs as it is deployed, and what reaches each stage's output carries the errors
of all before it. In the second every stage reads what the reference's stage before gave, so that only its own error
is left: that is where a fault is named, and where a quantised layer shows what it costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...bundle import Progress, no_progress
from ...calibration.dataset import Dataset
from ...calibration.rows import Row
from ...calibration.scored import scored
from .distance import Distance, DistanceTally
from .probe import LOGITS, MERGER, PREPROCESS, model_stages
from .recording import Recording, StreamWriter
from .sides import Side, pixel_rows

DECODED = 4  # tokens of an answer that the walk decodes one by one


@dataclass
class Walked:
    """What was compared, by stage: error with everything before, own by itself."""

    error: dict[str, DistanceTally] = field(default_factory=dict)
    own: dict[str, DistanceTally] = field(default_factory=dict)


class Comparing:
    """A probe that compares a row's streams with the recording's; `feed`: it gives every stage the recorded input.

    prompt: tokens that were read at once; the others were decoded. positions: those of the row's logits.
    """

    def __init__(
        self,
        recording: Recording,
        index: int,
        tallies: dict[str, DistanceTally],
        *,
        feed: bool,
        prompt: int,
        positions: np.ndarray,
    ) -> None:
        self.recording, self.index, self.tallies, self.feed = recording, index, tallies, feed
        self.row, self.prompt = recording.rows[index].name, prompt
        self.prompt_positions = int((positions < prompt).sum())
        stages = model_stages(recording.config.vision.depth, recording.config.text.num_hidden_layers)
        self._reads = dict(zip(stages[1:], stages, strict=False))
        self._read: dict[str, int] = {}
        self._given: dict[str, int] = {}

    def before(self, stage: str, rows: np.ndarray) -> np.ndarray:
        """What the stage reads: the recorded rows where it is fed."""
        stream = self._recorded_input(stage)
        if not self.feed or stream is None:
            return rows
        start = self._read.get(stage, 0)
        self._read[stage] = start + len(rows)
        return np.asarray(stream[start : start + len(rows)])

    def after(self, stage: str, rows: np.ndarray) -> None:
        """Compare what the stage gave."""
        stream = self.recording.stream(self.index, stage)
        if stream is None or (self.feed and self._recorded_input(stage) is None):
            return
        start = self._given.get(stage, 0)
        self._given[stage] = start + len(rows)
        wanted = np.asarray(stream[start : start + len(rows)])
        tally = self.tallies.setdefault(stage, DistanceTally())
        if wanted.shape != rows.shape:
            tally.differ(self.row, start)
            return
        tally.add(wanted, rows, self.row, start, self._decoded(stage))

    def _recorded_input(self, stage: str) -> np.ndarray | None:
        """What the reference's stage read; for what is stitched in, the image embeddings of a row that has any."""
        return self.recording.stream(self.index, self._reads.get(stage, ""))

    def _decoded(self, stage: str) -> int:
        """The first row of a stage's stream that decoding made."""
        if stage == LOGITS:
            return self.prompt_positions
        return self.prompt if stage.startswith("decoder.") else 1 << 62


def walk_reference(side: Side, recording: Recording, index: int, row: Row) -> None:
    """Record the streams of one row."""
    writer, row = StreamWriter(recording, index), walked_row(row)
    try:
        side.trace(row, writer, walked_positions(row, side))
    finally:
        writer.close()


def walk(side: Side, recording: Recording, data: Dataset | None, progress: Progress = no_progress) -> Walked:
    """Compare a side with the recording on its walked rows. data: None: the rows as the reference prepared them."""
    found, rows = Walked(), recording.walked
    for done, index in enumerate(rows, 1):
        recorded = walked_row(recording.row(index))
        row = recorded if data is None else walked_row(data[index])
        positions = walked_positions(recorded, side)
        if _same_shape(row, recorded, found):
            prompt = max(row.answer_start, 1)
            probe = Comparing(recording, index, found.error, feed=False, prompt=prompt, positions=positions)
            side.trace(row, probe, positions)
        if side.can_be_fed:
            _walk_fed(side, recording, index, recorded, positions, found)
        progress(done, len(rows), recorded.name)
    return found


def _walk_fed(side: Side, recording: Recording, index: int, row: Row, positions: np.ndarray, found: Walked) -> None:
    if recording.stream(index, MERGER) is None and pixel_rows(row) is not None:
        return  # there are no embeddings to stitch in
    probe = Comparing(recording, index, found.own, feed=True, prompt=max(row.answer_start, 1), positions=positions)
    merged = recording.stream(index, MERGER)
    side.trace_fed(row, probe, positions, None if merged is None else np.asarray(merged))


def _same_shape(row: Row, recorded: Row, found: Walked) -> bool:
    """Whether both sides prepared a row alike but for the pixels' values; what differs is told as preprocess's."""
    tally = found.error.setdefault(PREPROCESS, DistanceTally())
    count = min(len(row.input_ids), len(recorded.input_ids))
    apart = np.flatnonzero(row.input_ids[:count] != recorded.input_ids[:count])
    grids = all(
        np.array_equal(one, other) if one is not None and other is not None else one is other
        for one, other in (
            (row.image_grid_thw, recorded.image_grid_thw),
            (row.video_grid_thw, recorded.video_grid_thw),
        )
    )
    if len(apart) or len(row.input_ids) != len(recorded.input_ids) or not grids:
        tally.differ(recorded.name, int(apart[0]) if len(apart) else count)
        return False
    return True


def walked_row(row: Row) -> Row:
    """A row with the start of its answer, or the end of its prompt, to be decoded token by token."""
    if row.answer_start < len(row.input_ids):
        return replace(row, input_ids=row.input_ids[: row.answer_start + DECODED])
    return replace(row, answer_start=max(1, len(row.input_ids) - DECODED))


def walked_positions(row: Row, side: Side) -> np.ndarray:
    """Positions of a walked row whose logits are compared."""
    return scored(row, side.config).positions


def floor(side: Side, recording: Recording, progress: Progress = no_progress) -> dict[str, dict[str, Any]]:
    """How far rounding to BF16 moves every stage of the reference: {stage: {error, own}}; empty where unknown."""
    rounded = side.floor()
    if rounded is None:
        return {}
    found = walk(rounded, recording, None, progress)
    rounded.close()
    return {
        stage: {"error": to_dict(found.error.get(stage)), "own": to_dict(found.own.get(stage))}
        for stage in recording.widths
    }


def stage_records(found: Walked, recording: Recording) -> list[dict[str, Any]]:
    """A record for every stage that was compared, in the model's order, not yet judged."""
    compared = [s for s in recording.widths if to_dict(found.error.get(s)) or to_dict(found.own.get(s))]
    return [_record(stage, found, recording.noise.get(stage, {})) for stage in compared]


def _record(stage: str, found: Walked, noise: Mapping[str, Any]) -> dict[str, Any]:
    error, own = found.error.get(stage), found.own.get(stage)
    worst = error.worst if error is not None and error.worst is not None else own.worst if own is not None else None
    return {
        "stage": stage,
        "error": to_dict(error),
        "own": to_dict(own),
        "noise": noise.get("error"),
        "own_noise": noise.get("own"),
        "values": max(tally.values for tally in (error, own) if tally is not None),
        "worst": worst.to_dict() if worst else None,
    }


def to_dict(tally: DistanceTally | None) -> dict[str, Any] | None:
    """A tally's distance as plain data."""
    distance: Distance | None = tally.distance() if tally is not None else None
    return distance.to_dict() if distance is not None else None


def rows_to_walk(media: Sequence[Sequence[str]], wanted: int) -> list[int]:
    """At most `wanted` indices of rows, evenly spaced: of those that show something, if any do."""
    rows = [index for index, shown in enumerate(media) if shown] or list(range(len(media)))
    return rows if wanted >= len(rows) else [rows[i * len(rows) // wanted] for i in range(wanted)]

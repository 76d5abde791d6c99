"""The full-precision model walked through stage by stage, over all rows at once; each stage is solved as it is passed.

What a stage gives for every row lies in one file, which the next stage reads: memory holds one stage's weights and
one row. Rows for calibration come first, and only they are looked at; rows for evaluation go along, so that the
full-precision model's own answers to them are known at the end.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..bundle import Progress
from ..export.checkpoint import Checkpoint
from ..export.draft import EMBEDDING_NAME
from ..precision import float_format
from ..precision.codes import floats
from ..precision.plan import FLOAT, Plan, Precision
from .dataset import Dataset
from .folds import folds
from .head import Head
from .itinerary import Itinerary, Segment, pixels
from .journal import Journal
from .recipe import Methods
from .solve import Group, solve, wants_gram
from .stages import BLOCK, KEYS, LAYER, MERGER, STEM, VALUES, Kind, Stage
from .statistics import Statistics

REFERENCE = "reference.npy"  # the full-precision model's logits at the scored positions


@dataclass(frozen=True, slots=True)
class Item:
    """What a stage is run on: inputs, the rows of its output in the stream, whether it is looked at."""

    inputs: Mapping[str, np.ndarray]
    rows: slice
    calibrating: bool


class Walk:
    """One pass through the model of `checkpoint` under `plan`; `run` it, then read the journal."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        methods: Methods,
        datasets: Sequence[tuple[Dataset, bool]],
        journal: Journal,
        progress: Progress,
        *,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        self.checkpoint, self.plan, self.methods, self.journal = checkpoint, plan, methods, journal
        self.datasets, self.progress, self.seed, self.threads = datasets, progress, seed, threads
        self.config = checkpoint.config
        self.itinerary = Itinerary.of(datasets, checkpoint.config)
        self._angles: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._stages: dict[str, Stage] = {}
        self._passed = 0

    def run(self) -> None:
        """Pass all stages that the journal has not finished."""
        for label, action in self._steps():
            if not self.journal.finished(label):
                self._report(label, 0)
                action()
            self._passed += self._nbytes(label)
            self._report(label, 0)

    def _steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Every stage's label and what passes it, in the model's order."""
        vision, text = self.config.vision, self.config.text
        if self.itinerary.segments:
            yield "visual.stem", self._stem
            for i in range(vision.depth):
                yield self._step(BLOCK, i, self._block_items, self.itinerary.patches, vision.hidden_size)
            yield self._step(MERGER, 0, self._merger_items, self.itinerary.image_tokens, vision.text_hidden_size)
        yield "embeddings", self._stitch
        for i in range(text.num_hidden_layers):
            yield self._step(LAYER, i, self._layer_items, self.itinerary.tokens, text.hidden_size)
        yield "lm_head", self._head

    def _step(
        self, kind: Kind, index: int, items: Callable[[np.ndarray], Iterator[Item]], rows: int, width: int
    ) -> tuple[str, Callable[[], None]]:
        label = kind.label(index)
        return label, lambda: self._pass(label, kind, index, items, rows, width)

    def _pass(
        self,
        label: str,
        kind: Kind,
        index: int,
        items: Callable[[np.ndarray], Iterator[Item]],
        rows: int,
        width: int,
    ) -> None:
        """Pass one stage: its output for every item, and what was seen on the way solved."""
        stage = self._stage(kind)
        group = self._group(stage, index)
        stage.load(group.weights)
        before, stream = self.journal.stream(), self.journal.new_stream(label, rows, width)
        for item in items(before):
            outputs = stage.run(item.inputs, bool(group.statistics))
            stream[item.rows] = outputs[kind.outputs[0]][0]
            if item.calibrating:
                _watch(group, outputs, kind, index)
            self._report(label, item.rows.stop / rows / 2)
        self._finish(label, stage, index, group, stream)

    # The tower.

    def _stem(self) -> None:
        stage, label = self._stage(STEM), "visual.stem"
        group = self._group(stage, 0)
        stage.load(group.weights)
        stream = self.journal.new_stream(label, self.itinerary.patches, self.config.vision.hidden_size)
        segments = iter(self.itinerary.segments)
        for dataset, _ in self.datasets:
            for row in dataset:
                for values in pixels(row):
                    segment = next(segments)
                    outputs = stage.run(self._pixel_inputs(segment, values), bool(group.statistics))
                    stream[segment.rows] = outputs["x"][0]
                    if segment.calibrating:
                        _watch(group, outputs, STEM, 0)
        self._finish(label, stage, 0, group, stream)

    def _pixel_inputs(self, segment: Segment, values: np.ndarray) -> dict[str, np.ndarray]:
        positions = segment.positions(self.config.vision.spatial_merge_size)
        return {"pixel_values": values[None].astype(np.float32, copy=False), "patch_positions": positions}

    def _rotary(self, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of a segment's patches, which the stem makes: once for each size."""
        if segment.size not in self._angles:
            stage = self._stage(STEM)
            if not stage.loaded:
                stage.load(self._weights(stage, 0))
            blank = np.zeros((segment.patches, self.config.vision.patch_dim), np.float32)
            outputs = stage.run(self._pixel_inputs(segment, blank), taps=False)
            self._angles[segment.size] = outputs["cos"], outputs["sin"]
        return self._angles[segment.size]

    def _block_items(self, stream: np.ndarray) -> Iterator[Item]:
        for segment in self.itinerary.segments:
            cos, sin = self._rotary(segment)
            yield Item({"x": stream[segment.rows][None], "cos": cos, "sin": sin}, segment.rows, segment.calibrating)

    def _merger_items(self, stream: np.ndarray) -> Iterator[Item]:
        for segment in self.itinerary.segments:
            yield Item({"x": stream[segment.rows][None]}, segment.tokens, segment.calibrating)

    # The decoder.

    def _stitch(self) -> None:
        """Embeddings of every row's tokens, image embeddings in their places."""
        images = self.journal.stream() if self.itinerary.segments else None
        stream = self._new_embeddings("embeddings")
        self._fill_embeddings(self._embeddings(), images, stream)
        self.journal.finish("embeddings", {}, {}, stream)

    def _new_embeddings(self, name: str) -> np.memmap:
        return self.journal.new_stream(name, self.itinerary.tokens, self.config.text.hidden_size)

    def _fill_embeddings(self, table: Mapping[int, np.ndarray], images: np.ndarray | None, stream: np.ndarray) -> None:
        """Every row's tokens, from the table and from what the merger gave."""
        for prompt in self.itinerary.prompts:
            rows = np.stack([table[i] for i in prompt.ids.tolist()])
            if images is not None:
                rows[prompt.media_places] = images[prompt.media]
            stream[prompt.rows] = rows

    def _embeddings(self) -> dict[int, np.ndarray]:
        """Rows of the embedding table that occur, from one pass over it."""
        wanted = np.unique(np.concatenate([prompt.ids for prompt in self.itinerary.prompts]))
        found, start, step = {}, 0, 4096
        for block in self.checkpoint.read_rows(EMBEDDING_NAME, step):
            for i in wanted[(wanted >= start) & (wanted < start + len(block))].tolist():
                found[i] = floats(block[i - start])
            start += len(block)
        return found

    def _layer_items(self, stream: np.ndarray) -> Iterator[Item]:
        text = self.config.text
        for prompt in self.itinerary.prompts:
            tokens = len(prompt.ids)
            cache = np.zeros((1, text.num_key_value_heads, tokens, text.head_dim), np.float32)
            inputs = {
                "x": stream[prompt.rows][None],
                "position_ids": np.arange(tokens)[None],
                "write_indices": np.zeros(1, np.int64),
                "valid_length": np.array([tokens]),
                "past_key": cache,
                "past_value": cache.copy(),
            }
            yield Item(inputs, prompt.rows, prompt.calibrating)

    def _head(self) -> None:
        """Solve the head, and keep the full-precision logits of the rows for evaluation."""
        stream, prompts = self.journal.stream(), self.itinerary.prompts
        head = Head(self.checkpoint, self.plan, self.methods, self._seed("lm_head"))
        if head.precision is not FLOAT:
            head.watch([stream[p.rows] for p in prompts if p.calibrating])
        values, notes = head.solve()
        evaluated = [stream[p.rows][p.scored.positions] for p in prompts if not p.calibrating]
        if evaluated:
            rows = np.concatenate(evaluated)
            shape = (len(rows), self.config.text.vocab_size)
            logits = self.journal.new_array(REFERENCE, shape)
            head.exact_logits(rows, logits)
            logits.flush()
        self.journal.finish("lm_head", values, notes)

    # What all stages have in common.

    def _stage(self, kind: Kind) -> Stage:
        """The session of a kind of stage, made when first asked for."""
        if kind.name not in self._stages:
            self._stages[kind.name] = Stage(kind, self.config, self.threads)
        return self._stages[kind.name]

    def _group(self, stage: Stage, index: int) -> Group:
        kind = stage.kind
        precisions = {
            path: self.plan.precision(kind.graph, kind.place(path, index), linear.inputs)
            for path, linear in stage.linears.items()
        }
        rows, seen = self.itinerary.calibrating_rows(kind), {}
        for tap, paths in stage.taps.items():
            own = [precisions[path] for path in paths]
            if self._looks_at(tap, own):
                seed, gram = self._seed(kind.place(tap, index)), self._wants_gram(own)
                seen[tap] = Statistics(stage.channels(tap), rows, self.methods.samples, seed, gram)
        named = partial(kind.place, index=index)
        return Group(self._weights(stage, index), precisions, stage.taps, folds(kind, self.config), seen, named)

    def _looks_at(self, tap: str, precisions: Sequence[Precision]) -> bool:
        if tap in (KEYS, VALUES):
            return self.plan.kv_cache != "float"
        return any(precision is not FLOAT for precision in precisions)

    def _wants_gram(self, precisions: Sequence[Precision]) -> bool:
        return wants_gram(precisions, self.methods)

    def _weights(self, stage: Stage, index: int) -> dict[str, np.ndarray]:
        """The stage's parameters in float32, as its graph stores them."""
        weights = {}
        for name, parameter in stage.parameters.items():
            values = self.checkpoint.read(stage.kind.place(name, index))
            if parameter.transposed:
                values = values.reshape(len(values), -1).T
            weights[name] = floats(values)
        return weights

    def _seed(self, place: str) -> int:
        return zlib.crc32(f"{self.seed} {place}".encode())

    def _finish(self, label: str, stage: Stage, index: int, group: Group, stream: np.memmap) -> None:
        int8_cache = stage.kind is LAYER and self.plan.kv_cache == "int8"
        solved = solve(group, self.methods, float_format(self.plan.dtype), int8_cache)
        place = stage.kind.place
        values = {place(name, index): array for name, array in solved.values.items()}
        self.journal.finish(label, values, {place(path, index): note for path, note in solved.notes.items()}, stream)

    def _nbytes(self, label: str) -> int:
        """Bytes of a stage's tensors in the checkpoint, by which progress is counted."""
        return sum(t.size for name, t in self.checkpoint.tensors.items() if _label(name) == label)

    def _report(self, label: str, share: float) -> None:
        total = sum(tensor.size for tensor in self.checkpoint.tensors.values())
        self.progress(self._passed + int(share * self._nbytes(label)), total, label)


def _label(name: str) -> str:
    """The stage that a tensor belongs to."""
    parts = name.split(".")
    if parts[0] == "visual":
        return (
            ".".join(parts[:3]) if parts[1] == "blocks" else "visual.merger" if parts[1] == "merger" else "visual.stem"
        )
    if parts[:2] == ["model", "layers"]:
        return ".".join(parts[:3])
    return "embeddings" if name == EMBEDDING_NAME else "lm_head"


def _watch(group: Group, outputs: Mapping[str, np.ndarray], kind: Kind, index: int) -> None:
    for tap, seen in group.statistics.items():
        values = outputs[tap]
        if tap in (KEYS, VALUES):  # heads first: [1, heads, tokens, head_dim]
            values = values.transpose(0, 2, 1, 3)
        seen.update(values, kind.place(tap, index))

"""How much each group of modules costs in each precision: what the next-token distribution loses when it alone has it.

One pass through the model carries a variant for every group and precision along: up to its group it is the
full-precision model, there it is quantised as it would be in the end, and from there on full precision again. Each
stage's weights are read once for all of them. The divergence is over rows that are not calibrated on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..errors import OneVisionError
from ..export.checkpoint import Checkpoint
from ..export.draft import Draft
from ..precision import FloatFormat, float_format
from ..precision.formats import FORMATS
from ..precision.plan import Plan, Precision, Rule
from .allocation import Choice
from .head import Head
from .itinerary import Prompt
from .quality import divergence
from .solve import Group, solve
from .stages import BLOCK, KEYS, LAYER, MERGER, STEM, VALUES, Kind, Stage
from .walk import Item, Walk

FLOATING = "float"
_DEPTHS = 12  # parts that a deep decoder or tower is cut into; each is measured as one
_CHOICES = "choices"


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """Modules that get one precision: globs over their paths, in one graph."""

    name: str
    graph: str
    modules: tuple[str, ...]

    def holds(self, path: str) -> bool:
        """Whether a module belongs to it."""
        return any(fnmatchcase(path, pattern) for pattern in self.modules)

    def rules(self, precision: str, reason: str) -> list[Rule]:
        """The rules that give it a precision."""
        return [Rule(self.graph, pattern, precision, reason) for pattern in self.modules]


def module_groups(config: ModelConfig) -> list[ModuleGroup]:
    """Attention and MLP of every layer, blocks of the tower, merger and head; neighbours together in a deep model."""
    groups = [
        ModuleGroup(_range("visual.blocks", part), "vision", tuple(f"visual.blocks.{i}.*" for i in part))
        for part in _parts(config.vision.depth, _DEPTHS // 2)
    ]
    groups.append(ModuleGroup("visual.merger", "vision", ("visual.merger.*",)))
    for part in _parts(config.text.num_hidden_layers, _DEPTHS):
        for kind in ("self_attn", "mlp"):
            patterns = tuple(f"model.layers.{i}.{kind}.*" for i in part)
            groups.append(ModuleGroup(f"{_range('model.layers', part)}.{kind}", "decoder", patterns))
    return [*groups, ModuleGroup("lm_head", "decoder", ("lm_head",))]


def _parts(count: int, most: int) -> list[range]:
    """`count` numbers in at most so many runs of nearly one length."""
    edges = np.linspace(0, count, min(count, most) + 1).round().astype(int).tolist()
    return [range(a, b) for a, b in pairwise(edges)]


def _range(prefix: str, part: range) -> str:
    return f"{prefix}.{part[0]}" if len(part) == 1 else f"{prefix}.{part[0]}-{part[-1]}"


def with_precision(plan: Plan, group: ModuleGroup, precision: str, reason: str = "searched") -> Plan:
    """The plan with a group in a precision."""
    return plan.with_rules(group.rules(precision, reason))


def group_bytes(draft: Draft, groups: Sequence[ModuleGroup], precisions: Sequence[str]) -> dict[tuple[str, str], int]:
    """Bytes of the matrices of each group in each precision, scales with them: {(group, precision): bytes}.

    draft: in full precision. A precision whose blocks do not divide a group's inputs is left out.
    """
    found: dict[tuple[str, str], int] = {}
    for precision in precisions:
        plan = replace(draft.plan, rules=(Rule("*", "*", precision),))
        for group in groups:
            matrices = [m for m in draft.matrices(group.graph) if group.holds(m[0])]
            with suppress(OneVisionError):
                found[group.name, precision] = sum(
                    _nbytes(plan.precision(group.graph, path, shape[0]), shape, draft.fmt) for path, shape in matrices
                )
    return found


def _nbytes(precision: Precision, shape: tuple[int, int], fmt: FloatFormat) -> int:
    if precision.format is None:
        return shape[0] * shape[1] * fmt.itemsize
    return FORMATS[precision.format].nbytes(shape, fmt)


@dataclass
class Variant:
    """The model with one group in one precision. stream: its activations after the last stage, once it differs."""

    group: ModuleGroup
    precision: str
    stream: np.ndarray | None = None


class Sensing(Walk):
    """A walk that carries variants along; `choices` has what it found."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, *arguments: Any, **options: Any) -> None:
        super().__init__(checkpoint, plan, *arguments, **options)
        self.variants: list[Variant] = []
        self._sessions: dict[tuple[Any, ...], Stage] = {}

    def measure(self, bytes_of: Mapping[tuple[str, str], int], groups: Sequence[ModuleGroup]) -> list[Choice]:
        """The divergence of every group in every precision that has a size. The floats' own is zero."""
        by_name = {group.name: group for group in groups}
        wanted = [(by_name[name], precision) for name, precision in bytes_of if precision != FLOATING]
        self.variants = [Variant(group, precision) for group, precision in wanted]
        self.run()
        measured = {(name, precision): found for name, precision, found in self.journal.notes[_CHOICES]}
        return [
            Choice(name, precision, count, measured.get((name, precision), 0.0))
            for (name, precision), count in bytes_of.items()
        ]

    def _looks_at(self, tap: str, precisions: Sequence[Precision]) -> bool:
        return tap not in (KEYS, VALUES) and any(v.precision != FLOATING for v in self.variants)

    def _wants_gram(self, precisions: Sequence[Precision]) -> bool:
        return self.methods.gptq or self.methods.clip

    def _finish(self, label: str, stage: Stage, index: int, group: Group, stream: np.memmap) -> None:
        for number, variant in enumerate(self.variants):
            changed = self._changed(variant, stage, index)
            if variant.stream is None and not changed:
                continue
            before = self.journal.stream() if variant.stream is None else variant.stream
            session, weights = (stage, None) if not changed else self._quantized(variant, changed, stage, group)
            after = self.journal.new_stream(f"{label}.variant-{number}", *stream.shape)
            self._carry(session, weights, stage.kind, before, after)
            self._replace(variant, after)
        self.journal.finish(label, {}, {}, stream)

    def _changed(self, variant: Variant, stage: Stage, index: int) -> dict[str, Precision]:
        """The stage's modules that the variant has in another precision."""
        if stage.kind is STEM:
            return {}
        plan = replace(self.plan, rules=(Rule("*", "*", variant.precision),))
        place, graph = stage.kind.place, stage.kind.graph
        held = {p: x for p, x in stage.linears.items() if variant.group.holds(place(p, index))}
        return {path: plan.precision(graph, place(path, index), linear.inputs) for path, linear in held.items()}

    def _quantized(
        self, variant: Variant, changed: Mapping[str, Precision], stage: Stage, group: Group
    ) -> tuple[Stage, dict[str, np.ndarray]]:
        """A session that rounds what the variant rounds, and the weights that its codes are worth."""
        own = replace(group, weights=dict(group.weights), precisions={**group.precisions, **changed})
        solved = solve(own, self.methods, float_format(self.plan.dtype), keep_worth=True)
        assert solved.worth is not None
        weights = {**own.weights, **{n: v for n, v in solved.values.items() if v.dtype == np.float32}, **solved.worth}
        rounding = {path: p for path, p in changed.items() if p.activation is not None}
        key = (stage.kind.name, *((path, p.name) for path, p in rounding.items()))
        if key not in self._sessions:
            self._sessions[key] = Stage(stage.kind, self.config, self.threads, rounding)
        return self._sessions[key], weights

    def _carry(
        self,
        session: Stage,
        weights: Mapping[str, np.ndarray] | None,
        kind: Kind,
        before: np.ndarray,
        after: np.ndarray,
    ) -> None:
        """Run the rows that are not calibrated on."""
        if weights is not None:
            session.load(weights)
        for item in self._items(kind)(before):
            if not item.calibrating:
                after[item.rows] = session.run(item.inputs, taps=False)[kind.outputs[0]][0]

    def _items(self, kind: Kind) -> Callable[[np.ndarray], Iterator[Item]]:
        return {BLOCK: self._block_items, MERGER: self._merger_items, LAYER: self._layer_items}[kind]

    def _replace(self, variant: Variant, stream: np.ndarray) -> None:
        if isinstance(variant.stream, np.memmap):
            Path(str(variant.stream.filename)).unlink()
        variant.stream = stream

    def _stitch(self) -> None:
        table = self._embeddings()
        for number, variant in enumerate(self.variants):
            if variant.stream is not None:
                after = self._new_embeddings(f"embeddings.variant-{number}")
                self._fill_embeddings(table, variant.stream, after)
                self._replace(variant, after)
        stream = self._new_embeddings("embeddings")
        self._fill_embeddings(table, self.journal.stream() if self.itinerary.segments else None, stream)
        self.journal.finish("embeddings", {}, {}, stream)

    def _head(self) -> None:
        prompts = [p for p in self.itinerary.prompts if not p.calibrating]
        base = self.journal.stream()
        head = Head(self.checkpoint, self.plan, self.methods, self._seed("lm_head"))
        wanted = head.logits(_scored(base, prompts))
        found = []
        for variant in self.variants:
            if variant.group.name == "lm_head":
                head = self._quantized_head(variant, base)
                logits = head.logits(_scored(base, prompts))
            else:
                assert variant.stream is not None
                logits = Head(self.checkpoint, self.plan, self.methods, 0).logits(_scored(variant.stream, prompts))
            found.append((variant.group.name, variant.precision, float(divergence(wanted, logits).mean())))
        self.journal.finish("lm_head", {}, {_CHOICES: found})

    def _quantized_head(self, variant: Variant, base: np.ndarray) -> Head:
        plan = with_precision(self.plan, variant.group, variant.precision)
        head = Head(self.checkpoint, plan, self.methods, self._seed("lm_head"))
        head.watch([base[p.rows] for p in self.itinerary.prompts if p.calibrating])
        head.solve()
        return head


def _scored(stream: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """The rows that logits are wanted of."""
    return np.concatenate([stream[p.rows][p.scored.positions] for p in prompts])

"""Precisions searched under a budget: sensitivities measured, a plan chosen, quantised, and the result held to it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..bundle import Bundle, Phases, no_phases
from ..errors import OneVisionError
from ..export.draft import COPIED, Draft
from ..precision.plan import Plan, default_plan
from .allocation import Allocation, Choice, frontier, smallest_divergence, smallest_size
from .data import Data, DataOptions, Source, is_large
from .dataset import hold_out
from .frontier import Mark, Point, allocation_rows, svg_plot, text_plot
from .journal import journal
from .quantize import Job, prepare
from .recipe import Methods
from .sensitivity import FLOATING, ModuleGroup, Sensing, group_bytes, module_groups

CANDIDATES = (FLOATING, "int8-weight", "int4")
FRONTIER_FILE = "frontier.svg"
_ATTEMPTS = 4
_HELD = {False: 48, True: 8}  # rows that sensitivities are measured on, of a small and of a large model


@dataclass(frozen=True, slots=True)
class Budget:
    """One limit. size: bytes of the bundle. kld: nats, measured on the rows for evaluation. decoder: bytes of the
    decoder's weights, which is what a limit on the latency of a decode step comes to."""

    size: int | None = None
    kld: float | None = None
    decoder: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.size, self.kld, self.decoder) if value is not None]
        if len(given) != 1 or not given[0] > 0:
            raise OneVisionError("a search needs one budget, and it must be positive: a size, a KLD or a latency")


@dataclass(frozen=True)
class Search:
    """What was measured and what was chosen. fixed: bytes that no choice changes."""

    choices: Sequence[Choice]
    allocation: Allocation
    fixed: int
    budget: Budget

    def table(self) -> tuple[list[list[str]], list[str]]:
        """Rows and header of the sensitivities and the choice."""
        return allocation_rows(self.choices, self.allocation)

    def plot(self, width: int = 72) -> str:
        """The frontier for a terminal."""
        return text_plot(self._points(), self._marks(), width=width, **self._limits())

    def svg(self) -> str:
        """The frontier as a picture."""
        return svg_plot(self._points(), self._marks(), "Divergence against size", **self._limits())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {
            "budget": {
                k: v
                for k, v in (("size", self.budget.size), ("kld", self.budget.kld), ("decoder", self.budget.decoder))
                if v
            },
            "predicted_kld": self.allocation.divergence,
            "chosen": dict(self.allocation.chosen),
            "choices": [[c.group, c.precision, c.bytes, c.divergence] for c in self.choices],
        }

    def _points(self) -> list[Point]:
        return [Point(a.bytes + self.fixed, a.divergence) for a in frontier(self.choices)]

    def _marks(self) -> list[Mark]:
        marks = [Mark("chosen", self.allocation.bytes + self.fixed, self.allocation.divergence, chosen=True)]
        groups = {choice.group for choice in self.choices}
        for precision in dict.fromkeys(choice.precision for choice in self.choices):
            own = [choice for choice in self.choices if choice.precision == precision]
            if len(own) == len(groups):
                marks.append(Mark(precision, sum(c.bytes for c in own) + self.fixed, sum(c.divergence for c in own)))
        return marks

    def _limits(self) -> dict[str, Any]:
        return {"budget_bytes": self.budget.size, "budget_divergence": self.budget.kld}


def search_and_quantize(
    source: Source,
    output: Source,
    budget: Budget,
    *,
    candidates: Sequence[str] = CANDIDATES,
    dtype: str = "fp16",
    kv_cache: str = "float",
    methods: Methods | None = None,
    data: DataOptions | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    phases: Phases = no_phases,
) -> tuple[Bundle, Search]:
    """Quantise a checkpoint under a budget, in the precisions of `candidates` that lose least.

    Each group of modules is measured in each precision, on rows held out of the calibration data. What that
    predicts is held to the budget by what comes out: a plan that misses it is searched again, tighter. Raises
    OneVisionError where nothing fits.
    """
    data = data or DataOptions()
    plan = default_plan(FLOATING, dtype, kv_cache=kv_cache)
    job = prepare(source, output, methods or Methods(), data, plan, max_length, overwrite, threads, phases)
    if budget.kld is not None and job.data.evaluation is None:
        raise OneVisionError("a KLD budget is held to what is measured: leave --no-evaluate out")
    draft = Draft.make(job.checkpoint, plan, max_length)
    groups = [g for g in module_groups(job.checkpoint.config) if budget.decoder is None or g.graph == "decoder"]
    bytes_of = group_bytes(draft, groups, list(dict.fromkeys((FLOATING, *candidates))))
    named = {**job.key(plan), "choices": [[*key, count] for key, count in bytes_of.items()]}
    with journal(job.target, named, "sensing") as book:
        book.restart_unless("lm_head")
        with phases("sensitivity", "B") as progress:
            walk = job.walk(Sensing, plan, book, _held(job), progress)
            choices = walk.measure(bytes_of, groups)
        return _within(job, plan, budget, groups, choices, _fixed(draft, groups, budget))


def _held(job: Job) -> Data:
    """Rows to calibrate on and rows to measure sensitivities on, both of the calibration data."""
    rows, held = hold_out(job.data.calibration, seed=job.seed)
    return Data(rows, held.sample(_HELD[is_large(job.checkpoint)], job.seed))


def _fixed(draft: Draft, groups: Sequence[ModuleGroup], budget: Budget) -> int:
    """Bytes of the bundle, or of the decoder's weights, that no choice changes."""
    chosen = sum(group_bytes(draft, groups, [FLOATING]).values())
    if budget.decoder is not None:
        _, parameters = draft.graphs["decoder"]
        return sum(weight.nbytes for weight in parameters.by_name.values()) - chosen
    published = (draft.source.directory / name for name in COPIED)
    return draft.nbytes - chosen + sum(path.stat().st_size for path in published if path.is_file())


def _within(
    job: Job, plan: Plan, budget: Budget, groups: Sequence[ModuleGroup], choices: Sequence[Choice], fixed: int
) -> tuple[Bundle, Search]:
    """Quantise by the best plan; where what comes out is over the budget, by a tighter one."""
    limit = float(budget.size or budget.decoder or budget.kld or 0)
    for _ in range(_ATTEMPTS):
        allocation = _allocate(choices, budget, limit, fixed)
        search = Search(choices, allocation, fixed, budget)
        chosen = _plan(plan, groups, allocation, choices)
        ready = replace(
            job, extra_files={FRONTIER_FILE: search.svg().encode()}, extra_record={"search": search.to_dict()}
        )
        bundle = ready.run(chosen)
        used, allowed = _used(bundle, budget)
        if used <= allowed:
            return bundle, search
        job = replace(job, overwrite=True)
        if budget.kld is None:
            fixed = math.ceil(used) - allocation.bytes  # the graphs' files and the manifest with it
        else:
            limit *= allowed / used / 1.1
    raise OneVisionError(
        f"{job.target}: after {_ATTEMPTS} searches the bundle still takes {used:.4g} of a budget of {allowed:.4g}; the "
        "last one was kept: allow more, or give more candidates"
    )


def _allocate(choices: Sequence[Choice], budget: Budget, limit: float, fixed: int) -> Allocation:
    if budget.kld is not None:
        return smallest_size(choices, limit)
    return smallest_divergence(choices, math.floor(limit) - fixed)


def _plan(plan: Plan, groups: Sequence[ModuleGroup], allocation: Allocation, choices: Sequence[Choice]) -> Plan:
    """The allocation as rules, each with what its group was measured to lose."""
    lost = {(choice.group, choice.precision): choice.divergence for choice in choices}
    rules = []
    for group in groups:
        precision = allocation.chosen[group.name]
        rules += group.rules(precision, f"alone it costs {lost[group.name, precision]:.2g} nats")
    return replace(plan.with_rules(rules), name="auto")


def _used(bundle: Bundle, budget: Budget) -> tuple[float, float]:
    """What a bundle takes of the budget's kind, and the budget."""
    manifest = bundle.manifest
    if budget.kld is not None:
        assert manifest.quality is not None
        return float(manifest.quality["kld"]), budget.kld
    if budget.decoder is not None:
        return float(sum(manifest.graphs["decoder"].weights.values())), float(budget.decoder)
    assert budget.size is not None
    return float(sum(spec.size for spec in manifest.files.values())), float(budget.size)

"""Parity: a reference recorded, candidates held against it, and the record of both that gates judge."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ...bundle import MANIFEST, Bundle, Phases, no_phases
from ...calibration.rows import Row
from ...calibration.scored import scored
from ...errors import OneVisionError
from ..machine import machine
from ..subject import names
from .answers import answer_rows, examples, metrics, paired_tests, score_record, token_record
from .data import open_data
from .gates import Gates
from .judging import FORMAT, FORMAT_VERSION, judge, judge_record
from .locate import failed_module
from .question import Questions
from .recording import RECORD, Recording, recorded_row, recording_directory, save_row
from .sides import BundleSide, Side, check_same_model
from .torch_reference import TorchReference
from .walk import floor, rows_to_walk, stage_records, walk, walk_reference


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared. samples: rows of the data, None for all; walked: those whose every stage is compared.

    max_tokens: of an answer. noise: whether to measure how far rounding to BF16 moves the reference's stages.
    """

    data: str | None = None
    samples: int | None = None
    walked: int = 3
    max_tokens: int = 64
    seed: int = 0
    noise: bool = True
    examples: int = 8


def record_reference(side: Side, plan: Plan, directory: Path, phases: Phases = no_phases) -> Recording:
    """Let a reference say all that candidates are compared with, into an empty directory. Raises OneVisionError."""
    data = open_data(plan.data, side.preparer, plan.seed, plan.samples)
    described = {"source": data.source, "rows": len(data), "seed": plan.seed, "samples": plan.samples}
    questions = [question.name for question in data.questions]
    recording = Recording(
        directory, side.subject.to_dict(), side.config.to_dict(), {**described, "names": questions}, plan.max_tokens
    )
    walked = set(rows_to_walk(data.media, plan.walked))
    with phases(f"{side.subject.name}: stages", "rows") as progress:
        for done, index in enumerate(sorted(walked), 1):
            walk_reference(side, recording, index, data[index])
            progress(done, len(walked), questions[index])
    _record_rows(side, recording, data, walked, phases)
    recording.sort_stages()
    if plan.noise:
        with phases(f"{side.subject.name} in BF16: stages", "rows") as progress:
            recording.noise = floor(side, recording, progress)
    recording.write()
    return recording


def _record_rows(side: Side, recording: Recording, data: Questions, walked: set[int], phases: Phases) -> None:
    """Logits and answers of every row."""
    with phases(f"{side.subject.name}: answers", "rows") as progress:
        for index in range(len(data)):
            row = data[index]
            places = scored(row, side.config)
            generated = side.generate(row, recording.max_tokens)
            save_row(
                recording,
                index,
                row.input_ids,
                side.logits(row, places.positions),
                _answer_logits(side, row, generated),
            )
            recording.rows.append(recorded_row(row, places, generated, index in walked))
            progress(index + 1, len(data), row.name)


def _answer_logits(side: Side, row: Row, generated: list[int]) -> np.ndarray:
    """Logits where the tokens of an answer were chosen, and behind them: float32 [tokens + 1, vocab]."""
    prompt = row.input_ids[: row.answer_start]
    whole = replace(row, input_ids=np.concatenate([prompt, np.array(generated, np.int64)]))
    return side.logits(whole, np.arange(len(prompt) - 1, len(whole.input_ids)))


def compare(
    side: Side,
    recording: Recording,
    plan: Plan,
    gates: Gates,
    phases: Phases = no_phases,
    reference: Side | None = None,
) -> dict[str, Any]:
    """Hold one side against a recording: a candidate's part of the record, judged. Raises OneVisionError.

    reference: the side that was recorded, where it is at hand, to look for the module of a stage that fails.
    """
    data = _same_data(side, recording, plan)
    with phases(f"{side.subject.name}: stages", "rows") as progress:
        stages = stage_records(walk(side, recording, data, progress), recording)
    with phases(f"{side.subject.name}: answers", "rows") as progress:
        rows = answer_rows(side, recording, data, progress)
    others = sum(row.distribution is None for row in rows)
    subject = side.subject
    if others:
        note = (
            f"{others} of {len(rows)} rows were prepared otherwise than the reference's; distributions leave them out"
        )
        subject = replace(subject, notes=(*subject.notes, note))
    tokens = token_record(rows)
    candidate = {
        "subject": subject.to_dict(),
        "stages": [*stages, _tokens_stage(tokens)],
        "tokens": tokens,
        "metrics": metrics(rows, plan.seed),
        "paired": paired_tests(rows, gates.of(subject.precision).worse_by, plan.seed),
        "examples": examples(rows, plan.examples),
        "scores": [score_record(row) for row in rows],
        "failed_module": None,
    }
    judged = judge(candidate, gates, subject.precision)
    if reference is not None and judged["first_failed_stage"]:
        judged["failed_module"] = failed_module(reference, side, recording, judged, gates)
    return judged


def _tokens_stage(tokens: dict[str, Any]) -> dict[str, Any]:
    nothing = dict.fromkeys(("error", "own", "noise", "own_noise", "worst"))
    return {"stage": "tokens", **nothing, "values": tokens["rows"]}


def _same_data(side: Side, recording: Recording, plan: Plan) -> Questions:
    """The rows that were recorded, as this side prepares them."""
    check_same_model(recording.config, side.config, (recording.subject["name"], side.subject.name))
    told = recording.data
    data = open_data(plan.data, side.preparer, told["seed"], told["samples"])
    if [question.name for question in data.questions] != told["names"]:
        raise OneVisionError(
            f"{data.source}: its rows are not those of the reference ({told['rows']} of {told['source']}); give the "
            "--data and --samples that it was recorded with"
        )
    return data


def parity_record(
    recording: Recording, candidates: Sequence[dict[str, Any]], plan: Plan, gates: Gates
) -> dict[str, Any]:
    """The record of a comparison."""
    data = {key: recording.data[key] for key in ("source", "rows", "seed", "samples")}
    walked = [row.name for row in recording.rows if row.walked]
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": plan.seed,
        "machine": machine(),
        "data": {**data, "walked": walked},
        "reference": recording.subject,
        "candidates": list(candidates),
    }
    return judge_record(record, gates)


@dataclass(frozen=True, slots=True)
class Running:
    """How both sides run. engines, threads, exact: of bundles, as `load` takes them; memory: see BundleSide.

    runtime: onnx or transformers, of a checkpoint as the reference; trust_remote_code: of its own modeling code.
    work: where a checkpoint's graphs go meanwhile; None: the system's directory for such.
    """

    engines: str | bool | None = None
    threads: int | None = None
    exact: bool = False
    memory: int | None = None
    runtime: str = "onnx"
    trust_remote_code: bool = False
    work: Path | None = None


def compare_all(
    bundles: Sequence[Path],
    reference: str,
    plan: Plan,
    gates: Gates,
    running: Running,
    *,
    keep: Path | None = None,
    overwrite: bool = False,
    phases: Phases = no_phases,
) -> dict[str, Any]:
    """Hold bundles against a reference: a checkpoint, a bundle, or a recording. Returns the parity record.

    keep: where the recording is to stay. Raises OneVisionError.
    """
    opened = list(zip(bundles, names([path.resolve() for path in bundles]), strict=True))

    def against(recording: Recording, side: Side | None) -> dict[str, Any]:
        candidates = [_candidate(*one, recording, plan, gates, running, side, phases) for one in opened]
        return parity_record(recording, candidates, plan, gates)

    if (Path(reference) / RECORD).is_file():
        if keep is not None:
            raise OneVisionError(f"{reference} is a stored reference already; there is nothing to record")
        return against(Recording.open(reference), None)
    with open_reference(reference, running, phases) as side, recording_directory(keep, overwrite) as directory:
        return against(record_reference(side, plan, directory, phases), side)


def _candidate(
    path: Path,
    name: str,
    recording: Recording,
    plan: Plan,
    gates: Gates,
    running: Running,
    reference: Side | None,
    phases: Phases,
) -> dict[str, Any]:
    settings: dict[str, Any] = {key: getattr(running, key) for key in ("engines", "threads", "exact", "memory")}
    side = BundleSide(path, name=name, **settings)
    try:
        return compare(side, recording, plan, gates, phases, reference)
    finally:
        side.close()


@contextmanager
def open_reference(source: str, running: Running, phases: Phases = no_phases) -> Iterator[Side]:
    """A bundle, or a checkpoint as FP32 graphs or in PyTorch, to compare with. Raises OneVisionError."""
    if (Path(source) / MANIFEST).is_file():
        if running.runtime != "onnx":
            raise OneVisionError(f"{source} is a bundle, which ONNX Runtime runs; give transformers a checkpoint")
        side: Any = BundleSide(source, threads=running.threads, memory=running.memory, exact=True, engines=False)
        yield side
        side.close()
        return
    with TemporaryDirectory(prefix="onevision-edge-fp32-", dir=running.work, ignore_cleanup_errors=True) as folder:
        side = _fp32_side(source, Path(folder), running, phases)
        if running.runtime == "transformers":
            side = TorchReference(source, side, trust_remote_code=running.trust_remote_code, threads=running.threads)
        yield side
        side.close()


def _fp32_side(source: str, folder: Path, running: Running, phases: Phases) -> BundleSide:
    """The FP32 graphs of a checkpoint."""
    from ...export import export

    with phases(f"{source}: FP32 graphs", "B") as progress:
        export(source, folder / "fp32", dtype="fp32", progress=progress)
    name = f"{'shipped model' if source == 'demo' else Path(source).name}, FP32 graphs"
    settings: dict[str, Any] = {"threads": running.threads, "memory": running.memory}
    return BundleSide(folder / "fp32", engines=False, name=name, kind="checkpoint", **settings)


def shipped_reference(bundle: Path) -> str | None:
    """The shipped checkpoint's name where a bundle is of its shape: the reference if no other is named."""
    from ...export.checkpoint import Checkpoint

    return "demo" if Bundle.open(bundle).manifest.model == Checkpoint.open("demo").config else None

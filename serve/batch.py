"""Many questions answered offline: rows of a JSONL file or a folder, many at a time, each once."""

import hashlib
import json
import queue
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..bundle import Bundle, Progress, no_progress
from ..calibration.sources import Conversation, read_folder, read_jsonl
from ..errors import OneVisionError
from ..runtime.model import Generation, Model, load
from ..runtime.sampling import SamplingParams
from ..runtime.scheduler import ChatRequest, Event, Failed, Finished, Scheduler
from .answer_file import AnswerFile, Record

DEFAULT_PROMPT = "Describe this image."


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One question. key: of what was asked, of what, and how, so that an answer is never taken for another's."""

    id: str
    key: str
    messages: list[dict[str, Any]]
    expected: str | None


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How rows are answered. prompt: for the images of a folder. load: options of onevision_edge.load."""

    params: SamplingParams = field(default_factory=SamplingParams)
    min_pixels: int | None = None
    max_pixels: int | None = None
    prompt: str | None = None
    slots: int = 8
    load: Mapping[str, Any] = field(default_factory=dict)
    retry_errors: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where Ray runs. address: of a cluster, None for one on this machine; replicas: of the model; cpus: of each."""

    address: str | None = None
    replicas: int = 1
    cpus: float = 1
    gpus: float = 0


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What a run came to. found: rows that an earlier run had answered."""

    rows: int
    found: int
    answered: int
    failed: int


def run_batch(
    bundle: Path,
    data: Path,
    output: Path,
    options: BatchOptions,
    cluster: Cluster | None = None,
    progress: Progress = no_progress,
) -> BatchSummary:
    """Answer every row of `data` that has no answer in `output` yet, which ends in the order of the rows.

    Raises OneVisionError: for rows that are not sound, before the model is loaded; when interrupted or out of disk,
    with what was answered kept for the next run. A row that cannot be answered gets an "error" instead.
    """
    rows = read_rows(Bundle.open(bundle), data, options)
    with AnswerFile(output, options.overwrite) as answers:
        if options.retry_errors:
            answers.forget_errors()
        pending = [row for row in rows if row.key not in answers.records]
        _answer_all(_records(bundle, pending, options, cluster), len(rows), len(pending), answers, progress)
        answers.complete(row.key for row in rows)
        failed = sum("error" in answers.records[row.key] for row in rows)
        return BatchSummary(len(rows), len(rows) - len(pending), len(pending), failed)


def _answer_all(
    records: Generator[Record, None, None], total: int, pending: int, answers: AnswerFile, progress: Progress
) -> None:
    """Keep every record as it comes."""
    done = total - pending
    try:
        for record in records:
            answers.append(record)
            done += 1
            progress(done, total, record["id"])
    except KeyboardInterrupt:
        raise OneVisionError(
            f"interrupted: {done} of {total} answers are kept in {answers.partial.name}; the same command goes on"
        ) from None
    finally:
        records.close()


def read_rows(bundle: Bundle, data: Path, options: BatchOptions) -> list[BatchRow]:
    """The rows of a JSONL file or a folder of images. Raises OneVisionError naming the line or the file.

    A row's id is its "id" in the file, or FILE:LINE; an image's is the file's name.
    """
    if data.is_dir():
        found = [_asked(row, options.prompt or DEFAULT_PROMPT) for row in _images(data, bundle)]
        ids = [row.name for row in found]
    elif options.prompt is not None:
        raise OneVisionError(f"--prompt is for a folder of images; the rows of {data} have their own")
    else:
        found = read_jsonl(data)
        ids = _ids(data, found)
    if not found:
        raise OneVisionError(f"{data}: holds no rows")
    how = [asdict(options.params), options.min_pixels, options.max_pixels, bundle.manifest.to_dict()["files"]]
    salt = hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode())
    return [_row(row_id, row, salt.copy()) for row_id, row in zip(ids, found, strict=True)]


def answer_rows(rows: Sequence[BatchRow], model: Model, options: BatchOptions) -> Iterator[Record]:
    """Answers as they come, at most `slots` rows at a time in the running batch and as many on their way there."""
    scheduler = Scheduler(model, slots=options.slots, queue=2 * options.slots)
    scheduler.start()
    events: queue.Queue[tuple[BatchRow, Event]] = queue.Queue()
    waiting, flying = iter(rows), 0
    try:
        while True:
            for row in islice(waiting, 2 * options.slots - flying):
                _submit(scheduler, row, options, events)
                flying += 1
            if not flying:
                break
            row, event = events.get()
            if isinstance(event, Failed | Finished):
                flying -= 1
                yield record_of(row, event)
    finally:
        scheduler.stop()


def record_of(row: BatchRow, event: Finished | Failed) -> Record:
    """A line of the output. Raises OneVisionError for a fault that is not the row's own."""
    head = {"id": row.id, "key": row.key}
    if isinstance(event, Failed):
        if not isinstance(event.error, OneVisionError):
            raise OneVisionError(f"{row.id}: {type(event.error).__name__}: {event.error}") from event.error
        return {**head, "error": str(event.error)}
    expected = {} if row.expected is None else {"expected": row.expected}
    return {**head, **_answer(event.generation), **expected}


def _answer(answer: Generation) -> Record:
    usage = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.token_ids),
        "image_tokens": answer.image_tokens,
        "cached_tokens": answer.cached_tokens,
        "cached_image_tokens": answer.cached_image_tokens,
    }
    return {"text": answer.text, "finish_reason": answer.finish_reason, "usage": usage}


def _records(
    bundle: Path, rows: Sequence[BatchRow], options: BatchOptions, cluster: Cluster | None
) -> Generator[Record, None, None]:
    if not rows:
        return
    if cluster is not None:
        from .batch_ray import answer_on_ray

        yield from answer_on_ray(bundle, rows, options, cluster)
    else:
        yield from answer_rows(rows, load(bundle, **options.load), options)


def _submit(scheduler: Scheduler, row: BatchRow, options: BatchOptions, events: "queue.Queue[Any]") -> None:
    request = ChatRequest(row.messages, options.params, options.min_pixels, options.max_pixels)
    scheduler.submit(request, lambda event: events.put((row, event)))


def _images(folder: Path, bundle: Bundle) -> list[Conversation]:
    rows = read_folder(folder, bundle.manifest.model)
    found = [row for row in rows if isinstance(row, Conversation)]
    if len(found) < len(rows):
        raise OneVisionError(f"{folder}: holds .npz files, which are rows to calibrate on; give images or a JSONL file")
    return found


def _asked(row: Conversation, prompt: str) -> Conversation:
    """The row of a folder's image with another question."""
    image = [item for item in row.messages[0]["content"] if item["type"] == "image"]
    content = [*image, {"type": "text", "text": prompt}]
    return replace(row, messages=[{**row.messages[0], "content": content}])


def _ids(path: Path, rows: Sequence[Conversation]) -> list[str]:
    """What the rows are called: their "id", or their place in the file. Raises OneVisionError where two are equal."""
    with open(path, "rb") as file:
        lines = {f"{path.name}:{n}": line for n, line in enumerate(file, 1) if line.strip()}
    given = [json.loads(lines[row.name].decode("utf-8-sig")).get("id") for row in rows]
    ids = [row.name if name is None else str(name) for row, name in zip(rows, given, strict=True)]
    seen: dict[str, str] = {}
    for name, row in zip(ids, rows, strict=True):
        if name in seen:
            raise OneVisionError(f'{path}: {seen[name]} and {row.name} both have the id "{name}"')
        seen[name] = row.name
    return ids


def _row(row_id: str, row: Conversation, digest: Any) -> BatchRow:
    digest.update(json.dumps([row_id, row.messages], sort_keys=True).encode())
    return BatchRow(row_id, digest.hexdigest()[:32], row.messages, row.answer)

"""lmms-eval (0.7): results of a parity run in its JSON shape, and the registration of bundles as one of its models.

Where onevision-edge and lmms-eval are installed together, lmms-eval finds bundles through an entry point:

    python -m lmms_eval --model onevision_edge --model_args pretrained=BUNDLE,threads=4 \\
        --tasks ocrbench,mmmu_val --batch_size 1 --log_samples --output_path results

A folder of task files is named with --tasks FOLDER or --include_path FOLDER. --force_simple runs tasks of
log-likelihoods. The samples files are questions and stored answers of a parity report (lmms_samples.py). lmms-eval
0.7.3 needs filelock before version 4.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..record import write_json, write_text
from .metrics import METRICS
from .statistics import NORMAL_LIMIT

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL = "onevision_edge"
_FILTER = "none"  # the name lmms-eval gives to answers that no filter changed


def manifest() -> "ModelManifest":
    """What lmms-eval's entry point group lmms_eval.models loads."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = f"{__package__}.lmms_eval_model"
    return ModelManifest(MODEL, simple_class_path=f"{module}.SimpleBundle", chat_class_path=f"{module}.ChatBundle")


def lmms_eval_results(parity: Mapping[str, Any], candidate: int | None = 0) -> dict[str, Any]:
    """The results of one candidate, by its index, or of the reference (None), as lmms-eval's results file has them.

    Scores come with their standard error, a 95 % interval's width over 3.92; samples are under "samples".
    """
    task, side = _task(parity), _Side(parity, candidate)
    found = {name: interval for name, interval in side.metrics.items() if interval["value"] is not None}
    results: dict[str, Any] = {"alias": task}
    for name, interval in found.items():
        results[f"{name},{_FILTER}"] = interval["value"]
        results[f"{name}_stderr,{_FILTER}"] = _standard_error(interval)
    rows = len(side.scores)
    return {
        "results": {task: results},
        "group_subtasks": {task: []},
        "configs": {task: {"task": task, "dataset_path": parity["data"]["source"], "output_type": "generate_until"}},
        "versions": {task: parity["format_version"]},
        "n-shot": {task: 0},
        "higher_is_better": {task: {name: METRICS[name].higher_is_better for name in found if name in METRICS}},
        "n-samples": {task: {"original": parity["data"]["rows"], "effective": rows}},
        "samples": {task: side.samples()},
        "config": {"model": MODEL, "model_args": side.subject["name"], "random_seed": parity["seed"]},
        "date": parity["created"],
        "model_name": side.subject["name"],
    }


def write_lmms_eval(parity: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write results and samples of the reference and every candidate as lmms-eval lays them out; returns the files."""
    written = []
    date = re.sub(r"[^0-9]", "", parity["created"])[:14]
    for index in (None, *range(len(parity["candidates"]))):
        results = lmms_eval_results(parity, index)
        folder = directory / _slug(results["model_name"])
        for task, samples in results.pop("samples").items():
            lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
            written.append(folder / f"{date}_samples_{task}.jsonl")
            write_text(written[-1], "".join(lines))
        written.append(folder / f"{date}_results.json")
        write_json(written[-1], results)
    return written


class _Side:
    """The reference or a candidate of a record: its metrics, texts and scores."""

    def __init__(self, parity: Mapping[str, Any], candidate: int | None) -> None:
        chosen = parity["candidates"][candidate or 0]
        self.key = "reference" if candidate is None else "candidate"
        self.subject = parity["reference"] if candidate is None else chosen["subject"]
        self.scores = chosen["scores"]
        metrics = chosen["metrics"]
        if candidate is None:
            self.metrics = {n.removesuffix("_reference"): v for n, v in metrics.items() if n.endswith("_reference")}
        else:
            self.metrics = {n: v for n, v in metrics.items() if not n.endswith("_reference")}

    def samples(self) -> list[dict[str, Any]]:
        """A sample for each row, as lmms-eval's samples files have them."""
        return [self._sample(index, row) for index, row in enumerate(self.scores)]

    def _sample(self, index: int, row: Mapping[str, Any]) -> dict[str, Any]:
        identity = json.dumps([row["row"], row["expected"]], ensure_ascii=False)
        return {
            "doc_id": index,
            "target": row["expected"] or "",
            "filtered_resps": row[f"{self.key}_text"],
            "doc_hash": hashlib.sha256(identity.encode()).hexdigest(),
            "input": row.get("prompt") or row["row"],
            **row[self.key],
        }


def _task(parity: Mapping[str, Any]) -> str:
    return _slug(parity["data"]["source"])


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower() or "rows"


def _standard_error(interval: Mapping[str, Any]) -> float | str:
    """Of a 95 % interval; "N/A", as lmms-eval says, where there is none."""
    low, high = interval["low"], interval["high"]
    return "N/A" if low is None or high is None else (high - low) / (2 * NORMAL_LIMIT)

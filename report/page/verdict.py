"""The verdict of a report in a sentence, and what was compared, on what, from what: the lines that both pages share."""

from collections.abc import Mapping, Sequence
from typing import Any

from .numbers import AMBIGUOUS, FAIL, PASS, moment, nbytes, plural
from .tables import measured

Record = Mapping[str, Any]


def headline(parity: Record | None, latency: Record | None) -> str:
    """What the report found, in one sentence without the verdict's word."""
    candidates = (parity or {}).get("candidates") or ()
    if not candidates:
        return _timed(latency) if latency else "Nothing was compared"
    reference = measured(parity, "reference", "name") or "the reference"
    verdict = (parity or {}).get("verdict")
    names = [c["subject"]["name"] for c in candidates if verdict == PASS or c.get("verdict") == verdict]
    who = names[0] if len(candidates) == 1 and names else f"{len(names)} of {len(candidates)} candidates"
    one = len(names) == 1
    if verdict == FAIL:
        return f"{who} {'does' if one else 'do'} not match {reference}"
    if verdict == AMBIGUOUS:
        return f"{who} may not match {reference}: too close to tell"
    return f"{_all(names)} {'matches' if len(names) == 1 else 'match'} {reference}"


def _all(names: Sequence[str]) -> str:
    few = {1: names[0], 2: "Both candidates"} if names else {}
    return few.get(len(names), f"All {len(names)} candidates")


def _timed(latency: Record) -> str:
    names = [timed["subject"]["name"] for timed in latency.get("subjects") or ()]
    return f"Latency of {names[0] if len(names) == 1 else plural(len(names), 'subject')}"


def facts(parity: Record | None, latency: Record | None) -> list[tuple[str, str]]:
    """What a reader who did not run it has to know: a name and a line for each."""
    record = parity or latency or {}
    found = [("Made", moment(record.get("created"))), ("Machine", machine_line(record.get("machine")))]
    if parity and parity.get("reference"):
        found.append(("Reference", f"{parity['reference']['name']}: {subject_line(parity['reference'])}"))
    data = (parity or {}).get("data")
    if data:
        digest = f", sha256 {data['sha256']}" if data.get("sha256") else ""
        found.append(("Data", f"{data.get('source')}, {plural(data.get('rows') or 0, 'row')}{digest}"))
    if latency and latency.get("rounds") is not None:
        found.append(("Timing", f"{plural(latency['rounds'], 'round')} after {latency.get('warmup') or 0} to warm up"))
    packages = measured(record, "machine", "packages") or {}
    found += [("Packages", ", ".join(f"{name} {version}" for name, version in packages.items()))] if packages else []
    return [*found, *([("Seed", str(record["seed"]))] if record.get("seed") is not None else [])]


def machine_line(machine: Record | None) -> str:
    """A machine: processor, cores, memory, GPU, system, Python."""
    if not machine:
        return "not recorded"
    cores, memory, python = (machine.get(key) for key in ("cores", "memory", "python"))
    parts = [
        machine.get("cpu"),
        plural(cores, "core") if cores else None,
        f"{nbytes(memory)} of memory" if memory else None,
        machine.get("gpu") or "no GPU",
        machine.get("system"),
        f"Python {python}" if python else None,
    ]
    return ", ".join(part for part in parts if part)


def subject_line(subject: Record) -> str:
    """What a subject is: kind, precision and dtype, backend, size."""
    precision, dtype = subject.get("precision"), subject.get("dtype")
    what = f"{precision} in {dtype}" if dtype and precision and precision != dtype else precision or dtype
    backend = f"on {subject['backend']}" if subject.get("backend") else None
    size = nbytes(subject["bytes"]) if subject.get("bytes") else None
    return ", ".join(part for part in (subject.get("kind"), what, backend, size) if part)


def model_line(subject: Record) -> str:
    """The model's shape."""
    model = subject.get("model") or {}
    words = {"vision_depth": "vision blocks", "layers": "layers", "hidden_size": "wide", "vocab_size": "tokens"}
    return ", ".join(f"{model[key]} {word}" for key, word in words.items() if model.get(key) is not None)

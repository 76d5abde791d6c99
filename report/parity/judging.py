"""A parity record, judged: every stage and every metric against its gate. All on plain JSON, so that a stored record
can be judged again under other gates."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import OneVisionError
from .gates import Gates, PrecisionGates
from .metrics import METRICS
from .probe import PREPROCESS, TOKENS

PASS, AMBIGUOUS, FAIL = "PASS", "AMBIGUOUS", "FAIL"
FORMAT, FORMAT_VERSION = "onevision-edge parity", 1
_SEVERITY = {PASS: 0, AMBIGUOUS: 1, FAIL: 2}
_NOISE = {"error": "noise", "own": "own_noise"}

Finding = tuple[str, str]  # a verdict and one sentence why


def worst(verdicts: Iterator[str]) -> str:
    """The worst of verdicts, PASS where there are none."""
    return max(verdicts, key=_SEVERITY.__getitem__, default=PASS)


def judge_record(parity: Mapping[str, Any], gates: Gates) -> dict[str, Any]:
    """A parity record with every verdict as these gates give it. Raises OneVisionError for any other JSON."""
    if parity.get("format") != FORMAT or parity.get("format_version") != FORMAT_VERSION:
        given = f"{parity.get('format')!r}, version {parity.get('format_version')!r}"
        raise OneVisionError(f"its format is {given}; give the JSON of `onevision-edge parity`, version 1")
    try:
        candidates = [judge(candidate, gates) for candidate in parity["candidates"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise OneVisionError(f"it is not a parity record that this version writes: {error!r}") from error
    return {**parity, "candidates": candidates, "verdict": worst(c["verdict"] for c in candidates)}


def judge(candidate: Mapping[str, Any], gates: Gates, precision: str | None = None) -> dict[str, Any]:
    """A candidate of a record with its verdicts. precision: whose gates; the subject's own without one.

    A metric that is not in the record is not judged, unless the gates require it.
    """
    limits = gates.of(precision or candidate["subject"]["precision"])
    stages = [_judged_stage(stage, candidate["tokens"], limits) for stage in candidate["stages"]]
    first = next((stage["stage"] for stage in stages if stage["verdict"] == FAIL), None)
    module = candidate.get("failed_module")
    checks = list(_checks(candidate, limits))
    return {
        **candidate,
        "stages": stages,
        "first_failed_stage": first,
        "failed_module": module if module and module["stage"] == first else None,
        "gates": {"name": limits.name, "source": limits.source},
        "checks": checks,
        "verdict": worst(item["verdict"] for item in (*stages, *checks)),
    }


def _judged_stage(stage: Mapping[str, Any], tokens: Mapping[str, Any], limits: PrecisionGates) -> dict[str, Any]:
    if stage["stage"] == TOKENS:
        findings = [_tokens(tokens, limits)]
    else:
        findings = [_distance(stage, kind, limits) for kind in _NOISE if stage[kind] is not None]
    if not findings:
        findings = [(AMBIGUOUS, "it was not measured")]
    verdict, why = max(findings, key=lambda finding: _SEVERITY[finding[0]])
    return {**stage, "verdict": verdict, "why": why}


def _distance(stage: Mapping[str, Any], kind: str, limits: PrecisionGates) -> Finding:
    """The finding on what reaches a stage's output (error), or on what the stage itself adds (own)."""
    is_preprocess = stage["stage"] == PREPROCESS
    field = "max_abs" if is_preprocess else "relative_l2"
    limit = limits.preprocess if is_preprocess else limits.limit(kind, stage["stage"])
    what = ("its own " if kind == "own" else "") + ("largest difference" if is_preprocess else "relative L2")
    value, floor = stage[kind][field], (stage[_NOISE[kind]] or {}).get(field)
    if not all(_is_finite(stage[kind][name]) for name in ("max_abs", "relative_l2")):
        return FAIL, f"{what} is not a finite number"
    if limit is None:
        return PASS, f"{what} {value:.3g} has no limit"
    if value <= limit:
        return PASS, f"{what} {value:.3g} is within {limit:g}"
    beyond = f"{what} {value:.3g} is more than {limit:g}"
    if floor is None or not math.isfinite(floor):
        return FAIL, beyond
    if value <= limits.noise_factor * floor:
        return AMBIGUOUS, f"{beyond}, but within {limits.noise_factor:g} times that of BF16, {floor:.3g}"
    return FAIL, f"{beyond}, and than {limits.noise_factor:g} times that of BF16, {floor:.3g}"


def _tokens(tokens: Mapping[str, Any], limits: PrecisionGates) -> Finding:
    rows, divergent, ties = (tokens[key] for key in ("rows", "divergent_rows", "near_ties"))
    if not rows:
        return AMBIGUOUS, "no row was generated"
    told, limit = f"the tokens of {divergent} of {rows} rows differ", limits.divergent_rows
    if limit is None:
        return PASS, f"{told}, which has no limit"
    if divergent <= limit * rows:
        return PASS, f"{told}, within {limit:.3g} of them"
    beyond = f"{told}, more than {limit:.3g} of them"
    if divergent - ties <= limit * rows:
        return AMBIGUOUS, f"{beyond}, but {ties} of these are near ties"
    return FAIL, f"{beyond}, and {ties} of these are near ties"


def _checks(candidate: Mapping[str, Any], limits: PrecisionGates) -> Iterator[dict[str, Any]]:
    metrics = candidate["metrics"]
    paired = {one["metric"]: one for one in candidate["paired"]}
    for metric in limits.required:
        if metric not in metrics:
            yield _check(metric, None, None, FAIL, f"{metric} was not measured, and the gates require it")
    for metric, limit in limits.at_most.items():
        if metric in metrics:
            yield _bound(metric, metrics[metric]["value"], limit, "at most")
    for metric, limit in limits.at_least.items():
        if metric in metrics:
            yield _bound(metric, metrics[metric]["value"], limit, "at least")
    for metric, margin in limits.worse_by.items():
        if metric in paired:
            yield _worse_by(paired[metric], margin)


def _bound(metric: str, value: float | None, limit: float, kind: str) -> dict[str, Any]:
    if value is None or not math.isfinite(value):
        return _check(metric, limit, value, FAIL, f"{metric} is not a finite number")
    is_within = value <= limit if kind == "at most" else value >= limit
    if is_within:
        return _check(metric, limit, value, PASS, f"{metric} {value:.4g} is {kind} {limit:g}")
    than = "more" if kind == "at most" else "less"
    return _check(metric, limit, value, FAIL, f"{metric} {value:.4g} is {than} than {limit:g}")


def _worse_by(pair: Mapping[str, Any], margin: float) -> dict[str, Any]:
    """The finding on how much worse a score may be; the interval is of candidate - reference."""
    gate, ends = f"{pair['metric']}_drop", [pair[key] for key in ("difference", "low", "high")]
    if not all(map(_is_finite, ends)):
        return _check(gate, margin, None, FAIL, f"{pair['metric']} has a difference that is not a finite number")
    difference, low, high = ends
    direction = -1 if METRICS[pair["metric"]].higher_is_better else 1
    least, most = sorted((direction * low, direction * high))
    told = f"{pair['metric']} {difference:+.3g} ({low:+.3g} to {high:+.3g} on {pair['n']} rows)"
    if least > margin:
        return _check(gate, margin, difference, FAIL, f"{told} is more than {margin:g} worse")
    if most > margin and pair["worse"]:
        return _check(gate, margin, difference, AMBIGUOUS, f"{told} may be more than {margin:g} worse")
    return _check(gate, margin, difference, PASS, f"{told} is not more than {margin:g} worse")


def _check(gate: str, limit: float | None, value: float | None, verdict: str, line: str) -> dict[str, Any]:
    finite = value if _is_finite(value) else None
    return {"gate": gate, "limit": limit, "value": finite, "verdict": verdict, "line": line}


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)

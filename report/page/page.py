"""The report as one HTML document: offline, no script or asset from elsewhere, light or dark, any width.

Its policy lets through nothing but its own style and script, by their digests, and images in data URLs: what a record
holds cannot run even if it were not escaped.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...errors import OneVisionError
from . import latency_tables, numbers, tables
from .examples import questions
from .frontiers import frontiers
from .plots_icicle import icicle
from .plots_latency import STAGES, latency_bars
from .plots_stages import stage_plot, stage_scale
from .tables import Table, measured
from .verdict import facts, headline, model_line, subject_line

_FOLDER = Path(__file__).parent
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CandidateView:
    """What the page says of one candidate."""

    name: str
    verdict: str
    line: str
    gates: str
    sentences: tuple[str, ...]
    notes: tuple[str, ...]
    tables: tuple[Table, ...]
    plot: Markup
    stages: Table
    start: int  # the stage that the plot's numbers begin with: the first to fail


@dataclass(frozen=True, slots=True)
class ProfileView:
    """What the page says of one subject's profile."""

    name: str
    source: str
    time: str
    icicle: Markup
    tables: tuple[Table, ...]


def page(parity: Record | None, latency: Record | None) -> str:
    """One HTML document of a parity record, a latency record, or both.

    Raises OneVisionError where there is neither.
    """
    if parity is None and latency is None:
        raise OneVisionError("there is nothing to show: give a parity record, a latency record, or both")
    style, script = _source("page.css"), _source("page.js")
    policy = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
    policy += f"style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    view = {"policy": policy, "style": Markup(style), "script": Markup(script), "title": headline(parity, latency)}
    return _environment().get_template("page.html").render(**view, **_view(parity, latency))


def _source(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """A source of the policy: the text between the tags, hashed."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(SIGNS=numbers.SIGNS, STAGES=STAGES, plural=numbers.plural)
    environment.filters["verdict"] = numbers.verdict_text
    return environment


def _view(parity: Record | None, latency: Record | None) -> dict[str, Any]:
    cell, speeds = latency_tables.speeds(latency, parity)
    candidates = (parity or {}).get("candidates") or ()
    return {
        "verdict": measured(parity, "verdict") if candidates else None,
        "reasons": [(i, c["subject"]["name"], c["verdict"], tables.reasons(c)) for i, c in _not_passed(candidates)],
        "facts": facts(parity, latency),
        "verdicts": tables.verdicts(parity, speeds) if parity and candidates else None,
        "frontiers": frontiers(parity, speeds) if parity else [],
        "cell": cell,
        "candidates": _candidates(candidates),
        "questions": questions(parity or {}),
        "latency": _latency(latency),
        "profiles": _profiles(latency),
        "sides": _sides(parity, latency),
    }


def _not_passed(candidates: Sequence[Record]) -> list[tuple[int, Record]]:
    """Candidates with their places, the worst first."""
    found = [(i, c) for i, c in enumerate(candidates) if numbers.rank(c.get("verdict"))]
    return sorted(found, key=lambda pair: -numbers.rank(pair[1].get("verdict")))


def _candidates(candidates: Sequence[Record]) -> list[CandidateView]:
    scale = stage_scale(candidates)
    return [_candidate(candidate, stage_plot(candidate, scale)) for candidate in candidates]


def _candidate(candidate: Record, plot: str) -> CandidateView:
    gates, names = candidate.get("gates"), [stage["stage"] for stage in candidate.get("stages") or ()]
    first = candidate.get("first_failed_stage")
    shown = (tables.checks(candidate), tables.metrics_table(candidate), tables.paired(candidate))
    return CandidateView(
        name=candidate["subject"]["name"],
        verdict=candidate.get("verdict") or "",
        line=subject_line(candidate["subject"]),
        gates=f"Gates: {gates.get('name')}, {gates.get('source')}" if gates else "",
        sentences=tuple(tables.sentences(candidate)),
        notes=tuple(candidate["subject"].get("notes") or ()),
        tables=tuple(each for each in shown if each.rows),
        plot=Markup(plot),
        stages=tables.stages(candidate),
        start=names.index(first) if first in names else max(0, len(names) - 2),
    )


def _latency(latency: Record | None) -> dict[str, Any] | None:
    if latency is None:
        return None
    names = latency_tables.cell_names(latency)
    shown = [latency_tables.ratios(latency), latency_tables.starts(latency)]
    return {
        "cells": [
            (
                name,
                Markup(latency_bars(latency_tables.rows_of(latency, name), name)),
                latency_tables.cell_table(latency, name),
            )
            for name in names
        ],
        "tables": [table for table in shown if table.rows],
        "all": [latency_tables.all_metrics(latency, name) for name in names],
        "bandwidth": numbers.nbytes(latency.get("memory_bandwidth")) if latency.get("memory_bandwidth") else "",
    }


def _profiles(latency: Record | None) -> list[ProfileView]:
    timed = (latency or {}).get("subjects") or ()
    names = latency_tables.subject_names(latency or {})
    given = [(name, each["profile"]) for name, each in zip(names, timed, strict=True) if each.get("profile")]
    return [_profile(name, profile) for name, profile in given]


def _profile(name: str, profile: Record) -> ProfileView:
    tree, seconds = profile.get("tree"), profile.get("seconds")
    kinds = (("operations", "operation"), ("modules", "module"))
    shown = [latency_tables.longest(profile, kind, noun) for kind, noun in kinds]
    return ProfileView(
        name=name,
        source=profile.get("source") or "",
        time=numbers.milliseconds(seconds and 1e3 * seconds),
        icicle=Markup(icicle(tree, name) if tree else ""),
        tables=tuple(each for each in shown if each.rows),
    )


def _sides(parity: Record | None, latency: Record | None) -> list[tuple[str, str, str, Table]]:
    """Every subject of both records once: name, description, the digest of its weights, its files."""
    subjects = [parity.get("reference"), *(c["subject"] for c in parity.get("candidates") or ())] if parity else []
    subjects += [timed["subject"] for timed in (latency or {}).get("subjects") or ()]
    found = {(s["name"], s.get("backend")): s for s in reversed(subjects) if s}
    return [
        (s["name"], f"{subject_line(s)}; {model_line(s)}".rstrip("; "), s.get("weights_sha256") or "", tables.files(s))
        for s in reversed(found.values())
    ]

"""onevision-edge judge"""

from pathlib import Path
from typing import Any

import click

from .console import print_json, say, table


@click.command()
@click.argument("report", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--gates", "gates_file", type=click.Path(path_type=Path), help="A gates file in place of the shipped.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the judged report here.")
@click.option("--strict", is_flag=True, help="Fail on AMBIGUOUS, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the judged report.")
def judge(report: Path, gates_file: Path | None, output: Path | None, strict: bool, as_json: bool) -> None:
    """Judge a stored parity report again, under other gates.

    Exit code 1 where the verdict is FAIL; the lines that failed are printed last.
    """
    from ..errors import OneVisionError
    from ..report.parity.gates import load_gates
    from ..report.parity.judging import FAIL, PASS, judge_record
    from ..report.record import read_json, write_json

    gates = load_gates(gates_file)
    try:
        judged = judge_record(read_json(report), gates)
    except OneVisionError as problem:
        raise OneVisionError(f"{report}: {problem}") from problem.__cause__
    if output is not None:
        write_json(output, judged)
    if as_json:
        print_json(judged)
    else:
        click.echo("\n\n".join(candidate_text(candidate) for candidate in judged["candidates"]))
    if judged["verdict"] == FAIL or (strict and judged["verdict"] != PASS):
        for line in failed_lines(judged, strict):
            say(line)
        raise SystemExit(1)


def candidate_text(candidate: dict[str, Any]) -> str:
    """A candidate's verdict, then every stage that does not pass, then every gate on a metric."""
    from ..report.parity.judging import PASS

    subject, gates = candidate["subject"], candidate["gates"]
    stages = [(s["verdict"], f"{s['stage']}: {s['why']}") for s in candidate["stages"] if s["verdict"] != PASS]
    passed = len(candidate["stages"]) - len(stages)
    summary = [(PASS, f"{passed} of {len(candidate['stages'])} stages")] if passed else []
    checks = [(check["verdict"], check["line"]) for check in candidate["checks"]]
    head = f"{subject['name']} ({subject['precision']}), gates [{gates['name']}] of {gates['source']}"
    return f"{candidate['verdict']}  {head}\n{table([*summary, *stages, *checks])}".rstrip()


def failed_lines(parity: dict[str, Any], strict: bool = False) -> list[str]:
    """What made a judged record fail, a line each; strict: what is ambiguous, too."""
    from ..report.parity.judging import AMBIGUOUS, FAIL

    wrong = (FAIL, AMBIGUOUS) if strict else (FAIL,)
    lines = []
    for candidate in parity["candidates"]:
        name = candidate["subject"]["name"]
        found = [(s["verdict"], f"{s['stage']}: {s['why']}") for s in candidate["stages"]]
        found += [(check["verdict"], check["line"]) for check in candidate["checks"]]
        lines += [f"{verdict} {name}: {line}" for verdict, line in found if verdict in wrong]
    return lines

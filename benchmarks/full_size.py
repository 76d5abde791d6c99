"""A model of released size, end to end on this machine: random checkpoint, export or quantise, one image question.

    python benchmarks/full_size.py --shape 4b --dtype fp16 --work /some/disk
    python benchmarks/full_size.py --shape 4b --dtype fp32 --question --work /some/disk
    python benchmarks/full_size.py --shape 4b --dtype fp32 --precision int4 --question --work /some/disk

Prints time, rate and peak resident memory of each step, beside what the disk itself takes: the same number of
bytes written in plain blocks and flushed. Peak memory is the kernel's count for the child process; in the
question it includes the pages of the mapped weights, which the kernel may drop when it needs room.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
IMAGE = ROOT / "tests" / "data" / "golden" / "images" / "a_single_image_img0.png"
PROBE_BYTES = 4 << 30


def measured(command: list[str]) -> tuple[float, float, str]:
    """Run a command: seconds, its peak resident memory in GB, its stdout."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise click.ClickException(f"{' '.join(command)} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9, output


def disk_write_rate(directory: Path) -> float:
    """GB/s of plain sequential writes, flushed."""
    block, path = os.urandom(1 << 24), directory / "probe"
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return PROBE_BYTES / seconds / 1e9


def command(*words: object) -> list[str]:
    """The onevision-edge command of this interpreter."""
    return [sys.executable, "-m", "onevision_edge", *map(str, words)]


@click.command()
@click.option("--shape", type=click.Choice(["4b", "8b"]), required=True)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True)
@click.option("--precision", type=click.Choice(["int8", "int8-weight", "int4", "fp8", "nvfp4"]), help="Quantise to it.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Directory for checkpoint and bundle.")
@click.option("--question", is_flag=True, help="Ask about one image, too.")
@click.option("--keep", is_flag=True, help="Keep the bundle.")
@click.option("--json", "as_json", is_flag=True)
def main(shape: str, dtype: str, precision: str | None, work: Path, question: bool, keep: bool, as_json: bool) -> None:
    """Measure export or quantisation, and a question, at a released size."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, bundle = work / f"checkpoint-{shape}", work / f"bundle-{shape}-{precision or dtype}"
    if not checkpoint.exists():
        tool = ROOT / "tools" / "make_checkpoint.py"
        measured([sys.executable, str(tool), str(checkpoint), "--shape", shape, "--tokenizer", "demo"])
    record: dict[str, Any] = {"shape": shape, "dtype": dtype, "precision": precision}
    record["disk_write_gb_s"] = disk_write_rate(work)
    verb = ("quantize", "--precision", precision) if precision else ("export",)
    seconds, peak, _ = measured(command(*verb, checkpoint, "-o", bundle, "--dtype", dtype, "--overwrite"))
    size = sum(path.stat().st_size for path in bundle.iterdir()) / 1e9
    record |= {"bundle_gb": size, "write_s": seconds, "write_gb_s": size / seconds, "write_peak_gb": peak}
    if question:
        ask = command("run", bundle, "--image", IMAGE, "--prompt", "What is this?", "--max-tokens", 8, "--json")
        seconds, peak, output = measured(ask)
        record |= {"question_s": seconds, "question_peak_gb": peak, "answer": json.loads(output)}
    if not keep:
        shutil.rmtree(bundle)
    if as_json:
        click.echo(json.dumps(record, indent=1))
        return
    click.echo(
        f"{shape} {precision or ''} {dtype}: {size:.2f} GB written in {record['write_s']:.0f} s, "
        f"{record['write_gb_s']:.2f} GB/s (disk alone {record['disk_write_gb_s']:.2f} GB/s), "
        f"peak memory {record['write_peak_gb']:.2f} GB"
    )
    if question:
        timings, usage = record["answer"]["timings"], record["answer"]["usage"]
        click.echo(
            f"question in {record['question_s']:.0f} s, peak memory {record['question_peak_gb']:.1f} GB: "
            f"image {timings['vision_encoding']:.1f} s, "
            f"prefill of {usage['prompt_tokens']} tokens {timings['prefill']:.1f} s, "
            f"{timings['decode'] / max(1, usage['completion_tokens'] - 1):.2f} s per further token"
        )


if __name__ == "__main__":
    main()

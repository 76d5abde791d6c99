"""onevision-edge demo"""

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from .console import print_json, progress, say
from .export import run_export

DEFAULT_OUTPUT = Path("onevision-edge-demo")


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=DEFAULT_OUTPUT, show_default=True)
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), default="fp16", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print questions, answers and timings as JSON.")
def demo(output: Path, dtype: str, as_json: bool) -> None:
    """Export the small model shipped with this package, verify it, and let it answer questions on images.

    The model was trained on handwritten digits in coloured scenes. Its bundle stays for you to play with.
    """
    from ..bundle import Bundle
    from ..runtime.model import load
    from .run import answer_json

    started = perf_counter()
    run_export("demo", output, dtype, max_length=None, parts=["vision", "decoder"], overwrite=True)
    with progress("verify") as report:
        Bundle.open(output).verify(report)
    say(f"verified against its sha256 sums, {perf_counter() - started:.1f} s so far\n")
    model = load(output)
    images = Path(__file__).resolve().parent.parent / "demo" / "images"
    results = []
    for question in json.loads((images / "questions.json").read_text(encoding="utf-8")):
        answer = model.generate(_messages(images, question), max_tokens=64)
        facts = answer_json(model, answer)
        result = {**question, "answer": answer.text, "expected": question["answer"]}
        results.append({**result, "usage": facts["usage"], "timings": facts["timings"]})
        if not as_json:
            _show(images, question, results[-1])
    right = sum(r["answer"] == r["expected"] for r in results)
    if as_json:
        print_json({"bundle": str(output), "right": right, "questions": results})
    say(f"{right} of {len(results)} answers right, {perf_counter() - started:.1f} s in all")
    first = images / results[0]["images"][0]
    say(f'Your turn:  onevision-edge run {output} --image {first} --prompt "How many digits are there?"')


def _messages(images: Path, question: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": str(images / name)} for name in question["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question["prompt"]}]}]


def _show(images: Path, question: dict[str, Any], result: dict[str, Any]) -> None:
    from PIL import Image

    names = []
    for name in question["images"]:
        with Image.open(images / name) as image:
            names.append(f"{name} ({image.width} x {image.height})")
    t, tokens = result["timings"], result["usage"]
    mark = "" if result["answer"] == result["expected"] else f"   (expected: {result['expected']})"
    click.echo(f"{', '.join(names)}\n  {question['prompt']}\n  -> {result['answer']}{mark}")
    vision = t["preprocess"] + t["vision_encoding"]
    click.echo(
        f"     image {1e3 * vision:.0f} ms, prefill of {tokens['prompt_tokens']} tokens {1e3 * t['prefill']:.0f} ms, "
        f"decode of {tokens['completion_tokens']} tokens {1e3 * t['decode']:.0f} ms\n"
    )

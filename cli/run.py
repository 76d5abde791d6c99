"""onevision-edge run and chat"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import print_json, say
from .engines_option import engines_of

if TYPE_CHECKING:
    from ..runtime.constraint import Constraint
    from ..runtime.model import Generation, Model

_LOAD = ("threads", "prefill_chunk", "prepack", "exact", "provider", "engines", "image_cache", "prefix_caches")

_OPTIONS = [
    click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest answer."),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=int, default=0, help="Sample among the k likeliest tokens."),
    click.option("--top-p", type=float, default=1.0, help="Sample among the likeliest that hold this probability."),
    click.option(
        "--min-p", type=float, default=0.0, help="Drop tokens below this share of the best one's probability."
    ),
    click.option("--repetition-penalty", type=float, default=1.0),
    click.option("--presence-penalty", type=float, default=0.0),
    click.option("--frequency-penalty", type=float, default=0.0),
    click.option("--seed", type=int, default=None),
    click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated."),
    click.option(
        "--speculate",
        type=click.IntRange(0),
        metavar="N",
        help="Draft at most N tokens from the text so far, for one call to verify; 0: none.  [default: as many as pay]",
    ),
    click.option("--min-pixels", type=click.IntRange(1), help="Smaller images are enlarged to this many pixels."),
    click.option("--max-pixels", type=click.IntRange(1), help="Larger images are shrunk to this many pixels."),
    click.option("--threads", type=click.IntRange(1), help="Threads per operator; one per physical core if not given."),
    click.option(
        "--prefill-chunk", type=click.IntRange(1), default=512, show_default=True, help="Prompt tokens per call."
    ),
    click.option(
        "--image-cache",
        type=click.IntRange(0),
        default=256,
        show_default=True,
        metavar="MB",
        help="Keep so much of what was made of images, for when they are seen again; 0: none.",
    ),
    click.option(
        "--prefix-caches",
        type=click.IntRange(0),
        default=1,
        show_default=True,
        metavar="N",
        help="KV caches to keep after a question, for a next one that begins as one of them does; 0: none.",
    ),
    click.option(
        "--prepack/--no-prepack",
        default=None,
        help="Copy weights into the kernels' layout: slower to load, more memory.  [default: quantised weights alone]",
    ),
    click.option(
        "--exact", is_flag=True, help="Keep activations of INT4 and INT8 weights in floating point: slower on a CPU."
    ),
    click.option(
        "--provider",
        type=click.Choice(["cpu", "cuda", "tensorrt-rtx"]),
        default="cpu",
        show_default=True,
        help="Of ONNX Runtime, where it has it.",
    ),
    click.option(
        "--engines",
        metavar="TARGET",
        help="Run engines as built for TARGET; auto: those for this GPU; none: ONNX Runtime.  [default: cpu, if built]",
    ),
]


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--image", "images", multiple=True, help="Image file or data URL; may be repeated.")
@click.option("--video", "videos", multiple=True, help="Video file or directory of frames; may be repeated.")
@click.option("--frames", type=click.IntRange(1), help="Frames to take of each video, evenly spaced.")
@click.option("--fps", type=float, help="Frames per second to take of each video.")
@click.option("--prompt", required=True, help="The question; - reads it from stdin.")
@click.option("--system", help="System message.")
@click.option("--logprobs", type=click.IntRange(0), help="With --json: log-probabilities and this many alternatives.")
@click.option("--json-schema", "schema", type=click.Path(path_type=Path), help="Answer in JSON that this file allows.")
@click.option("--regex", "pattern", help="Answer what matches this from its beginning to its end.")
@click.option("--json", "as_json", is_flag=True, help="Print answer, token ids, counts and timings as JSON.")
@_with_options
def run(
    bundle: Path,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    frames: int | None,
    fps: float | None,
    prompt: str,
    system: str | None,
    schema: Path | None,
    pattern: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer one question about images or videos.

    The answer goes to stdout as it is produced, the timings to stderr.
    """
    if frames is not None and fps is not None:
        raise click.UsageError("--frames and --fps exclude each other")
    if schema is not None and pattern is not None:
        raise click.UsageError("--json-schema and --regex exclude each other")
    model = _load(bundle, options)
    options["constraint"] = _constraint(model, schema, pattern)
    if prompt == "-":
        prompt = sys.stdin.read().strip()
    messages = [{"role": "system", "content": system}] if system else []
    content = _media(images, videos, frames, fps)
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": prompt}]})  # type: ignore[dict-item]
    if as_json:
        print_json(answer_json(model, model.generate(messages, **options)))
        return
    _say_timings(_print_stream(model, messages, options))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--image", "images", multiple=True, help="Image for the first question; may be repeated.")
@click.option("--system", help="System message.")
@_with_options
def chat(bundle: Path, images: tuple[str, ...], system: str | None, **options: Any) -> None:
    """Talk about images, turn by turn.

    Type a question. /image PATH and /video PATH add a medium to the next one, /reset starts over, /exit leaves.
    """
    model = _load(bundle, options)
    start = [{"role": "system", "content": system}] if system else []
    messages, media = list(start), _media(images, (), None, None)
    say("Ask about your images. /image PATH, /video PATH, /reset, /exit")
    while (line := _read_line()) is not None:
        verb, _, rest = line.strip().partition(" ")
        if verb in ("/exit", "/quit"):
            break
        if verb == "/reset":
            messages, media = list(start), []
        elif verb in ("/image", "/video"):
            media += (
                _media((rest.strip(),), (), None, None) if verb == "/image" else _media((), (rest.strip(),), None, None)
            )
        elif verb.startswith("/"):
            say(f"{verb} is not a command: /image PATH, /video PATH, /reset, /exit")
        elif line.strip():
            messages, media = _turn(model, messages, media, line.strip(), options)


def _turn(
    model: "Model", messages: list[Any], media: list[Any], question: str, options: dict[str, Any]
) -> tuple[list[Any], list[Any]]:
    """Ask; on an error the conversation stays as it was, without the media that may have caused it."""
    from ..errors import OneVisionError

    asked = [*messages, {"role": "user", "content": [*media, {"type": "text", "text": question}]}]
    try:
        answer = _print_stream(model, asked, options)
    except OneVisionError as error:
        say(f"Error: {error}")
        return messages, []
    _say_timings(answer)
    return [*asked, {"role": "assistant", "content": answer.text}], []


def _load(bundle: Path, options: dict[str, Any]) -> "Model":
    from ..runtime.model import load

    chosen = {name: options.pop(name) for name in _LOAD}
    return load(
        bundle, **{**chosen, "engines": engines_of(chosen["engines"]), "image_cache": chosen["image_cache"] * 1_000_000}
    )


def _constraint(model: "Model", schema: Path | None, pattern: str | None) -> "Constraint | None":
    """What the answer has to follow, if anything. Raises OneVisionError."""
    from ..errors import OneVisionError
    from ..runtime.constraint import json_schema, regex

    if pattern is not None:
        return regex(pattern, model)
    if schema is None:
        return None
    try:
        return json_schema(schema.read_text(encoding="utf-8"), model)
    except (OSError, UnicodeDecodeError) as error:
        raise OneVisionError(f"{schema} cannot be read: {error}") from None


def _media(
    images: tuple[str, ...], videos: tuple[str, ...], frames: int | None, fps: float | None
) -> list[dict[str, Any]]:
    sampling: dict[str, Any] = {"nframes": frames} if frames is not None else {"fps": fps} if fps is not None else {}
    items: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return items + [{"type": "video", "video": video, **sampling} for video in videos]


def _print_stream(model: "Model", messages: list[Any], options: dict[str, Any]) -> "Generation":
    answer = None
    for piece in model.stream(messages, **options):
        click.echo(piece, nl=False)
        answer = piece.generation
    click.echo()
    assert answer is not None
    return answer


def _read_line() -> str | None:
    click.echo("> ", nl=False, err=True)
    return sys.stdin.readline() or None


def _say_timings(answer: "Generation") -> None:
    t, later = answer.timings, len(answer.token_ids) - 1
    rate = f", {later / t.decode:.1f} tokens/s" if later > 0 and t.decode else ""
    drafts = f" ({answer.accepted_tokens} of {answer.drafted_tokens} drafted right)" if answer.drafted_tokens else ""
    cached = f", {answer.cached_tokens} cached" if answer.cached_tokens else ""
    say(
        f"{answer.prompt_tokens} prompt tokens ({answer.image_tokens} of images{cached}), "
        f"{len(answer.token_ids)} generated; "
        f"first token after {t.time_to_first_token:.2f} s (image {t.preprocess + t.vision_encoding:.2f} s, "
        f"prefill {t.prefill:.2f} s){rate}{drafts}"
    )


def answer_json(model: "Model", answer: "Generation") -> dict[str, Any]:
    """An answer as plain data; times in seconds."""
    value = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "image_tokens": answer.image_tokens,
            "cached_tokens": answer.cached_tokens,
            "cached_image_tokens": answer.cached_image_tokens,
            "drafted_tokens": answer.drafted_tokens,
            "accepted_tokens": answer.accepted_tokens,
            "completion_tokens": len(answer.token_ids),
        },
        "timings": {**asdict(answer.timings), "time_to_first_token": answer.timings.time_to_first_token},
    }
    if answer.logprobs is not None:
        value["logprobs"] = [_logprob_json(model, token) for token in answer.logprobs]
    return value


def _logprob_json(model: "Model", token: Any) -> dict[str, Any]:
    assert model.tokenizer is not None
    text = model.tokenizer.token
    top = [{"token_id": i, "token": text(i), "logprob": logprob} for i, logprob in token.top]
    return {"token_id": token.token_id, "token": text(token.token_id), "logprob": token.logprob, "top": top}

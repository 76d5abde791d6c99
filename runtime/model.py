"""A bundle, loaded: questions about images in, answers out."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from ..bundle import Bundle
from ..engines.cpu.record import has_engine
from ..engines.record import CPU
from ..errors import OneVisionError
from .backend import SessionOptions
from .cache import Backend, PartBackends
from .constraint import Constraint
from .cpu_engine import CpuEngine, CpuOrPlain
from .generation import Prompt, Running, Timings, TokenLogprob
from .images import ImageProcessor
from .prompts import Messages, image_processor, optional_tokenizer, token_prompt
from .sampling import SamplingParams
from .token_model import (
    DEFAULT_IMAGE_CACHE,
    DEFAULT_PREFILL_CHUNK,
    DEFAULT_PREFIX_CACHES,
    TokenModel,
    sampling_params,
)
from .tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer. finish_reason: "stop" (end token or stop string) or "length" (max_tokens or a full cache).

    Saved were the cached_tokens of the prompt, which the KV cache held from an earlier call, the tower's work for
    cached_image_tokens, and a decoder call for each of accepted_tokens, of the drafted_tokens.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    image_tokens: int  # of the prompt's tokens, those that stand for images or video frames
    cached_tokens: int
    cached_image_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    logprobs: list[TokenLogprob] | None
    timings: Timings

    def __str__(self) -> str:
        return self.text


class Delta(str):
    """A piece of streamed text. The last one carries `generation`, the whole answer; before, it is None."""

    generation: Generation | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """One conversation, ready to run. timings: of what was done so far."""

    prompt: Prompt
    image_tokens: int
    cached_image_tokens: int
    timings: Timings


class Model(TokenModel):
    """A loaded bundle, made by `load`: the token level, and chat where the bundle has a tokenizer."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        image_cache: int = DEFAULT_IMAGE_CACHE,
        prefix_caches: int = DEFAULT_PREFIX_CACHES,
    ) -> None:
        processor = image_processor(bundle.directory, bundle.manifest.model.vision)
        self.processor = processor.with_pixels(min_pixels, max_pixels)
        self.tokenizer = optional_tokenizer(bundle.directory)
        super().__init__(bundle, backend, prefill_chunk, image_cache, prefix_caches)
        if self.tokenizer:
            self.eos_token_ids = tuple(dict.fromkeys((*self.eos_token_ids, *self.tokenizer.eos_token_ids)))

    def generate(self, messages: Messages | Sequence[Messages], **options: Any) -> Any:
        """Answer chat messages, or each conversation of a list of them in one batch.

        messages: [{"role": "user", "content": [{"type": "image", "image": ...}, {"type": "text", "text": ...}]}],
        the model card's; an image is a path, bytes, data URL, PIL image or array. Options are the fields of
        SamplingParams, min_pixels and max_pixels for this call, and constraint, which every answer follows
        (constraint.py). Returns a Generation, or a list of them.
        """
        batched = bool(messages) and isinstance(messages[0], list | tuple)
        conversations: Any = messages if batched else [messages]
        answers: dict[int, Generation] = {}
        for i, delta in self._chat(conversations, options):
            if delta.generation:
                answers[i] = delta.generation
        return [answers[i] for i in range(len(conversations))] if batched else answers[0]

    def stream(self, messages: Messages, **options: Any) -> Iterator[Delta]:
        """Answer one conversation piece by piece, as `generate` does.

        A piece is a str that never ends inside a character; the last one's `generation` is the whole answer.
        """
        return (delta for _, delta in self._chat([messages], options))

    def _chat(self, conversations: Sequence[Messages], options: dict[str, Any]) -> Iterator[tuple[int, Delta]]:
        """Pieces of every conversation's answer, with its index; each one's last piece carries the answer."""
        tokenizer = self._require_tokenizer()
        pixels = {name: options.pop(name, None) for name in ("min_pixels", "max_pixels")}
        constraint, params = options.pop("constraint", None), sampling_params(options)
        processor = self.processor.with_pixels(**pixels)
        prepared = [self.prepared(messages, processor) for messages in conversations]
        batch = [self.sequence(p.prompt, params, constraint) for p in prepared]
        decoders = [StreamDecoder(tokenizer, params.stop) for _ in batch]
        shared = Timings()
        with self._loop(len(batch), prompts=[p.prompt.keys for p in prepared]) as loop:
            for advanced in loop.steps(batch, shared):
                for i in advanced:
                    piece = Delta(advance(batch[i], decoders[i]))
                    if batch[i].finish_reason is not None:
                        piece = Delta(piece + decoders[i].finish())
                        piece.generation = generation_of(batch[i], decoders[i].text, prepared[i], shared)
                    if piece or piece.generation:
                        yield i, piece

    def prepared(self, messages: Messages, processor: ImageProcessor | None = None) -> Prepared:
        """A conversation with its images encoded and stitched in. processor: another than the model's.

        Raises OneVisionError. Threads may call it at the same time.
        """
        tokenizer, processor = self._require_tokenizer(), processor or self.processor
        timings, started = Timings(), perf_counter()
        prompt = token_prompt(messages, self.config, tokenizer, processor, self._images)
        self._check_length(len(prompt.ids))
        timings.preprocess, started = perf_counter() - started, perf_counter()
        media = {"image": prompt.images, "video": prompt.videos}
        features = {self._media_ids[name]: self._features(name, prompt.ids, m) for name, m in media.items()}
        timings.vision_encoding, started = perf_counter() - started, perf_counter()
        stitched = self._stitched(prompt.ids, features)
        timings.prepare_embeddings = perf_counter() - started
        found = features.values()
        return Prepared(stitched, sum(len(f.keys) for f in found), sum(f.cached for f in found), timings)

    def sequence(self, prompt: Prompt, params: SamplingParams, constraint: Constraint | None = None) -> Running:
        """A sequence that has not begun. constraint: what its answer follows, which stays as it is."""
        return self._sequence(prompt, params, self.eos_token_ids, constraint)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise OneVisionError(
                f"{self.bundle.directory} has no tokenizer.json, which chat needs; the token level (logits, "
                "generate_ids) works without"
            )
        return self.tokenizer


def load(
    bundle: str | os.PathLike[str],
    *,
    threads: int | None = None,
    vision_threads: int | None = None,
    prepack: bool | None = None,
    exact: bool = False,
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    image_cache: int = DEFAULT_IMAGE_CACHE,
    prefix_caches: int = DEFAULT_PREFIX_CACHES,
    provider: str = "cpu",
    engines: str | bool | None = None,
) -> Model:
    """Load a bundle to run in its engines, or on ONNX Runtime, by default on the CPU.

    engines: a target that `onevision-edge build` was run for, or True for the one that this GPU runs; None: the one
    for the CPU where the bundle has it and this machine runs it, else, and for False, ONNX Runtime, to which prepack,
    exact and provider belong. provider: cpu, cuda or tensorrt-rtx. threads: of the CPU, None for one per physical core.
    vision_threads: for the tower threads of its own, so many, which work beside the decoder's; None: the same ones.
    prepack: copy the weights into the layout the kernels like best; else they stay in the mapped file, which loads
    at once and takes half the memory; None: quantised ones alone. exact: activations of weight-only products stay
    floats, as on other engines; ONNX Runtime rounds them to INT8 otherwise, which is several times faster.
    prefill_chunk: prompt tokens per decoder call. min_pixels, max_pixels: limits images are resized to, in place of
    the checkpoint's. image_cache: bytes of patches and embeddings of images that were seen, kept for when they are seen
    again; 0: none. prefix_caches: KV caches kept after their call for a next whose prompt begins as its prompt and
    answer did, as a conversation's does; 0: none. Raises OneVisionError.
    """
    opened = Bundle.open(bundle)
    runtime = SessionOptions(threads=threads, prepack=prepack, exact=exact, provider=provider)
    backend = _backend(opened, runtime, engines)
    if vision_threads is not None:
        backend = PartBackends({"vision": _backend(opened, replace(runtime, threads=vision_threads), engines)}, backend)
    return Model(opened, backend, prefill_chunk, min_pixels, max_pixels, image_cache, prefix_caches)


def _backend(bundle: Bundle, runtime: SessionOptions, engines: str | bool | None) -> Backend:
    """What opens the graphs: engines as they were asked for, or ONNX Runtime."""
    mine = runtime == SessionOptions(threads=runtime.threads)  # nothing that is ONNX Runtime's was asked for
    if engines is False or (engines is None and not (mine and has_engine(bundle))):
        return runtime
    if engines is None:
        return CpuOrPlain(CpuEngine(runtime.threads), runtime)
    if not mine or (engines != CPU and runtime.threads is not None):
        raise OneVisionError("prepack, exact and provider are ONNX Runtime's, and threads the CPU's: engines have none")
    if engines == CPU:
        return CpuEngine(runtime.threads)
    from .engine_backend import Engines

    return Engines(None if engines is True else str(engines))


def advance(sequence: Running, decoder: StreamDecoder) -> str:
    """Text that the sequence's newest token made final; a stop string ends the sequence."""
    if sequence.end_token_id is not None:
        return ""
    text = decoder.push(sequence.token_ids[-1])
    if decoder.stopped:
        sequence.finish_reason = "stop"
    return text


def generation_of(sequence: Running, text: str, prepared: Prepared, shared: Timings) -> Generation:
    """The answer of a finished sequence. shared: times of prefill and decode."""
    return Generation(
        text=text,
        token_ids=sequence.token_ids,
        finish_reason=sequence.finish_reason or "stop",
        prompt_tokens=len(prepared.prompt.ids),
        image_tokens=prepared.image_tokens,
        cached_tokens=sequence.reused,
        cached_image_tokens=prepared.cached_image_tokens,
        drafted_tokens=sequence.drafted,
        accepted_tokens=sequence.accepted,
        logprobs=sequence.logprobs if sequence.sampler.params.logprobs is not None else None,
        timings=replace(prepared.timings, prefill=shared.prefill, decode=shared.decode),
    )

"""A bundle, loaded: questions about images in, answers out."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..config import read_json
from ..errors import OneVisionError
from .backend import SessionOptions
from .chat import IMAGE_TOKEN, VIDEO_TOKEN, Prompt, expand_placeholders, render
from .generation import Running, Timings, TokenLogprob
from .images import ImageProcessor
from .token_model import DEFAULT_PREFILL_CHUNK, Media, TokenModel, sampling_params
from .tokenizer import StreamDecoder, Tokenizer
from .video import load_video

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer. finish_reason: "stop" (end token or stop string) or "length" (max_tokens or a full cache)."""

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    image_tokens: int  # of the prompt's tokens, those that stand for images or video frames
    logprobs: list[TokenLogprob] | None
    timings: Timings

    def __str__(self) -> str:
        return self.text


class Delta(str):
    """A piece of streamed text. The last one carries `generation`, the whole answer; before, it is None."""

    generation: Generation | None = None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One conversation, ready to run."""

    ids: np.ndarray
    embeds: np.ndarray
    image_tokens: int
    timings: Timings


class Model(TokenModel):
    """A loaded bundle, made by `load`: the token level, and chat where the bundle has a tokenizer."""

    def __init__(
        self,
        bundle: Bundle,
        options: SessionOptions,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.processor = image_processor(bundle).with_pixels(min_pixels, max_pixels)
        self.tokenizer = _tokenizer(bundle)
        super().__init__(bundle, options, prefill_chunk)
        if self.tokenizer:
            self.eos_token_ids = tuple(dict.fromkeys((*self.eos_token_ids, *self.tokenizer.eos_token_ids)))

    def generate(self, messages: Messages | Sequence[Messages], **options: Any) -> Any:
        """Answer chat messages, or each conversation of a list of them in one batch.

        messages: [{"role": "user", "content": [{"type": "image", "image": ...}, {"type": "text", "text": ...}]}],
        the model card's; an image is a path, bytes, data URL, PIL image or array. Options are the fields of
        SamplingParams, and min_pixels and max_pixels for this call. Returns a Generation, or a list of them.
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
        params = sampling_params(options)
        processor = self.processor.with_pixels(**pixels)
        prepared = [self._prepare(messages, tokenizer, processor) for messages in conversations]
        batch = [self._sequence(p.ids, p.embeds, params, self.eos_token_ids) for p in prepared]
        decoders = [StreamDecoder(tokenizer, params.stop) for _ in batch]
        shared = Timings()
        with self._loop(len(batch)) as loop:
            for advanced in loop.steps(batch, shared):
                for i in advanced:
                    piece = Delta(_advance(batch[i], decoders[i]))
                    if batch[i].finish_reason is not None:
                        piece = Delta(piece + decoders[i].finish())
                        piece.generation = _generation(batch[i], decoders[i].text, prepared[i], shared)
                    if piece or piece.generation:
                        yield i, piece

    def _prepare(self, messages: Messages, tokenizer: Tokenizer, processor: ImageProcessor) -> _Prepared:
        timings, started = Timings(), perf_counter()
        image, video = (tokenizer.token(i) for i in self._media_ids.values())
        prompt = render(
            messages, tokenizer.chat_template, image_token=image or IMAGE_TOKEN, video_token=video or VIDEO_TOKEN
        )
        media = _preprocess(prompt, processor)
        ids = self._expanded(tokenizer.encode(prompt.text), media)
        timings.preprocess, started = perf_counter() - started, perf_counter()
        features = {self._media_ids[name]: self._features(name, ids, m) for name, m in media.items()}
        timings.vision_encoding, started = perf_counter() - started, perf_counter()
        embeds = self._stitched(ids, features)
        timings.prepare_embeddings = perf_counter() - started
        return _Prepared(ids, embeds, sum(map(len, features.values())), timings)

    def _expanded(self, ids: list[int], media: dict[str, Media]) -> np.ndarray:
        """Token ids with every placeholder as long as its medium; refused at once when they cannot fit."""
        counts = {
            name: [] if m.grid_thw is None else self._encoder().tokens(m.grid_thw).tolist() for name, m in media.items()
        }
        expanded = expand_placeholders(
            ids, self._media_ids["image"], self._media_ids["video"], counts["image"], counts["video"]
        )
        self._check_length(len(expanded))
        return expanded

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
    prepack: bool = False,
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Model:
    """Load a bundle to run on ONNX Runtime's CPU provider.

    threads: None for one per physical core. prepack: copy the weights into the layout the kernels like best;
    else they stay in the mapped file, which loads at once and takes half the memory. prefill_chunk: prompt
    tokens per decoder call. min_pixels, max_pixels: limits images are resized to, in place of the
    checkpoint's. Raises OneVisionError.
    """
    options = SessionOptions(threads=threads, prepack=prepack)
    return Model(Bundle.open(bundle), options, prefill_chunk, min_pixels, max_pixels)


def image_processor(bundle: Bundle) -> ImageProcessor:
    """The published processor, with the patch and merge sizes of the model itself."""
    path, vision = bundle.directory / "preprocessor_config.json", bundle.manifest.model.vision
    processor = ImageProcessor.from_config(read_json(path)) if path.is_file() else ImageProcessor()
    return replace(processor, patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)


def _tokenizer(bundle: Bundle) -> Tokenizer | None:
    return Tokenizer.from_directory(bundle.directory) if (bundle.directory / "tokenizer.json").is_file() else None


def _preprocess(prompt: Prompt, processor: ImageProcessor) -> dict[str, Media]:
    images = Media(*processor(prompt.images)) if prompt.images else Media(None, None)
    if not prompt.videos:
        return {"image": images, "video": Media(None, None)}
    clips = [processor.video(load_video(v.source, frames=v.nframes, fps=v.fps)) for v in prompt.videos]
    pixels, grids = zip(*clips, strict=True)
    return {"image": images, "video": Media(np.concatenate(pixels), np.concatenate(grids))}


def _advance(sequence: Running, decoder: StreamDecoder) -> str:
    """Text that the sequence's newest token made final; a stop string ends the sequence."""
    if sequence.end_token_id is not None:
        return ""
    text = decoder.push(sequence.token_ids[-1])
    if decoder.stopped:
        sequence.finish_reason = "stop"
    return text


def _generation(sequence: Running, text: str, prepared: _Prepared, shared: Timings) -> Generation:
    return Generation(
        text=text,
        token_ids=sequence.token_ids,
        finish_reason=sequence.finish_reason or "stop",
        prompt_tokens=len(prepared.ids),
        image_tokens=prepared.image_tokens,
        logprobs=sequence.logprobs if sequence.sampler.params.logprobs is not None else None,
        timings=replace(prepared.timings, prefill=shared.prefill, decode=shared.decode),
    )

"""The token level of a loaded bundle: ids and pixel rows in, logits or new ids out. It needs no tokenizer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..errors import OneVisionError
from ..precision import float32, from_float32
from .cache import AnyGraph, Backend, Decoder, KVCache
from .constraint import Constraint
from .generation import Loop, Prompt, Running, Timings, new_sequence
from .image_cache import ImageCache
from .prefix import HeldCache, IdleCaches, Keys, text_keys
from .sampling import SamplingParams
from .speculation import Drafting
from .stitching import EmbeddingTable, check_counts, check_ids
from .vision import Features, VisionEncoder

DEFAULT_PREFILL_CHUNK = 512
DEFAULT_IMAGE_CACHE = 256_000_000
DEFAULT_PREFIX_CACHES = 1


@dataclass(frozen=True, slots=True)
class Media:
    """The images, or the videos, of a call: float pixel rows [patches, patch_dim] and their grid [n, 3]."""

    pixel_values: np.ndarray | None
    grid_thw: np.ndarray | None


class TokenModel:
    """The graphs of a bundle, its embedding table and a KV cache for every call that is under way.

    image_cache: bytes of image embeddings to keep. prefix_caches: KV caches to keep after their calls, for those
    whose prompt begins as one of them does.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend, prefill_chunk: int, image_cache: int, prefix_caches: int
    ) -> None:
        self.bundle, self.config = bundle, bundle.manifest.model
        self.prefill_chunk = _checked("prefill_chunk", prefill_chunk, 1)
        self._images = ImageCache(_checked("image_cache", image_cache, 0))
        self._idle = IdleCaches(_checked("prefix_caches", prefix_caches, 0))
        self._drafting: dict[int, Drafting] = {}  # by the sequences of a batch
        self.eos_token_ids = self.config.eos_token_ids
        self._media_ids = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        self._graphs = {part: backend.open(bundle, part) for part in bundle.manifest.graphs}
        self._cache_rows = bundle.manifest.max_length
        self._check_max_length()
        decoder = self._graphs.get("decoder")
        self.max_length = min(self._cache_rows, (decoder.rows if decoder else None) or self._cache_rows)
        table = bundle.manifest.embedding
        self._table = EmbeddingTable(bundle.path(table.file), table) if table else None

    @property
    def graphs(self) -> Mapping[str, AnyGraph]:
        """The loaded graphs by part: vision, decoder."""
        return self._graphs

    def encode_images(self, pixel_values: np.ndarray, image_grid_thw: np.ndarray) -> np.ndarray:
        """Embeddings of images: float32 [tokens, D].

        pixel_values: [patches of all images, patch_dim] as `preprocess_images` makes them; image_grid_thw:
        [images, 3]. Video frames alike, with their count as the first grid number.
        """
        encoder = self._encoder()
        features = encoder(*encoder.check(pixel_values, image_grid_thw, "image"))
        return float32(np.asarray(features.rows), encoder.graph.fmt)

    def logits(
        self,
        input_ids: np.ndarray,
        pixel_values: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        pixel_values_videos: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
        *,
        prefill_chunk: int | None = None,
    ) -> np.ndarray:
        """Next-token logits at every position: float32 [batch, tokens, vocab].

        input_ids: [batch, tokens], padded left or right as attention_mask (1 = token) says; rows at padding
        are zeros. Pixel inputs belong to the placeholders in row-major order.
        """
        ids, spans = self._unpadded(input_ids, attention_mask)
        media = {
            "image": Media(pixel_values, image_grid_thw),
            "video": Media(pixel_values_videos, video_grid_thw),
        }
        logits = np.zeros((*np.atleast_2d(input_ids).shape, self.config.text.vocab_size), np.float32)
        prompts = self._embed(ids, media)
        with self._loop(1, prefill_chunk) as loop:
            for row, (left, right), prompt in zip(logits, spans, prompts, strict=True):
                row[left:right] = loop.decoder.prefill(prompt.embeds, loop.chunk, np.arange(len(prompt.ids)))
        return logits

    def logits_at(
        self,
        positions: np.ndarray,
        input_ids: np.ndarray,
        pixel_values: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        pixel_values_videos: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
        *,
        prompt: int | None = None,
    ) -> np.ndarray:
        """Next-token logits of one sequence at some of its positions: float32 [n, vocab].

        positions: ascending int64 [n]. input_ids: [tokens]. prompt: tokens that are read at once; those behind them
        go through the cache one by one, as an answer's do; None: all at once. The rest as for `logits`.
        """
        embedded = self._one(input_ids, Media(pixel_values, image_grid_thw), Media(pixel_values_videos, video_grid_thw))
        with self._loop(1) as loop:
            begun = len(embedded.ids) if prompt is None else prompt
            return loop.decoder.teacher_forced(embedded.embeds, loop.chunk, positions, begun)

    def stitch(
        self, input_ids: np.ndarray, image_embeds: np.ndarray | None = None, video_embeds: np.ndarray | None = None
    ) -> np.ndarray:
        """What the decoder reads for one sequence, float32 [tokens, D]: text from the table, images from `*_embeds`.

        input_ids: [tokens]. image_embeds, video_embeds: float [image tokens, D] in the order of their placeholders.
        """
        (ids,), _ = self._unpadded(input_ids, None)
        fmt, width = self._decoder_graph().fmt, self.config.text.hidden_size
        found: dict[int, Features] = {}
        for name, embeds in (("image", image_embeds), ("video", video_embeds)):
            rows = np.empty((0, width), np.float32) if embeds is None else np.asarray(embeds)
            check_counts(ids, self._media_ids[name], len(rows), name)
            found[self._media_ids[name]] = Features(from_float32(rows, fmt), text_keys(np.zeros(len(rows))), 0)
        return float32(np.asarray(self._stitched(ids, found).embeds), fmt)

    def embed(
        self,
        input_ids: np.ndarray,
        pixel_values: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        pixel_values_videos: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
    ) -> np.ndarray:
        """What the decoder reads for one sequence: float32 [tokens, D]. Inputs as for `logits_at`."""
        embedded = self._one(input_ids, Media(pixel_values, image_grid_thw), Media(pixel_values_videos, video_grid_thw))
        return float32(np.asarray(embedded.embeds), self._decoder_graph().fmt)

    def generate_ids(
        self,
        input_ids: np.ndarray,
        pixel_values: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        pixel_values_videos: np.ndarray | None = None,
        video_grid_thw: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
        *,
        max_tokens: int = 16,
        eos_token_id: int | Sequence[int] | None = None,
        prefill_chunk: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """The new ids after each row: int64 [batch, n], greedy unless `options` (SamplingParams) say otherwise.

        Inputs as for `logits`. eos_token_id: None for the bundle's, an empty list for none. n is the longest
        answer; shorter ones end in their end token, then padding.
        """
        ids, _ = self._unpadded(input_ids, attention_mask)
        media = {
            "image": Media(pixel_values, image_grid_thw),
            "video": Media(pixel_values_videos, video_grid_thw),
        }
        params = sampling_params({**options, "max_tokens": max_tokens})
        eos = self.eos_token_ids if eos_token_id is None else _end_tokens(eos_token_id)
        prompts = self._embed(ids, media)
        batch = [self._sequence(prompt, params, eos) for prompt in prompts]
        for _ in self._steps(batch, Timings(), prefill_chunk):
            pass
        return self._padded(batch, eos)

    def stream_ids(
        self,
        input_ids: np.ndarray,
        pixel_values: np.ndarray | None = None,
        image_grid_thw: np.ndarray | None = None,
        *,
        timings: Timings | None = None,
        max_tokens: int = 16,
        **options: Any,
    ) -> Iterator[dict[int, int]]:
        """New ids as they come: at each step, the newest id of the rows that got one, by row.

        Inputs and options as for `generate_ids`, rows of one length; an end token is not among the ids. timings: to
        add what the stages take to; `preprocess` is the caller's.
        """
        timings = Timings() if timings is None else timings
        ids, _ = self._unpadded(input_ids, None)
        params = sampling_params({**options, "max_tokens": max_tokens})
        prompts = self._embed(ids, {"image": Media(pixel_values, image_grid_thw)}, timings)
        batch = [self._sequence(prompt, params, self.eos_token_ids) for prompt in prompts]
        for advanced in self._steps(batch, timings):
            yield {i: batch[i].last for i in advanced if batch[i].end_token_id is None}

    def _steps(self, batch: list[Running], timings: Timings, chunk: int | None = None) -> Iterator[list[int]]:
        """The batch's steps over a cache of its own, as Loop.steps has them."""
        with self._loop(len(batch), chunk, [sequence.prompt.keys for sequence in batch]) as loop:
            yield from loop.steps(batch, timings)

    def _padded(self, batch: Sequence[Running], eos: Sequence[int]) -> np.ndarray:
        """New ids in one array, the end token shown where one was produced."""
        answers = [s.token_ids + ([s.end_token_id] if s.end_token_id is not None else []) for s in batch]
        pad = self.config.pad_token_id
        out = np.full((len(answers), max(map(len, answers))), next(iter(eos), 0) if pad is None else pad, np.int64)
        for row, ids in zip(out, answers, strict=True):
            row[: len(ids)] = ids
        return out

    def _unpadded(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None
    ) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
        return unpadded(input_ids, attention_mask, self.config.text.vocab_size)

    def _embed(
        self, ids: Sequence[np.ndarray], media: dict[str, Media], timings: Timings | None = None
    ) -> list[Prompt]:
        """Every row with its embeddings, media stitched in. timings: to add what both take to."""
        for row in ids:
            self._check_length(len(row))
        timings, started = Timings() if timings is None else timings, perf_counter()
        shares: list[dict[int, Features]] = [{} for _ in ids]
        for name, entries in media.items():
            token_id = self._media_ids[name]
            features = self._features(name, np.concatenate(ids), entries)
            edges = np.cumsum([0, *(int((row == token_id).sum()) for row in ids)]).tolist()
            for share, (start, stop) in zip(shares, pairwise(edges), strict=True):
                share[token_id] = Features(features.rows[start:stop], features.keys[start:stop], 0)
        encoded = perf_counter()
        prompts = [self._stitched(row, share) for row, share in zip(ids, shares, strict=True)]
        timings.vision_encoding += encoded - started
        timings.prepare_embeddings += perf_counter() - encoded
        return prompts

    def _one(self, input_ids: np.ndarray, images: Media, videos: Media) -> Prompt:
        """One sequence, [tokens], with its embeddings."""
        (ids,), _ = self._unpadded(input_ids, None)
        (prompt,) = self._embed([ids], {"image": images, "video": videos})
        return prompt

    def _stitched(self, ids: np.ndarray, features: dict[int, Features]) -> Prompt:
        graph = self._decoder_graph()
        assert self._table is not None
        keys = text_keys(ids)
        for token_id, found in features.items():
            keys[ids == token_id] = found.keys
        rows: dict[int, Any] = {token_id: found.rows for token_id, found in features.items()}
        return Prompt(ids, graph.stitch(self._table, ids, rows), keys)

    def _features(self, name: str, ids: np.ndarray, media: Media) -> Features:
        """Embeddings of the images or videos whose placeholders stand in `ids`; checked before they are made."""
        token_id = self._media_ids[name]
        if media.pixel_values is None and media.grid_thw is None:
            check_counts(ids, token_id, 0, name)
            return Features(self._decoder_graph().empty((0, self.config.text.hidden_size)), text_keys([]), 0)
        if media.pixel_values is None or media.grid_thw is None:
            raise OneVisionError(f"{name} pixel values and their grid go together: one of them is missing")
        encoder = self._encoder()
        pixels, grid = encoder.check(media.pixel_values, media.grid_thw, name)
        check_counts(ids, token_id, int(encoder.tokens(grid).sum()), name)
        return encoder(pixels, grid)

    def _sequence(
        self, prompt: Prompt, params: SamplingParams, eos: Sequence[int], constraint: Constraint | None = None
    ) -> Running:
        return new_sequence(
            prompt,
            params,
            eos_token_ids=eos,
            suppress=tuple(self._media_ids.values()),
            vocab_size=self.config.text.vocab_size,
            max_length=self.max_length,
            constraint=constraint,
        )

    @contextmanager
    def _loop(self, batch: int, chunk: int | None = None, prompts: Sequence[Keys] = ()) -> Iterator[Loop]:
        """A loop over a cache of `batch` sequences that nobody else uses meanwhile: one that begins as `prompts` do."""
        chunk = self.prefill_chunk if chunk is None else _checked("prefill_chunk", chunk, 1)
        graph = self._decoder_graph()
        assert self._table is not None
        graph.check_batch(batch)
        held = self._idle.take(batch, prompts, lambda: self._new_cache(graph, batch))
        loop = Loop(held, self._table, chunk, self._drafting.setdefault(batch, Drafting()))
        try:
            yield loop
        finally:
            self._idle.give(replace(held, keys=loop.keys()))

    def new_cache(self, batch: int) -> KVCache:
        """A KV cache for so many sequences, empty. Raises OneVisionError where the engine takes fewer."""
        graph = self._decoder_graph()
        graph.check_batch(batch)
        return KVCache(self.config.text, self._cache_rows, batch, graph.cache_dtype, graph.zeros)

    @property
    def table(self) -> EmbeddingTable:
        """Embeddings of text tokens. Raises OneVisionError where the bundle has no decoder."""
        self.bundle.graph("decoder")
        assert self._table is not None
        return self._table

    def _new_cache(self, graph: AnyGraph, batch: int) -> HeldCache:
        """A decoder for the whole batch and, where it has several sequences, one for each."""
        cache = self.new_cache(batch)
        views = [cache.rows(i, i + 1) for i in range(batch)] if batch > 1 else []
        decoder, *others = (Decoder(graph, c, self.config.text.vocab_size) for c in (cache, *views))
        return HeldCache(decoder, others or [decoder])

    def _check_max_length(self) -> None:
        """The manifest's limit must be the decoder's own, which its contract states."""
        for part, graph in self._graphs.items():
            rows = {tensor.shape[2] for tensor in graph.spec.inputs if tensor.name.startswith("past_")}
            if part == "decoder" and rows != {self._cache_rows}:
                raise OneVisionError(
                    f"{self.bundle.directory}: the manifest says max_length {self._cache_rows}, the decoder's cache "
                    f"has {sorted(map(str, rows))} rows; export it again"
                )

    def _check_length(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise OneVisionError(
                f"the prompt has {tokens} tokens; this bundle holds {self.max_length}: use fewer or smaller images "
                "(max_pixels), or export with a larger --max-length"
            )

    def _encoder(self) -> VisionEncoder:
        self.bundle.graph("vision")
        return VisionEncoder(self._graphs["vision"], self.config.vision, self._images)

    def _decoder_graph(self) -> AnyGraph:
        self.bundle.graph("decoder")
        return self._graphs["decoder"]


def unpadded(
    input_ids: np.ndarray, attention_mask: np.ndarray | None, vocab_size: int
) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Each row's own ids, int64, and where they stand in the row: first and last + 1."""
    try:
        ids = np.atleast_2d(input_ids)
    except ValueError:
        raise OneVisionError("input_ids must be integers [batch, tokens]: pad its rows to one length") from None
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise OneVisionError(f"input_ids must be integers [batch, tokens], not {ids.dtype} {list(ids.shape)}")
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.atleast_2d(attention_mask).astype(bool)
    if mask.shape != ids.shape:
        raise OneVisionError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}")
    check_ids(ids[mask], vocab_size)
    spans = [_span(row, i) for i, row in enumerate(mask)]
    return [row[left:right].astype(np.int64) for row, (left, right) in zip(ids, spans, strict=True)], spans


def sampling_params(options: dict[str, Any]) -> SamplingParams:
    """SamplingParams from keyword options; an unknown one is an error that lists the known."""
    known = set(SamplingParams.__dataclass_fields__)
    unknown = sorted(set(options) - known)
    if unknown:
        raise OneVisionError(f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return SamplingParams(**options)


def _end_tokens(ids: int | Sequence[int]) -> tuple[int, ...]:
    values = np.atleast_1d(ids)
    if values.size and (values.ndim != 1 or values.dtype.kind not in "iu"):
        raise OneVisionError(f"eos_token_id is {ids!r}, not an id or a list of ids")
    return tuple(values.tolist())


def _checked(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or value < least:
        raise OneVisionError(f"{name} is {value}; it must be a whole number from {least}")
    return value


def _span(mask: np.ndarray, row: int) -> tuple[int, int]:
    """First and last + 1 of a row's tokens, which must stand together."""
    places = np.flatnonzero(mask)
    if not len(places):
        raise OneVisionError(f"attention_mask row {row} has no token")
    left, right = int(places[0]), int(places[-1]) + 1
    if right - left != len(places):
        raise OneVisionError(f"attention_mask row {row} has holes: pad on the left or the right only")
    return left, right

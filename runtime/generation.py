"""The generation loop: prefill each prompt into its cache rows, then decode all sequences together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from .cache import Decoder, Rows
from .sampling import Sampled, Sampler, SamplingParams
from .stitching import EmbeddingTable


@dataclass(slots=True)
class Timings:
    """Seconds spent in each stage of one request, and the tokens they were spent on.

    decode covers the tokens after the first, which comes out of prefill.
    """

    preprocess: float = 0.0
    vision_encoding: float = 0.0
    prepare_embeddings: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the request to its first token."""
        return self.preprocess + self.vision_encoding + self.prepare_embeddings + self.prefill


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token, the log-probability the model gave it, and its likeliest rivals (id, logprob)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class Running:
    """One sequence in the running batch."""

    prompt: Rows  # embeddings [tokens, D] in the graph's format
    sampler: Sampler
    eos_token_ids: frozenset[int]
    limit: int  # tokens it may generate
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None  # stop or length, once finished
    end_token_id: int | None = None  # the end token it produced, which is not part of the answer

    def accept(self, sampled: Sampled) -> None:
        """Take the next token; the sequence is finished by an end token or at its limit."""
        if sampled.token_id in self.eos_token_ids:
            self.finish_reason, self.end_token_id = "stop", sampled.token_id
            return
        self.token_ids.append(sampled.token_id)
        if sampled.logprob is not None:
            self.logprobs.append(TokenLogprob(sampled.token_id, sampled.logprob, sampled.top or []))
        if len(self.token_ids) >= self.limit:
            self.finish_reason = "length"


class Loop:
    """Prefill and decode of a batch over one cache."""

    def __init__(self, decoder: Decoder, row_decoders: Sequence[Decoder], table: EmbeddingTable, chunk: int) -> None:
        self.decoder, self.row_decoders = decoder, row_decoders
        self.table, self.chunk = table, chunk

    def steps(self, batch: Sequence[Running], timings: Timings) -> Iterator[list[int]]:
        """Run until every sequence has finished; yields, after each step, the sequences it advanced.

        Callers may finish a sequence themselves (a stop string) by setting its finish_reason.
        """
        for i, sequence in enumerate(batch):
            started = perf_counter()
            logits = self.row_decoders[i].prefill(sequence.prompt, self.chunk)
            sequence.accept(sequence.sampler.sample(logits))
            timings.prefill += perf_counter() - started
            yield [i]
        while running := [i for i, sequence in enumerate(batch) if sequence.finish_reason is None]:
            started = perf_counter()
            logits = self._decode(batch)
            for i in running:
                batch[i].accept(batch[i].sampler.sample(logits[i]))
            timings.decode += perf_counter() - started
            yield running

    def _decode(self, batch: Sequence[Running]) -> np.ndarray:
        """One token for every sequence: logits [batch, vocab].

        A finished sequence rewrites the row after its last, or the cache's last row when it is full; nothing
        reads it again.
        """
        last = np.array([s.token_ids[-1:] or [0] for s in batch], np.int64)
        starts = np.array([len(s.prompt) + max(len(s.token_ids) - 1, 0) for s in batch], np.int64)
        starts = np.minimum(starts, self.decoder.cache.max_length - 1)
        rows = np.zeros((len(batch), 1), np.int64)
        return self.decoder(self.table[last], starts, rows)[:, 0]


def new_sequence(
    prompt: Rows,
    prompt_ids: np.ndarray,
    params: SamplingParams,
    *,
    eos_token_ids: Sequence[int],
    suppress: Sequence[int],
    vocab_size: int,
    max_length: int,
) -> Running:
    """A sequence ready to run. The token that no longer fits the cache is never asked for.

    Generating n tokens writes n - 1 of them to the cache.
    """
    sampler = Sampler(params, prompt_ids.tolist(), suppress, vocab_size)
    eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
    return Running(prompt, sampler, eos, min(params.max_tokens, max_length - len(prompt) + 1))

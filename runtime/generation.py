"""The generation loop: prefill each prompt into its cache rows, then decode all sequences together.

What a cache's rows hold of a prompt is not computed again, and drafts of what may follow are verified together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from ..errors import OneVisionError
from .cache import Rows
from .constraint import Constraint
from .prefix import HeldCache, Keys, shared, text_keys
from .sampling import Sampled, Sampler, SamplingParams
from .speculation import Drafting, Lookup, Match
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


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that is ready to run: ids int64 [tokens], embeddings [tokens, D] in the graph's format, their keys."""

    ids: np.ndarray
    embeds: Rows
    keys: Keys


@dataclass(slots=True)
class Running:
    """One sequence in the running batch."""

    prompt: Prompt
    sampler: Sampler
    eos_token_ids: frozenset[int]
    limit: int  # tokens it may generate
    lookup: Lookup | None  # where drafts come from, if any are wanted
    constraint: Constraint | None = None  # what its tokens have to follow, of which its sampler keeps count
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None  # stop or length, once finished; fault
    fault: OneVisionError | None = None  # why it could not go on, where others shall not suffer from it
    end_token_id: int | None = None  # the end token it produced, which is not part of the answer
    cached: int = 0  # rows of its cache that hold its tokens
    reused: int = 0  # of its prompt, those that the cache held before
    drafted: int = 0  # tokens that were put before the decoder in advance
    accepted: int = 0  # those of them that it would have said

    @property
    def position(self) -> int:
        """Of the newest token, which is not in the cache yet."""
        return len(self.prompt.ids) + max(len(self.token_ids) - 1, 0)

    @property
    def last(self) -> int:
        """The newest token; any, where the first that came was an end token."""
        return self.token_ids[-1] if self.token_ids else 0

    def accept(self, sampled: Sampled) -> None:
        """Take the next token; the sequence is finished by an end token, the end of its grammar, or at its limit."""
        if sampled.token_id in self.eos_token_ids:
            self.finish_reason, self.end_token_id = "stop", sampled.token_id
            return
        self.token_ids.append(sampled.token_id)
        if self.lookup is not None:
            self.lookup.push(sampled.token_id)
        if sampled.logprob is not None:
            self.logprobs.append(TokenLogprob(sampled.token_id, sampled.logprob, sampled.top or []))
        if self.constraint is not None and self.constraint.ended:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"

    def meets(self, draft: "Draft") -> bool:
        """Whether the newest token is the one that was drafted, so that the next row of logits counts."""
        is_right = self.end_token_id is None and draft.meets(self.last)
        self.accepted += is_right
        return is_right

    def keys(self) -> Keys:
        """Keys of the rows of its cache that hold its tokens."""
        return np.concatenate([self.prompt.keys, text_keys(self.token_ids)])[: self.cached]


@dataclass(slots=True)
class Draft:
    """What may follow in one sequence, and how many of its tokens were looked at and right."""

    match: Match
    tokens: list[int]
    tried: int = 0
    right: int = 0

    def meets(self, token_id: int) -> bool:
        """Compare the next token with the drafted one; whether the draft goes on to be right."""
        if self.tried == len(self.tokens):
            return False
        is_right = token_id == self.tokens[self.tried]
        self.tried += 1
        self.right += is_right
        return is_right


class Loop:
    """Prefill and decode of a batch over one cache, whose keys are its caller's to keep up to date by `keys`."""

    def __init__(self, held: HeldCache, table: EmbeddingTable, chunk: int, drafting: Drafting) -> None:
        self.decoder, self.row_decoders = held.decoder, held.row_decoders
        self.table, self.chunk, self.drafting = table, chunk, drafting
        graph, cache = self.decoder.graph, self.decoder.cache
        self._rows = min(cache.max_length, graph.rows or cache.max_length)
        self._most = min(graph.tokens_per_call or self._rows, graph.logits_per_call or self._rows)
        self._held, self._begun = held.keys, list[Running]()

    def steps(self, batch: Sequence[Running], timings: Timings) -> Iterator[list[int]]:
        """Run until every sequence has finished; yields the sequences that got a token, token by token.

        Callers may finish a sequence themselves (a stop string) by setting its finish_reason.
        """
        for i, sequence in enumerate(batch):
            started = perf_counter()
            self._prefill(i, sequence)
            timings.prefill += perf_counter() - started
            yield [i]
        while running := [i for i, sequence in enumerate(batch) if sequence.finish_reason is None]:
            yield from self._step(batch, running, timings)

    def keys(self) -> list[Keys]:
        """Keys of the rows that each sequence of the cache holds now."""
        begun = [sequence.keys() for sequence in self._begun]
        return begun + [text_keys([]) for _ in range(len(begun), self.decoder.cache.batch)]

    def _prefill(self, i: int, sequence: Running) -> None:
        """The prompt but for what the cache holds of it, whose last token is computed for its logits in any case."""
        prompt = sequence.prompt
        sequence.reused = sequence.cached = min(shared(self._held[i], prompt.keys), len(prompt.ids) - 1)
        self._begun.append(sequence)
        logits = self.row_decoders[i].prefill(prompt.embeds, self.chunk, start=sequence.reused)
        sequence.cached = len(prompt.ids)
        sequence.accept(sequence.sampler.sample(logits))

    def _step(self, batch: Sequence[Running], running: list[int], timings: Timings) -> Iterator[list[int]]:
        """One call: the next token of every sequence, and more of those whose drafts were right."""
        started = perf_counter()
        size, drafts = self._drafts(batch, running)
        called = perf_counter()
        logits = self._decode(batch, drafts, size)
        seconds, advanced = perf_counter() - called, running
        for row in range(size):
            for i in advanced:
                batch[i].cached += 1
                batch[i].accept(batch[i].sampler.sample(logits[i, row]))
            right = [i for i in advanced if i in drafts and batch[i].meets(drafts[i])]
            timings.decode += perf_counter() - started
            yield advanced
            started = perf_counter()
            advanced = [i for i in right if batch[i].finish_reason is None]
            if not advanced:
                break
        self._learn(size, seconds, len(running), drafts)

    def _drafts(self, batch: Sequence[Running], running: Sequence[int]) -> tuple[int, dict[int, Draft]]:
        """Tokens of the next call, and the drafts among them by their sequence."""
        most = min(self._most, self._rows - max(batch[i].position for i in running))
        if most == 1:
            return 1, {}
        found = {i: lookup.match() for i in running if (lookup := batch[i].lookup) is not None}
        matches = {i: match for i, match in found.items() if match is not None}
        if not matches:
            return 1, {}
        wanted = batch[running[0]].sampler.params.speculate
        size = min(wanted + 1, most) if wanted else self.drafting.size([*matches.values()], len(running), most)
        drafts = {i: Draft(match, self._draft(batch[i], match, size - 1)) for i, match in matches.items() if size > 1}
        drafts = {i: draft for i, draft in drafts.items() if draft.tokens}
        for i, draft in drafts.items():
            batch[i].drafted += len(draft.tokens)
        return (size, drafts) if drafts else (1, {})

    def _draft(self, sequence: Running, match: Match, count: int) -> list[int]:
        assert sequence.lookup is not None
        tokens = sequence.lookup.draft(match, min(count, sequence.limit - len(sequence.token_ids) - 1))
        return tokens if sequence.constraint is None else tokens[: sequence.constraint.fitting(tokens)]

    def _decode(self, batch: Sequence[Running], drafts: dict[int, Draft], size: int) -> np.ndarray:
        """The newest token of every sequence and its draft, padded to `size` tokens: logits [batch, size, vocab].

        The rows of padding and of drafts that were wrong are written again by the next call. A finished sequence
        writes its own behind its last token, or over the cache's last rows where there is no room.
        """
        tokens = np.zeros((len(batch), size), np.int64)
        for i, sequence in enumerate(batch):
            drafted = drafts[i].tokens if i in drafts else []
            tokens[i, : len(drafted) + 1] = [sequence.last, *drafted]
            sequence.cached = min(sequence.position, self._rows - size, sequence.cached)
        starts = np.array([min(sequence.position, self._rows - size) for sequence in batch], np.int64)
        rows = np.zeros_like(tokens) + np.arange(size)
        return self.decoder(self.table[tokens], starts, rows)

    def _learn(self, size: int, seconds: float, sequences: int, drafts: dict[int, Draft]) -> None:
        if size == 1:
            self.drafting.stepped(seconds)
        else:
            outcomes = [(draft.match, draft.right, draft.tried) for draft in drafts.values()]
            self.drafting.verified(size, seconds, sequences, outcomes)


def new_sequence(
    prompt: Prompt,
    params: SamplingParams,
    *,
    eos_token_ids: Sequence[int],
    suppress: Sequence[int],
    vocab_size: int,
    max_length: int,
    constraint: Constraint | None = None,
) -> Running:
    """A sequence ready to run. The token that no longer fits the cache is never asked for.

    Generating n tokens writes n - 1 of them to the cache. constraint: stays as it is, the sequence goes on by a copy.
    """
    if constraint is not None:
        if params.ignore_eos:
            raise OneVisionError("ignore_eos goes on behind an answer's end, which a constraint sets: leave one out")
        constraint = constraint.copy()
    sampler = Sampler(params, prompt.ids.tolist(), suppress, vocab_size, constraint)
    eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
    limit = min(params.max_tokens, max_length - len(prompt.ids) + 1)
    lookup = None if params.speculate == 0 else Lookup(prompt.ids, limit, frozenset(suppress))
    return Running(prompt, sampler, eos, limit, lookup, constraint)

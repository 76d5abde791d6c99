"""The KV cache and the decoder that updates it in place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..bundle import Bundle
from ..config import TextConfig
from ..errors import OneVisionError
from .backend import Graph
from .cpu_graph import CpuGraph
from .device import DeviceArray
from .engine_graph import EngineGraph


class Backend(Protocol):
    """What opens the graphs of a bundle to run: SessionOptions on ONNX Runtime, Engines, CpuEngine."""

    def open(self, bundle: Bundle, part: str) -> "AnyGraph":
        """The vision or decoder graph, loaded. Raises OneVisionError."""


@dataclass(frozen=True, slots=True)
class PartBackends:
    """A backend of its own for some parts, and one for the others."""

    parts: Mapping[str, Backend]
    others: Backend

    def open(self, bundle: Bundle, part: str) -> "AnyGraph":
        """The vision or decoder graph, loaded. Raises OneVisionError."""
        return self.parts.get(part, self.others).open(bundle, part)


AnyGraph = Graph | CpuGraph | EngineGraph
Rows = np.ndarray | DeviceArray  # where the graph computes


class KVCache:
    """Keys and values of `batch` sequences, each with `max_length` rows; row = position.

    zeros: makes the buffers, [batch, heads, max_length, head_dim] each; on the host, pages are taken from the system
    as rows are written, so an unused tail costs nothing.
    """

    def __init__(
        self,
        config: TextConfig,
        max_length: int,
        batch: int,
        dtype: np.dtype,
        zeros: Callable[[tuple[int, ...], np.dtype], Any] = np.zeros,
    ) -> None:
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        self.layers = [(zeros(shape, dtype), zeros(shape, dtype)) for _ in range(config.num_hidden_layers)]
        self.max_length, self.batch = max_length, batch

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers when every row is in use."""
        return sum(key.nbytes + value.nbytes for key, value in self.layers)

    def rows(self, start: int, stop: int) -> "KVCache":
        """The cache of sequences start..stop, a view on the same memory."""
        view = object.__new__(KVCache)
        view.layers = [(key[start:stop], value[start:stop]) for key, value in self.layers]
        view.max_length, view.batch = self.max_length, stop - start
        return view


class Decoder:
    """The decoder graph bound to one cache: every call appends tokens to its sequences."""

    def __init__(self, graph: AnyGraph, cache: KVCache, vocab_size: int) -> None:
        self.graph, self.cache, self.vocab_size = graph, cache, vocab_size
        self._binding: Any = graph.bind()
        self._memory = np.empty(0, np.float32)  # of the largest logits so far
        self._logits = self._memory.reshape(0, 0, vocab_size)
        for i, (key, value) in enumerate(cache.layers):
            self._binding.in_place(f"past_key.{i}", f"present_key.{i}", key)
            self._binding.in_place(f"past_value.{i}", f"present_value.{i}", value)

    def __call__(self, embeds: Rows, starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Append tokens and return logits.

        embeds: [batch, tokens, D] in the graph's format. starts: int64 [batch], the position of each
        sequence's first token. rows: int64 [batch, n], the tokens of this call whose logits are wanted.
        Returns float32 [batch, n, vocab], valid until the next call.
        """
        tokens = embeds.shape[1]
        end = int(starts.max()) + tokens
        if end > self.cache.max_length:
            raise OneVisionError(f"{end} tokens do not fit the KV cache of {self.cache.max_length}")
        binding = self._binding
        binding.input("inputs_embeds", embeds)
        binding.input("position_ids", starts[:, None] + np.arange(tokens))
        binding.input("write_indices", starts)
        binding.input("valid_length", np.array([self.graph.valid_length(end, self.cache.max_length)], np.int64))
        binding.input("logits_indices", rows)
        shape = (*rows.shape, self.vocab_size)
        if self._logits.shape != shape:
            size = rows.size * self.vocab_size
            if self._memory.size < size:
                self._memory = np.empty(size, np.float32)
            self._logits = self._memory[:size].reshape(shape)
        binding.output("logits", self._logits)
        binding.run()
        return self._logits

    def prefill(self, embeds: Rows, chunk: int, rows: np.ndarray | None = None, start: int = 0) -> np.ndarray:
        """Fill the cache of one sequence with its prompt, `chunk` tokens at a time, from the row `start` on.

        embeds: [tokens, D], of the whole prompt. rows: ascending int64 [n], the tokens whose logits are wanted.
        Returns float32 logits: [vocab] of the last token, or [n, vocab].
        """
        wanted = np.array([len(embeds) - 1]) if rows is None else rows
        chunk = min(chunk, self.graph.tokens_per_call or chunk)
        if rows is not None:
            chunk = min(chunk, self.graph.logits_per_call or chunk)
        collected = np.empty((len(wanted), self.vocab_size), np.float32)
        for place in range(start, len(embeds), chunk):
            part = embeds[place : place + chunk]
            first, last = np.searchsorted(wanted, (place, place + len(part)))
            here = wanted[first:last] - place if last > first else np.zeros(1, np.int64)  # some row, where none is
            logits = self(part.reshape((1, *part.shape)), np.array([place]), here[None])[0]
            collected[first:last] = logits[: last - first]
        return collected[-1] if rows is None else collected

    def teacher_forced(self, embeds: Rows, chunk: int, rows: np.ndarray, prompt: int) -> np.ndarray:
        """Fill the cache with a prompt as `prefill` does, then with the tokens behind it one by one, as decoding does.

        embeds: [tokens, D], of which the first `prompt` are the prompt's. rows: ascending int64 [n], the tokens whose
        logits are wanted. Returns float32 [n, vocab].
        """
        found = [self.prefill(embeds[:prompt], chunk, rows[rows < prompt])]
        wanted = set(rows.tolist())
        for place in range(prompt, len(embeds)):
            token = embeds[place : place + 1]
            logits = self(token.reshape((1, *token.shape)), np.array([place]), np.zeros((1, 1), np.int64))
            found += [logits[0].copy()] if place in wanted else []
        return np.concatenate(found)

"""One engine in a process of its own: JSON lines come on stdin, each has its answer on stdout.

    python -m cpu.worker cpu.llama:Text '{"model": "x.gguf", "threads": 2, "rows": 2304, "flash_attention": false}'

A first line tells seconds of loading, or what went wrong. A request names a method of the engine and its arguments;
its answer has the result and the most memory, in bytes, that was resident until then. Libraries print to stderr.
"""

import importlib
import inspect
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import Any, TextIO

import numpy as np

PATCH_DIM = 588


def seeded_ids(tokens: int, vocab_size: int, seed: int = 0) -> list[int]:
    """The same token ids for every engine."""
    return [int(i) for i in np.random.default_rng(seed).integers(0, vocab_size, tokens)]


def seeded_pixels(height: int, width: int) -> np.ndarray:
    """The same image for every engine, as pixel rows of a grid of patches: float32 [patches, patch_dim]."""
    return np.random.default_rng(0).standard_normal((height * width, PATCH_DIM), np.float32)


def merge_order(height: int, width: int) -> np.ndarray:
    """Row and column of each patch of a grid, the 2 x 2 of an image token together: int64 [patches, 2]."""
    grid = np.indices((height, width), np.int64).transpose(1, 2, 0)
    blocks = grid.reshape(height // 2, 2, width // 2, 2, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def scored_rows(path: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What a decoder reads for each row, float32 [tokens, D], and where it is scored, int64 [n]."""
    with np.load(path) as file:
        for i in range(len(file.files) // 2):
            yield file[f"embeds.{i}"], file[f"positions.{i}"]


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of a call."""
    started = perf_counter()
    action()
    return perf_counter() - started


class Reader:
    """The text half of a model, for engines that read some tokens behind those they have read."""

    vocab_size: int
    length = 0  # tokens read

    def read(self, ids: Sequence[int]) -> None:
        """Read tokens and compute logits of the last."""
        raise NotImplementedError

    def keep(self, tokens: int) -> None:
        """Forget what was read behind so many tokens."""
        raise NotImplementedError

    def last_logits(self) -> np.ndarray:
        """Of the token that was read last: float32 [vocab]."""
        raise NotImplementedError

    def prefill(self, tokens: int) -> float:
        """Seconds until a prompt is read and the first token known."""
        ids = seeded_ids(tokens, self.vocab_size)
        self._keep(0)
        return seconds(lambda: self._next(ids))

    def decode(self, context: int, steps: int) -> list[float]:
        """Seconds of greedy steps behind `context` tokens."""
        if self.length < context:
            self.prefill(context)
        self._keep(context)
        token, times = 0, []
        for _ in range(steps):
            started = perf_counter()
            token = self._next([token])
            times.append(perf_counter() - started)
        return times

    def logits(self, ids: list[int]) -> list[float]:
        """Of the last of some tokens."""
        self._keep(0)
        self._next(ids)
        return [float(value) for value in self.last_logits()]

    def _next(self, ids: Sequence[int]) -> int:
        self.read(ids)
        self.length += len(ids)
        return int(self.last_logits().argmax())

    def _keep(self, tokens: int) -> None:
        if tokens < self.length:
            self.keep(tokens)
            self.length = tokens


def _answer(action: Callable[[], Any]) -> str:
    """A line: what came of a call."""
    try:
        result = action()
    except Exception as error:  # peers raise what they like, and their failure is a result here
        return json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
    return json.dumps({"result": result, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})


def _load(name: str, options: dict[str, Any]) -> Any:
    """An engine, given those of the options that its constructor names."""
    module, kind = name.split(":")
    engine = getattr(importlib.import_module(module), kind)
    return engine(**{key: options[key] for key in inspect.signature(engine).parameters if key in options})


def serve(name: str, options: dict[str, Any], requests: TextIO, answers: TextIO) -> None:
    """Load an engine and answer requests until they end."""
    engine: list[Any] = []
    print(_answer(lambda: seconds(lambda: engine.append(_load(name, options)))), file=answers, flush=True)
    for line in requests if engine else ():
        request = json.loads(line)
        method = getattr(engine[0], request["method"])
        print(_answer(partial(method, *request["arguments"])), file=answers, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], json.loads(sys.argv[2]), sys.stdin, answers)

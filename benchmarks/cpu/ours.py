"""This package's own runtime, on ONNX Runtime or in the engine that `onevision-edge build` made."""

import numpy as np

import onevision_edge
from onevision_edge.runtime.generation import Timings
from onevision_edge.runtime.sampling import SamplingParams

from .worker import scored_rows, seconds, seeded_ids, seeded_pixels


class Model:
    """A bundle, without memory of earlier calls. engines: "cpu" for that engine, False for ONNX Runtime."""

    def __init__(self, model: str, threads: int, engines: str | bool = False) -> None:
        self.model = onevision_edge.load(model, threads=threads, engines=engines, image_cache=0, prefix_caches=0)
        self.vocab_size = self.model.config.text.vocab_size

    def prefill(self, tokens: int) -> float:
        """Seconds until a prompt is read and the first token known."""
        return self._tokens(tokens, 1)[0]

    def decode(self, context: int, steps: int) -> list[float]:
        """Seconds of greedy steps behind `context` tokens."""
        return self._tokens(context, steps + 1)[1:]

    def vision(self, height: int, width: int) -> float:
        """Seconds for one image."""
        pixels = seeded_pixels(height, width)
        return seconds(lambda: self.model.encode_images(pixels, np.array([[1, height, width]])))

    def first_token(self, height: int, width: int, tokens: int) -> float:
        """Seconds until an image and a prompt behind it are read and the first token known."""
        image = [self.model.config.image_token_id] * (height * width // self.model.config.vision.merge_unit)
        ids, pixels = np.array([image + seeded_ids(tokens, self.vocab_size)]), seeded_pixels(height, width)
        grid = np.array([[1, height, width]])
        return seconds(lambda: self.model.generate_ids(ids, pixels, grid, max_tokens=1, eos_token_id=[]))

    def logits(self, ids: list[int]) -> list[float]:
        """Of the last of some tokens."""
        return [float(value) for value in self.model.logits_at(np.array([len(ids) - 1]), np.array(ids))[0]]

    def score(self, rows: str, output: str) -> None:
        """Write logits of scored_rows, [positions, vocab]."""
        with self.model._loop(1) as loop:
            found = [loop.decoder.prefill(embeds, loop.chunk, at).copy() for embeds, at in scored_rows(rows)]
        np.save(output, np.concatenate(found))

    def embeddings(self, height: int, width: int) -> list[list[float]]:
        """What the tower gives for that image: [tokens, D]."""
        found = self.model.encode_images(seeded_pixels(height, width), np.array([[1, height, width]]))
        return [[float(value) for value in row] for row in found]

    def _tokens(self, context: int, count: int) -> list[float]:
        """Seconds of each new token, the first one's with the prompt's. Nothing is drafted: a step is a token."""
        ids = np.array(seeded_ids(context, self.vocab_size))
        (prompt,) = self.model._embed([ids], {})
        params = SamplingParams(max_tokens=count, ignore_eos=True, speculate=0)
        with self.model._loop(1) as loop:
            steps = loop.steps([self.model._sequence(prompt, params, ())], Timings())
            return [seconds(lambda: next(steps)) for _ in range(count)]

"""onnxruntime-genai."""

import json
from pathlib import Path

import numpy as np

from .worker import seconds, seeded_ids


class Text:
    """A folder of its model builder, with a cache of `rows` tokens; it computes logits of every token of a prompt."""

    def __init__(self, model: str, threads: int, rows: int) -> None:
        import onnxruntime_genai

        self.api, self.rows = onnxruntime_genai, rows
        config = onnxruntime_genai.Config(model)
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = onnxruntime_genai.Model(config)
        self.vocab_size = json.loads((Path(model) / "genai_config.json").read_text())["model"]["vocab_size"]

    def prefill(self, tokens: int) -> float:
        """Seconds until a prompt is read and the first token known."""
        self._restart()
        return seconds(lambda: self._first(seeded_ids(tokens, self.vocab_size)))

    def decode(self, context: int, steps: int) -> list[float]:
        """Seconds of greedy steps behind `context` tokens."""
        self.prefill(context)
        return [seconds(self.generator.generate_next_token) for _ in range(steps)]

    def logits(self, ids: list[int]) -> list[float]:
        """Of the last of some tokens."""
        self._restart()
        self.generator.append_tokens(np.array(ids, np.int32))
        return [float(value) for value in self.generator.get_logits().reshape(-1, self.vocab_size)[-1]]

    def _first(self, ids: list[int]) -> None:
        self.generator.append_tokens(np.array(ids, np.int32))
        self.generator.generate_next_token()

    def _restart(self) -> None:
        params = self.api.GeneratorParams(self.model)
        params.set_search_options(max_length=self.rows, do_sample=False)
        self.generator = self.api.Generator(self.model, params)

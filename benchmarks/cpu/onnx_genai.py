"""onnxruntime-genai."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .worker import scored_rows, seconds, seeded_ids


def configuration(folder: str) -> dict[str, Any]:
    """Of the model in a folder of the builder's."""
    found: dict[str, Any] = json.loads((Path(folder) / "genai_config.json").read_text())["model"]
    return found


class Text:
    """A folder of its model builder, with a cache of `rows` tokens; it computes logits of every token of a prompt."""

    def __init__(self, model: str, threads: int, rows: int) -> None:
        import onnxruntime_genai

        self.api, self.rows = onnxruntime_genai, rows
        config = onnxruntime_genai.Config(model)
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = onnxruntime_genai.Model(config)
        self.vocab_size = configuration(model)["vocab_size"]

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


class Scoring:
    """The builder's graph for embeddings, in ONNX Runtime: what the other does, from another input."""

    def __init__(self, model: str, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = f"{model}/model.onnx"
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        decoder = configuration(model)["decoder"]
        self.empty = np.empty((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)

    def score(self, rows: str, output: str) -> None:
        """Write logits of scored_rows, [positions, vocab]."""
        np.save(output, np.concatenate([self._logits(embeds)[at] for embeds, at in scored_rows(rows)]))

    def _logits(self, embeds: np.ndarray) -> np.ndarray:
        count = len(embeds)
        inputs = {"inputs_embeds": embeds[None], "attention_mask": np.ones((1, count), np.int64)}
        for value in self.session.get_inputs():
            if value.name.startswith("past_"):
                inputs[value.name] = self.empty
            elif value.name == "position_ids":
                inputs[value.name] = np.arange(count)[None]
        return self.session.run(["logits"], inputs)[0][0]

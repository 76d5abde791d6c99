"""OpenVINO: GenAI's pipeline, the same decoder called directly, and the tower."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .worker import Reader, merge_order, scored_rows, seconds, seeded_ids, seeded_pixels


def properties(threads: int, hint: str | None) -> dict[str, Any]:
    """Of a compiled model. hint: the precision to compute in, bf16 or f32; None for the default."""
    found = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    return {**found, "INFERENCE_PRECISION_HINT": hint} if hint else found


class Pipeline:
    """openvino_genai.LLMPipeline, as it is without options but the number of threads and the hint."""

    def __init__(self, model: str, threads: int, vocab_size: int, hint: str | None = None) -> None:
        import openvino_genai

        self.api, self.vocab_size, self.prompts = openvino_genai, vocab_size, 0
        self.pipeline = openvino_genai.LLMPipeline(model, "CPU", **properties(threads, hint))

    def prefill(self, tokens: int) -> float:
        """Seconds until a prompt is read and the first token known."""
        self.prompts += 1  # a new one each time: the pipeline knows again what it has read
        return self._tokens(seeded_ids(tokens, self.vocab_size, self.prompts), 1)[0]

    def decode(self, context: int, steps: int) -> list[float]:
        """Seconds of greedy steps behind `context` tokens."""
        return self._tokens(seeded_ids(context, self.vocab_size), steps + 1)[1:]

    def _tokens(self, ids: list[int], count: int) -> list[float]:
        """Seconds of each new token, the first one's with the prompt's."""
        import openvino

        rows = np.array([ids], np.int64)
        inputs = self.api.TokenizedInputs(openvino.Tensor(rows), openvino.Tensor(np.ones_like(rows)))
        config = self.api.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        raw = self.pipeline.generate(inputs, config).perf_metrics.raw_metrics
        return [microseconds / 1e6 for microseconds in (raw.m_times_to_first_token[0], *raw.m_durations)][:count]


class Stateful(Reader):
    """The decoder that the pipeline runs, before the pipeline changes it: logits of every token of a call."""

    def __init__(self, model: str, threads: int, vocab_size: int, hint: str | None = None) -> None:
        import openvino

        self.core, self.vocab_size = openvino.Core(), vocab_size
        self.model, self.properties = self.core.read_model(f"{model}/openvino_model.xml"), properties(threads, hint)
        self.request = self.core.compile_model(self.model, "CPU", self.properties).create_infer_request()

    def read(self, ids: Sequence[int]) -> None:
        end = self.length + len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.length, end)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer(inputs, share_inputs=True)

    def keep(self, tokens: int) -> None:
        """The state cannot be cut: it is read again."""
        self.request.reset_state()
        self.length = 0
        if tokens:
            self._next(seeded_ids(tokens, self.vocab_size))

    def last_logits(self) -> np.ndarray:
        return self.request.get_tensor("logits").data[0, -1]

    def score(self, rows: str, output: str) -> None:
        """Write logits of scored_rows, [positions, vocab]."""
        request = self.core.compile_model(self._reading_embeddings(), "CPU", self.properties).create_infer_request()
        found = []
        for embeds, positions in scored_rows(rows):
            count = len(embeds)
            inputs = {
                "inputs_embeds": embeds[None],
                "input_ids": np.zeros((1, count), np.int64),
                "attention_mask": np.ones((1, count), np.int64),
                "position_ids": np.arange(count)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            request.reset_state()
            request.infer(inputs)
            found.append(request.get_tensor("logits").data[0, positions].copy())
        np.save(output, np.concatenate(found))

    def _reading_embeddings(self) -> Any:
        """The model with an input in place of what it gathers for its ids, which it takes for their number."""
        from openvino import Type, opset13

        (gather,) = (op for op in self.model.get_ops() if op.get_friendly_name().endswith("embedding/Gather"))
        embeds = opset13.parameter([-1, -1, gather.get_output_partial_shape(0)[2].get_length()], Type.f32)
        embeds.output(0).set_names({"inputs_embeds"})
        for user in list(gather.output(0).get_target_inputs()):
            user.replace_source_output(embeds.output(0))
        self.model.add_parameters([embeds])
        self.model.validate_nodes_and_infer_types()
        return self.model


class Vision:
    """The tower, from OpenVINO's file or ONNX."""

    def __init__(self, model: str, threads: int, hint: str | None = None) -> None:
        import openvino

        compiled = openvino.Core().compile_model(model, "CPU", properties(threads, hint))
        self.request = compiled.create_infer_request()

    def vision(self, height: int, width: int) -> float:
        """Seconds for one image."""
        inputs = {"pixel_values": seeded_pixels(height, width)[None], "patch_positions": merge_order(height, width)}
        return seconds(lambda: self.request.infer(inputs, share_inputs=True))

    def embeddings(self, height: int, width: int) -> list[list[float]]:
        """What it gives for that image: [tokens, D]."""
        self.vision(height, width)
        return self.request.get_output_tensor(0).data[0].tolist()

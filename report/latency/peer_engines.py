"""The text half of a model in the engines of peers.PEERS: each reads ids and gives the likeliest next one."""

import ctypes
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ...config import read_json
from ...errors import OneVisionError
from ..subject import TRANSFORMERS, Subject

_LLAMA_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_STORED = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}  # safetensors' names


class Transformers:
    """transformers.Qwen3ForCausalLM with the text half of a checkpoint, in the dtype that it is stored in."""

    def __init__(self, path: str, threads: int) -> None:
        import torch
        import transformers

        from ...export.checkpoint import Checkpoint

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.path, checkpoint = path, Checkpoint.open(path)
        self.dtype = _STORED[checkpoint.tensors["model.norm.weight"].dtype]
        text = asdict(checkpoint.config.text)
        rope = {"rope_type": "default", "rope_theta": text["rope_theta"]}
        config = transformers.Qwen3Config(**text, rope_parameters=rope, tie_word_embeddings=checkpoint.tied)
        names = [name for name in checkpoint.tensors if not name.startswith("visual.")]
        weights = {name: _tensor(checkpoint.read(name)) for name in names}
        self.bytes = sum(value.numel() * value.element_size() for value in weights.values())
        dtype = weights["model.norm.weight"].dtype
        load: Any = transformers.Qwen3ForCausalLM.from_pretrained
        self.model: Any = load(None, config=config, state_dict=weights, dtype=dtype).eval()
        self.config, self.vocab_size = config, int(config.vocab_size)
        arguments = inspect.signature(self.model.forward).parameters
        self.argument = "cache" if "cache" in arguments else "past_key_values"  # by transformers' version
        self.forget()

    def forget(self) -> None:
        """Begin a new text."""
        import transformers

        self.cache: Any = transformers.DynamicCache(config=self.config)

    def read(self, ids: Sequence[int]) -> int:
        """Read tokens; the likeliest next one."""
        import torch

        with torch.inference_mode():
            inputs = {"input_ids": torch.tensor([list(ids)]), self.argument: self.cache}
            found = self.model(**inputs, use_cache=True, logits_to_keep=1)
        return int(found.logits[0, -1].argmax())

    def describe(self, name: str) -> Subject:
        """For the record."""
        layers, hidden = self.config.num_hidden_layers, self.config.hidden_size
        return _subject(name, TRANSFORMERS, self.dtype, self.bytes, (layers, hidden, self.vocab_size))


class LlamaCpp:
    """A GGUF file in llama.cpp, by the C interface that llama-cpp-python loads."""

    def __init__(self, path: str, threads: int) -> None:
        self.path, self.api = path, import_module("llama_cpp")
        api = self.api
        self.log = api.llama_log_callback(_errors_alone)  # kept as long as llama.cpp may call it
        api.llama_log_set(self.log, None)
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self.model:
            raise OneVisionError(f"{path} is not a GGUF file that llama.cpp loads; what it said is above")
        params = api.llama_context_default_params()
        params.n_ctx = 0  # the model's own length
        params.n_threads = params.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise OneVisionError(f"{path}: llama.cpp has no memory for its context")
        self.call, self.memory = int(api.llama_n_batch(self.context)), api.llama_get_memory(self.context)
        self.vocab_size = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model)))

    def forget(self) -> None:
        """Begin a new text."""
        self.api.llama_memory_clear(self.memory, True)

    def read(self, ids: Sequence[int]) -> int:
        """Read tokens; the likeliest next one."""
        for start in range(0, len(ids), self.call):
            part = ids[start : start + self.call]
            tokens = (ctypes.c_int32 * len(part))(*part)  # the batch has its address alone
            if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(part))):
                raise OneVisionError(f"{self.path}: llama.cpp cannot read {len(ids)} tokens more")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def describe(self, name: str) -> Subject:
        """For the record."""
        text = ctypes.create_string_buffer(128)
        self.api.llama_model_desc(self.model, text, len(text))
        kind = text.value.decode(errors="replace")
        shape = (self.api.llama_model_n_layer(self.model), self.api.llama_model_n_embd(self.model), self.vocab_size)
        return _subject(name, "llama.cpp", _precision(kind), Path(self.path).stat().st_size, shape, kind)


class OpenVino:
    """A decoder that optimum-intel exported, with its state, in OpenVINO on the CPU."""

    def __init__(self, path: str, threads: int) -> None:
        openvino = import_module("openvino")
        self.path, self.config = Path(path), read_json(Path(path) / "config.json")
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        model = openvino.Core().read_model(str(self.path / "openvino_model.xml"))
        self.names = {name for port in model.inputs for name in port.get_names()}
        self.request = openvino.Core().compile_model(model, "CPU", properties).create_infer_request()
        self.vocab_size, self.length = int(self.config["vocab_size"]), 0

    def forget(self) -> None:
        """Begin a new text."""
        self.request.reset_state()
        self.length = 0

    def read(self, ids: Sequence[int]) -> int:
        """Read tokens; the likeliest next one."""
        end = self.length + len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.length, end)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({k: v for k, v in inputs.items() if k in self.names}, share_inputs=True)
        self.length = end
        return int(self.request.get_tensor("logits").data[0, -1].argmax())

    def describe(self, name: str) -> Subject:
        """For the record."""
        graph = self.path / "openvino_model.xml"
        found = set(re.findall(r'"(int4|int8)_\w*"', graph.read_text(errors="replace")))  # as nncf notes it
        kind = "int4" if "int4" in found else "int8-weight" if found else "mixed"
        shape = (int(self.config["num_hidden_layers"]), int(self.config["hidden_size"]), self.vocab_size)
        return _subject(name, "openvino", kind, graph.with_suffix(".bin").stat().st_size, shape)


def _tensor(values: np.ndarray) -> Any:
    """A PyTorch tensor, of BF16 too, which numpy does not have by itself."""
    import torch

    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _errors_alone(level: int, text: bytes, _: Any) -> None:
    """What llama.cpp logs: its errors, on stderr."""
    if level == _LLAMA_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def _precision(kind: str) -> str:
    """Of a GGUF file, by what llama.cpp calls it, such as "qwen3 4B Q4_0"."""
    found = re.search(r"\b(BF16|F16|F32|I?Q[48])", kind)
    names = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "Q4": "int4", "IQ4": "int4", "Q8": "int8-weight"}
    return names.get(found[1], "mixed") if found else "mixed"


def _subject(
    name: str, backend: str, precision: str, size: int, shape: tuple[int, int, int], note: str | None = None
) -> Subject:
    layers, hidden, vocab = shape
    model = {"vision_depth": 0, "layers": layers, "hidden_size": hidden, "vocab_size": vocab}
    kind = "transformers" if backend == TRANSFORMERS else "checkpoint"
    dtype = precision if precision in _STORED.values() else "mixed"
    return Subject(name, kind, backend, precision, dtype, size, None, {}, model, (note,) if note else ())

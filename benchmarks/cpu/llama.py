"""llama.cpp, by the C interface that llama-cpp-python loads."""

import ctypes
from collections.abc import Sequence

import numpy as np

from .worker import Reader, scored_rows


class Text(Reader):
    """A GGUF file in a context of `rows` tokens; else llama.cpp's defaults: batches of 512, keys and values in FP16."""

    def __init__(self, model: str, threads: int, rows: int, flash_attention: bool) -> None:
        import llama_cpp as api

        self.api = api
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = rows, threads, threads
        params.flash_attn_type = int(flash_attention)
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self.call = params.n_batch
        self.memory = api.llama_get_memory(self.context)
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def read(self, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), self.call):
            part = ids[start : start + self.call]
            tokens = (ctypes.c_int32 * len(part))(*part)  # the batch has its address alone
            if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(part))):
                raise RuntimeError("llama_decode failed")
        self.api.llama_synchronize(self.context)

    def keep(self, tokens: int) -> None:
        self.api.llama_memory_seq_rm(self.memory, 0, tokens, -1)

    def score(self, rows: str, output: str) -> None:
        """Write logits of scored_rows, [positions, vocab]."""
        np.save(output, np.concatenate([self._logits_at(*row) for row in scored_rows(rows)]))

    def _logits_at(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self.keep(0)
        batch = self.api.llama_batch_init(len(embeds), embeds.shape[1], 1)
        values = np.ascontiguousarray(embeds, np.float32)
        ctypes.memmove(batch.embd, values.ctypes.data, values.nbytes)
        batch.n_tokens = len(embeds)
        for i in range(len(embeds)):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = i, 1, 0
            batch.logits[i] = i in positions
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.api.llama_batch_free(batch)
        found = (self.api.llama_get_logits_ith(self.context, int(i)) for i in positions)
        return np.stack([np.ctypeslib.as_array(logits, (self.vocab_size,)).copy() for logits in found])

    def last_logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocab_size,))

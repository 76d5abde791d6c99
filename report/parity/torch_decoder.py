"""transformers' own Qwen3 as the decoder, filled with a checkpoint's weights."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ...config import TextConfig
from .probe import Probe, layer_stage
from .torch_stages import rows, watched
from .torch_weights import Filling, parameters_without_memory

_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"


class TorchDecoder:
    """One sequence at a time, from embeddings. Embeddings, streams and logits are float32 rows in numpy."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.stages = {layer_stage(i): layer for i, layer in enumerate(model.model.layers)}

    @classmethod
    def filled(cls, config: TextConfig, filling: Filling) -> "TorchDecoder":
        """Make the modules and read their weights. Raises OneVisionError."""
        tied = filling.checkpoint.tied
        with parameters_without_memory():
            model = Qwen3ForCausalLM(_qwen3_config(config, tied))
        names = {name: name for name, _ in model.named_parameters() if name != _HEAD or not tied}
        filling.fill(model, names)
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return cls(model)

    @torch.inference_mode()
    def embeddings(self, ids: np.ndarray, media: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Of ids (int64 [n]), with rows of `media` at `places`: [n, width], rounded as the model reads them."""
        embeds = self.model.model.embed_tokens(torch.tensor(ids))
        embeds[torch.from_numpy(places)] = torch.from_numpy(media).to(embeds.dtype)
        return rows(embeds)

    def trace(self, embeds: np.ndarray, probe: Probe) -> None:
        """Run a sequence through the layers and tell of each."""
        with watched(self.stages, probe):
            self._final(embeds)

    @torch.inference_mode()
    def logits(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits at `positions` of a sequence: [len(positions), vocab]."""
        return rows(self.model.lm_head(self._final(embeds)[torch.tensor(positions)]))

    @torch.inference_mode()
    def generate(self, embeds: np.ndarray, max_tokens: int, stop: Sequence[int], never: Sequence[int]) -> list[int]:
        """Greedy ids after a prompt, up to max_tokens or one of `stop`, which is left out; none of `never`."""
        prompt = self._tensor(embeds)
        new = self.model.generate(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.int64),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=list(stop) or None,
            pad_token_id=0,  # one sequence is never padded
            suppress_tokens=list(never),
        )
        ids = [int(token) for token in new[0]]
        return ids[:-1] if ids and ids[-1] in stop else ids

    @torch.inference_mode()
    def _final(self, embeds: np.ndarray) -> torch.Tensor:
        """What the head reads, [n, width]."""
        return self.model.model(inputs_embeds=self._tensor(embeds), use_cache=False).last_hidden_state[0]

    def _tensor(self, embeds: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(embeds).to(self.model.lm_head.weight.dtype)[None]


def _qwen3_config(config: TextConfig, tied: bool) -> Qwen3Config:
    """The fields bear transformers' names; version 5 itself moves rope_theta to where it wants it."""
    fields: dict[str, Any] = asdict(config) | {"tie_word_embeddings": tied, "attn_implementation": "sdpa"}
    return Qwen3Config(**fields)

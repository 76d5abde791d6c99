"""PyTorch in BF16: transformers' decoder, and the tower with fused attention."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .worker import Reader, merge_order, scored_rows, seconds, seeded_pixels


class Text(Reader):
    """transformers.Qwen3ForCausalLM with scaled-dot-product attention.

    compiled: by torch.compile, with a static cache of `rows` tokens, as transformers' documentation advises.
    """

    def __init__(self, model: str, threads: int, rows: int, compiled: bool = False) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.decoder = load(model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        config = self.decoder.config
        self.vocab_size, self.compiled = config.vocab_size, compiled
        self.forward = torch.compile(self.decoder.forward) if compiled else self.decoder.forward
        self.cache = (
            transformers.StaticCache(config, max_cache_len=rows)
            if compiled
            else transformers.DynamicCache(config=config)
        )

    def read(self, ids: Sequence[int]) -> None:
        import torch

        positions = torch.arange(self.length, self.length + len(ids))[None]
        with torch.inference_mode():
            inputs = {"input_ids": torch.tensor([ids]), "position_ids": positions, "past_key_values": self.cache}
            found = self.forward(**inputs, logits_to_keep=1)
        self.last = found.logits[0, -1]

    def keep(self, tokens: int) -> None:
        """A static cache is overwritten behind them."""
        if not self.compiled:
            self.cache.crop(tokens)
        for layer in self.cache.layers if self.compiled else ():
            layer.cumulative_length.fill_(tokens)

    def last_logits(self) -> np.ndarray:
        return self.last.float().numpy()

    def score(self, rows: str, output: str) -> None:
        """Write logits of scored_rows, [positions, vocab]."""
        import torch

        with torch.inference_mode():
            values = ((torch.from_numpy(embeds)[None].bfloat16(), at) for embeds, at in scored_rows(rows))
            found = [self.decoder(inputs_embeds=x, use_cache=False).logits[0, at] for x, at in values]
        np.save(output, torch.cat(found).float().numpy())


class Vision:
    """The tower, written out: SPEC of the model, section 2, as export/vision.py has it."""

    def __init__(self, model: str, threads: int, compiled: bool = False) -> None:
        import torch
        from safetensors import safe_open

        torch.set_num_threads(threads)
        self.weights: dict[str, Any] = {}
        for shard in sorted(Path(model).glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith("visual.")]  # noqa: SIM118
                self.weights |= {name.removeprefix("visual."): file.get_tensor(name).bfloat16() for name in names}
        self.hidden, self.half = self.weights["class_embedding"].numel(), self.weights["class_pos_emb"].shape[-1]
        self.depth = sum(name.endswith("attn.qkv.weight") for name in self.weights)
        self.forward = torch.compile(self._forward) if compiled else self._forward

    def vision(self, height: int, width: int) -> float:
        """Seconds for one image."""
        import torch

        pixels = torch.from_numpy(seeded_pixels(height, width)).bfloat16()
        positions = torch.from_numpy(merge_order(height, width)).float()
        with torch.inference_mode():
            return seconds(lambda: self.forward(pixels, positions))

    def embeddings(self, height: int, width: int) -> list[list[float]]:
        """What it gives for that image: [tokens, D]."""
        import torch

        pixels = torch.from_numpy(seeded_pixels(height, width)).bfloat16()
        with torch.inference_mode():
            return self.forward(pixels, torch.from_numpy(merge_order(height, width)).float()).float().tolist()

    def _forward(self, pixels: Any, positions: Any) -> Any:
        import torch
        from torch.nn.functional import gelu, linear

        x = linear(pixels, self.weights["patch_embed.proj.weight"].reshape(self.hidden, -1))
        x = self._norm(torch.cat([self.weights["class_embedding"].reshape(1, -1), x]), "pre_layernorm")
        frequencies = 10000.0 ** -(torch.arange(0, self.half, 2) / self.half)
        angles = (positions[:, :, None] * frequencies).reshape(-1, self.half)
        angles = torch.cat([self.weights["class_pos_emb"].float().reshape(1, -1), angles])
        rotation = angles.cos().bfloat16(), angles.sin().bfloat16()
        for i in range(self.depth):
            block = f"blocks.{i}"
            x = x + self._attention(self._norm(x, f"{block}.norm1"), f"{block}.attn", rotation)
            y = gelu(self._linear(self._norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            x = x + self._linear(y, f"{block}.mlp.fc2")
        x = self._norm(x[1:], "merger.ln_q").reshape(-1, 4 * self.hidden)
        return self._linear(gelu(self._linear(x, "merger.mlp.0")), "merger.mlp.2")

    def _attention(self, x: Any, name: str, rotation: tuple[Any, Any]) -> Any:
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        cos, sin = rotation
        parts = self._linear(x, f"{name}.qkv").reshape(len(x), 3, -1, 2 * self.half).permute(1, 2, 0, 3)
        q, k = (
            torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
            for a, b in (part.split(self.half, -1) for part in parts[:2])
        )
        y = scaled_dot_product_attention(q[None], k[None], parts[2][None])[0]
        return self._linear(y.transpose(0, 1).reshape(len(x), -1), f"{name}.proj")

    def _linear(self, x: Any, name: str) -> Any:
        from torch.nn.functional import linear

        return linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Any, name: str) -> Any:
        from torch.nn.functional import layer_norm

        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return layer_norm(x, weight.shape, weight, bias, 1e-5)

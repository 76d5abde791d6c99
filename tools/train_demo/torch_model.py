"""LLaVA-OneVision-1.5 in PyTorch: RICE-ViT tower, 2x2 merger, Qwen3 decoder, with the checkpoint's own names.

Images of one call share a size, so attention is dense inside each image and needs no mask. The decoder takes its
mask and positions from the caller (batches.py packs several questions behind one image).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower's shape; head_dim is hidden_size / num_heads."""

    depth: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    intermediate_size: int = 512
    patch_size: int = 14
    in_channels: int = 3
    spatial_merge_size: int = 2
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class TextConfig:
    """The decoder's shape."""

    vocab_size: int = 512
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6


@dataclass(frozen=True)
class Config:
    """The whole model's shape."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding in float32: x [..., heads, rows, d], angles [..., rows, d/2] -> float32."""
    cos, sin = angles.cos(), angles.sin()
    u, v = x.float().chunk(2, dim=-1)
    return torch.cat([u * cos - v * sin, v * cos + u * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention in float32: its CPU kernel's backward is twice as fast as bfloat16's (14 against 31 ms, 200 rows)."""
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v.float(), attn_mask=mask)


class VisionAttention(nn.Module):
    """Bidirectional attention inside one image; fused q | k | v, each head-major."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        images, rows, hidden = x.shape
        q, k, v = self.qkv(x).view(images, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = attend(rotate(q, angles), rotate(k, angles), v)
        return self.proj(y.transpose(1, 2).reshape(images, rows, hidden))


class VisionMLP(nn.Module):
    """fc2(gelu(fc1 x)), exact erf."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """A pre-norm block; its eps is 1e-5 whatever the config says, as published."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), angles)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A 14x14 convolution of stride 14, as a matmul over flattened patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.linear(pixel_values, self.proj.weight.flatten(1))


class Merger(nn.Module):
    """Four neighbouring patches -> one decoder row."""

    def __init__(self, config: VisionConfig, text_hidden: int) -> None:
        super().__init__()
        self.width = config.spatial_merge_size**2 * config.hidden_size
        self.ln_q = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, text_hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).reshape(x.shape[0], -1, self.width))


class VisionTower(nn.Module):
    """pixel_values [images, patches, 588] and patch_positions [patches, 2] -> [images, patches / 4, text hidden]."""

    def __init__(self, config: VisionConfig, text_hidden: int) -> None:
        super().__init__()
        head_dim = config.hidden_size // config.num_heads
        self.patch_embed = PatchEmbed(config)
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size) * 0.02)
        self.class_pos_emb = nn.Parameter(torch.randn(1, head_dim // 2) * 0.02)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config, text_hidden)
        inverse = 10000.0 ** (-torch.arange(head_dim // 4) * 4 / head_dim)
        self.register_buffer("inverse_frequencies", inverse, persistent=False)

    def angles(self, patch_positions: Tensor) -> Tensor:
        """[1 + patches, head_dim / 2]: the class token's learned angles, then row angles | column angles."""
        patches = (patch_positions[:, :, None] * self.inverse_frequencies).flatten(1)
        return torch.cat([self.class_pos_emb, patches])

    def forward(self, pixel_values: Tensor, patch_positions: Tensor) -> Tensor:
        patches = self.patch_embed(pixel_values)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = self.pre_layernorm(torch.cat([first, patches], dim=1))
        angles = self.angles(patch_positions)
        for block in self.blocks:
            x = block(x, angles)
        return self.merger(x[:, 1:])


class RMSNorm(nn.Module):
    """Computed in float32; the weight is multiplied after the cast back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm over head_dim of q and k, before the rotary embedding."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        hidden, d = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, hidden, bias=False)
        self.q_norm = RMSNorm(d, config.rms_norm_eps)
        self.k_norm = RMSNorm(d, config.rms_norm_eps)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (p(x).view(batch, tokens, -1, self.config.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q).transpose(1, 2), angles), rotate(self.k_norm(k).transpose(1, 2), angles)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(group, 1), v.transpose(1, 2).repeat_interleave(group, 1)
        y = attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A pre-norm Qwen3 layer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """inputs_embeds [batch, tokens, D], position_ids [batch, tokens], mask bool [batch, 1, tokens, tokens].

    Returns the rows after the final norm, shaped like inputs_embeds.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        inverse = config.rope_theta ** (-torch.arange(config.head_dim // 2) * 2 / config.head_dim)
        self.register_buffer("inverse_frequencies", inverse, persistent=False)

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        angles = position_ids[:, None, :, None] * self.inverse_frequencies
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x, angles, mask)
        return self.norm(x)


class LLaVAOneVision(nn.Module):
    """The model; `state_dict()` has exactly the published tensor names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision, config.text.hidden_size)
        self.model = Decoder(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.apply(_initialise)

    def hidden(
        self, input_ids: Tensor, image_mask: Tensor, image_embeds: Tensor, position_ids: Tensor, mask: Tensor
    ) -> Tensor:
        """The normed hidden rows [batch, tokens, D]; image_embeds [rows, D] fill image_mask in reading order."""
        embeds = self.model.embed_tokens(input_ids)
        embeds = embeds.masked_scatter(image_mask[..., None], image_embeds.to(embeds.dtype))
        return self.model(embeds, position_ids, mask)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5 * 0.7)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)

"""A checkpoint with modeling code of its own: the tower in PyTorch, with the released code's module names.

It has the released code's error with several segments, too: rows are gathered by offsets without class tokens.
"""

import json
from pathlib import Path

FILE = "modeling_remote.py"
AUTO_MAP = {"AutoConfig": "modeling_remote.RemoteConfig", "AutoModelForCausalLM": "modeling_remote.RemoteModel"}
RIGHT_OFFSETS, RELEASED_OFFSETS = "start + 1 + index", "start + 1"

MODELING = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN


class RemoteConfig(PretrainedConfig):
    model_type = "llavaonevision1_5"


def rotated(x, angles):
    angles = torch.cat([angles, angles], -1)[:, None]
    a, b = x.float().chunk(2, -1)
    return (x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, lengths, angles):
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        parts = zip(*(t.split(lengths) for t in (rotated(q, angles), rotated(k, angles), v)))
        attend = nn.functional.scaled_dot_product_attention
        out = [attend(*(t.transpose(0, 1)[None] for t in part))[0].transpose(0, 1) for part in parts]
        return self.proj(torch.cat(out).flatten(1))


class MLP(nn.Module):
    def __init__(self, width, inner, act):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, inner), ACT2FN[act], nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c["hidden_size"], 1e-5), nn.LayerNorm(c["hidden_size"], 1e-5)
        self.attn = Attention(c["hidden_size"], c["num_heads"])
        self.mlp = MLP(c["hidden_size"], c["intermediate_size"], c["hidden_act"])

    def forward(self, x, lengths, angles):
        x = x + self.attn(self.norm1(x), lengths, angles)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    def __init__(self, c, out):
        super().__init__()
        self.joined = c["hidden_size"] * c["spatial_merge_size"] ** 2
        self.ln_q = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.mlp = nn.Sequential(nn.Linear(self.joined, self.joined), nn.GELU(), nn.Linear(self.joined, out))

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.joined))


class PatchEmbed(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.shape = (-1, c["in_channels"], c["patch_size"], c["patch_size"])
        self.proj = nn.Conv2d(self.shape[1], c["hidden_size"], self.shape[2], self.shape[2], bias=False)

    def forward(self, x):
        return self.proj(x.view(self.shape)).flatten(1)


class Tower(nn.Module):
    def __init__(self, c, out):
        super().__init__()
        half = c["hidden_size"] // c["num_heads"] // 2
        self.merge = c["spatial_merge_size"]
        self.class_embedding = nn.Parameter(torch.zeros(c["hidden_size"]))
        self.class_pos_emb = nn.Parameter(torch.zeros(1, half))
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, half, 2).float() / half), persistent=False)
        self.patch_embed, self.pre_layernorm = PatchEmbed(c), nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.blocks = nn.ModuleList([Block(c) for _ in range(c["depth"])])
        self.merger = Merger(c, out)

    def angles(self, height, width):
        grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
        m = self.merge
        places = grid.view(height // m, m, width // m, m, 2).transpose(1, 2).reshape(-1, 2)
        return torch.cat([self.class_pos_emb, (places[:, :, None] * self.inv_freq).flatten(1)])

    def forward(self, hidden_states, grid_thw):
        sizes = [(h, w) for t, h, w in grid_thw.tolist() for _ in range(t)]
        counts = [h * w for h, w in sizes]
        patches = self.patch_embed(hidden_states).split(counts)
        x = torch.cat([row for part in patches for row in (self.class_embedding[None], part)])
        x, angles = self.pre_layernorm(x), torch.cat([self.angles(*size) for size in sizes])
        for block in self.blocks:
            x = block(x, [n + 1 for n in counts], angles)
        starts = [sum(counts[:i]) for i in range(len(counts))]
        begins = [OFFSETS for index, start in enumerate(starts)]
        return self.merger(torch.cat([x[at : at + n] for at, n in zip(begins, counts)]))


class RemoteModel(PreTrainedModel):
    config_class = RemoteConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.visual = Tower(config.vision_config, config.text_config["hidden_size"])
        self.post_init()
"""


def add_code(directory: Path, code: str = MODELING, offsets: str = RELEASED_OFFSETS) -> Path:
    """Give the checkpoint its modeling code."""
    (directory / FILE).write_text(code.replace("OFFSETS", offsets))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    return directory

"""The demo checkpoint's tokenizer: byte-level BPE with Qwen2's pre-tokenizer and special tokens, a small vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from questions import WORDINGS
from scenes import COLOURS
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_SIZE = 512  # 256 bytes, at most 248 merges, 8 special tokens
# Qwen2's rule; every digit is a token of its own.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ANSWERS = ("a {0} 7", "an {0} 7", "nothing", "the first", "the second", "{0} 7, {0} 7", "a {0} 7 and a {0} 7")
SLOTS = (*COLOURS, "7", "first", "second", "leftmost", "rightmost", "black", "white")
TURNS = ("You are a helpful assistant.", "system\n", "user\n", "assistant\n")


def corpus() -> list[str]:
    """Every wording of every question and answer: few words, each met often enough to become one token."""
    lines = [text.format(slot) for texts in (*WORDINGS.values(), ANSWERS) for text in texts for slot in SLOTS]
    return lines + [" ".join(f"{colour} {colour}" for colour in COLOURS)] * 4 + list(TURNS) * 20


def build() -> Tokenizer:
    """Train the BPE on `corpus`; any UTF-8 text can be encoded, at worst byte by byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCAB_SIZE - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    """tokenizer_config.json as Qwen2's tokenizer class reads it."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


# One turn is <|im_start|>role newline content <|im_end|> newline; a conversation without a system turn gets one.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == "image" or part.type == "image_url" or "image" in part -%}
        {{- "<|vision_start|><|image_pad|><|vision_end|>" -}}
      {%- elif part.type == "video" or "video" in part -%}
        {{- "<|vision_start|><|video_pad|><|vision_end|>" -}}
      {%- elif "text" in part -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0].role != "system" -%}
  {{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" -}}
{%- endif -%}
{%- for turn in messages -%}
  {{- "<|im_start|>" + turn.role + "\\n" + render(turn.content) + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(tokenizer_config(tokenizer), indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The token ids of `text`, int64 [tokens]; special tokens are recognised in it."""
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

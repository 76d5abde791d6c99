"""Text to token ids and back, and the streaming of text while its tokens are still coming.

Every checkpoint of the family has the byte-level BPE of Qwen2.5 (SPEC section 7): a token is a few bytes,
so one character may span several tokens, and a cut between two of them is no text yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import OneVisionError

_END_OF_TURN, _END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """The tokenizer of a checkpoint or bundle directory.

    `eos_token_ids` are those that generation_config.json and tokenizer_config.json name, and the ends of turn
    and text where the vocabulary has them: no single file can be relied on (SPEC section 7). `pad_token_id`
    is the configured one, else the end of text, or None. `chat_template` is the text of chat_template.jinja,
    else chat_template.json, else of tokenizer_config.json, or None. `special_ids` are what `decode` skips.
    """

    def __init__(self, backend: tokenizers.Tokenizer, files: dict[str, Any]) -> None:
        config, generation = files["tokenizer_config.json"], files["generation_config.json"]
        self._backend = backend
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self.eos_token_ids = tuple(
            dict.fromkeys(
                _ids(generation.get("eos_token_id")) + self._named(config.get("eos_token"), _END_OF_TURN, _END_OF_TEXT)
            )
        )
        pads = self._named(config.get("pad_token")) + _ids(generation.get("pad_token_id"))
        self.pad_token_id = next(iter(pads + self._named(_END_OF_TEXT)), None)
        self.chat_template = _chat_template(files)

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where present, the files beside it.

        Raises OneVisionError when tokenizer.json is missing, when a file is not what it should be, or when an
        added token would not get the id its file gives.
        """
        folder = Path(path)
        backend = _backend(folder / "tokenizer.json")
        names = ("tokenizer_config.json", "generation_config.json", "chat_template.json", "added_tokens.json")
        files: dict[str, Any] = {name: _json(folder / name) for name in names}
        files["chat_template.jinja"] = _text(folder / "chat_template.jinja")
        _add_missing(backend, _added_tokens(files), folder)
        return cls(backend, files)

    def _named(self, *tokens: Any) -> list[int]:
        """The ids of `tokens`, given as text or as {"content": text}, that the vocabulary has."""
        texts = [t.get("content") if isinstance(t, dict) else t for t in tokens]
        ids = [self.token_id(t) for t in texts if isinstance(t, str)]
        return [i for i in ids if i is not None]

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        """The id of exactly this token, or None."""
        return self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, in which special tokens count as such; none is added around it."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # what the library says of half a surrogate pair
            raise OneVisionError("the text cannot be encoded: it is not valid Unicode") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The token of this id, or None."""
        return self._backend.id_to_token(token_id)

    def to_json(self) -> str:
        """The vocabulary as a tokenizer.json has it, with the added tokens of the files beside it."""
        return self._backend.to_str()

    def has_text(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether `decode` makes anything of this id: it has a token, and not one that is skipped."""
        if skip_special_tokens and token_id in self.special_ids:
            return False
        return bool(self._backend.id_to_token(token_id))


class StreamDecoder:
    """Turns the tokens of one answer into text as they come, and ends it at the first stop string.

    What `push` and `finish` return together is `tokenizer.decode` of all ids, up to where the stop string
    that is complete first begins (of several that end at the same character, the longest). Returned text is
    final: a character whose bytes may still be coming, and text that a stop string may yet claim, wait.

    Only a window of the last 8 to 16 tokens is decoded, and what is new in it counted from its end. That is
    exact for byte-level BPE: UTF-8 decoding is in step again 3 bytes after any cut, and a character that
    waits has at most 3 bytes, one U+FFFD. 10 us per token on one EPYC core, however long the text is.
    """

    _KEPT = 8

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip_special_tokens: bool = True) -> None:
        self.stopped = False
        self.stop_string: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._known = 0  # characters of the window's text that were passed on
        self._held = ""  # passed on, but a stop string may begin in it
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Take one token; returns the text that became final, which is empty once stopped."""
        if self.stopped or not self._tokenizer.has_text(token_id, self._skip):
            return ""
        self._window.append(token_id)
        text = self._decode_window()
        complete = len(text) - text.endswith(_REPLACEMENT)
        fresh = text[self._known : complete]
        self._known = max(self._known, complete)
        self._slide(len(text) - self._known)
        return self._release(fresh)

    def finish(self) -> str:
        """The rest of the text, now that no token follows."""
        if self.stopped:
            return ""
        rest, self._known, self._window = self._decode_window()[self._known :], 0, []
        released = self._release(rest)
        held, self._held = self._held, ""
        self._pieces.append(held)
        return released + held

    def _decode_window(self) -> str:
        return self._tokenizer.decode(self._window, self._skip)

    def _slide(self, waiting: int) -> None:
        if len(self._window) >= 2 * self._KEPT:
            self._window = self._window[-self._KEPT :]
            self._known = len(self._decode_window()) - waiting

    def _release(self, fresh: str) -> str:
        """Pass `fresh` on, less what a stop string claims or may yet claim."""
        text = self._held + fresh
        found = [(start + len(s), start, s) for s in self._stop if (start := text.find(s)) >= 0]
        if found:
            _, keep, self.stop_string = min(found)
            self.stopped, self._held = True, ""
        else:
            keep = _undecided(text, self._stop)
            self._held = text[keep:]
        self._pieces.append(text[:keep])
        return text[:keep]


def _undecided(text: str, stop: tuple[str, ...]) -> int:
    """Where the longest end of `text` that begins a stop string starts; its length if none does."""
    first = len(text)
    for string in stop:
        start = text.find(string[0], max(0, len(text) - len(string) + 1))
        while 0 <= start < first:
            if string.startswith(text[start:]):
                first = start
            start = text.find(string[0], start + 1)
    return first


def _backend(file: Path) -> tokenizers.Tokenizer:
    text = _text(file)
    if text is None:
        raise OneVisionError(f"{file} is missing; the directory needs a tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower class
        raise OneVisionError(f"{file} is not a tokenizer: {error}") from None
    backend.no_truncation()  # a published file may carry the training run's settings
    backend.no_padding()
    for token in _listed_tokens(text):
        _check_id(backend, token["content"], token["id"], file)
    return backend


def _listed_tokens(text: str) -> list[dict[str, Any]]:
    """The added tokens of a sound tokenizer.json, without the 0.2 s that parsing a whole vocabulary takes."""
    start = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    return json.JSONDecoder().raw_decode(text, start.end())[0] if start else []


def _added_tokens(files: dict[str, Any]) -> dict[str, tuple[Any, bool]]:
    """The added tokens of the files beside tokenizer.json: text -> (id, special), in order of their ids."""
    decoder = files["tokenizer_config.json"].get("added_tokens_decoder") or {}
    tokens = {text: (i, False) for text, i in files["added_tokens.json"].items()}
    try:
        tokens |= {t["content"]: (int(i), bool(t.get("special"))) for i, t in decoder.items()}
        return dict(sorted(tokens.items(), key=lambda token: int(token[1][0])))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise OneVisionError("the added tokens in tokenizer_config.json or added_tokens.json are malformed") from None


def _add_missing(backend: tokenizers.Tokenizer, tokens: dict[str, tuple[Any, bool]], folder: Path) -> None:
    for text, (_, special) in tokens.items():
        if backend.token_to_id(text) is None:
            backend.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False)])
    for text, (i, _) in tokens.items():
        _check_id(backend, text, i, folder)


def _check_id(backend: tokenizers.Tokenizer, token: str, expected: int, where: Path) -> None:
    # The library numbers added tokens by itself and does not say when a file's id cannot be kept.
    if backend.token_to_id(token) != expected:
        actual = backend.token_to_id(token)
        raise OneVisionError(f"{where} gives token {token!r} the id {expected}, but the vocabulary puts it at {actual}")


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool)]


def _chat_template(files: dict[str, Any]) -> str | None:
    candidates = (
        files["chat_template.jinja"],
        files["chat_template.json"].get("chat_template"),
        files["tokenizer_config.json"].get("chat_template"),
    )
    template = next((c for c in candidates if c), None)
    if isinstance(template, list):  # several by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise OneVisionError(f"chat_template is a {type(template).__name__}; it must be text")
    return template


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise OneVisionError(f"{file} cannot be read: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    text = _text(file)
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OneVisionError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise OneVisionError(f"{file} must hold a JSON object")
    return value

"""Structured output: which tokens may come next, so that an answer follows a JSON schema, a regex or a list of choices.

Grammars, their parser and its limits are llguidance's (extra `grammar`). A token is masked before anything else looks
at its logit, so that penalties, filters, log-probabilities and drafts see the tokens that are allowed and no others.

Microseconds on one EPYC core, 151,936 logits, an answer of 150 tokens (`python benchmarks/constraint.py DIRECTORY`);
the model's first constraint takes 0.7 s, for its vocabulary:

                        to make    greedy token, free    under the constraint    worst
    JSON schema             757                     9                     128      317
    any JSON object         327                     9                     171      278
    regex                   590                     8                     115      124
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import OneVisionError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from .model import Model

_LARGEST = 200_000  # characters of a schema, a regex or all choices together
# White space between two parts of JSON: a blank, or a new line and its indentation. A model that does not know what to
# say says blanks, of which JSON itself allows as many as max_tokens.
_JSON = {"whitespace_pattern": r"\x20|\r?\n[\x20\t]{0,64}", "lenient": False, "coerce_one_of": False}
# A lexer's state takes 1 to 2 kB. The others are the library's: of the hostile grammars of tests and benchmark, none
# takes more than 0.3 s for a mask, or 150 MB, before it is refused.
_LIMITS = {"max_lexer_states": 50_000, "verbose_errors": False}
_REASONS = {
    "NoExtension": "nothing satisfies it",
    "NoExtensionBias": "nothing satisfies it",
    "ParserTooComplex": "it is too complex",
    "LexerTooComplex": "it is too complex",
}

_tokenizers: WeakKeyDictionary[Tokenizer, LLTokenizer] = WeakKeyDictionary()
_lock = threading.Lock()


class Constraint:
    """What the tokens of one answer have to follow, and how far it has come.

    vocab_size: of the logits, as many as `allowed` tells of. what: "the JSON schema", as messages call it.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, what: str) -> None:
        self.vocab_size, self._matcher, self._what = vocab_size, matcher, what
        self._check()

    def copy(self) -> Constraint:
        """One that has come as far, and goes on by itself."""
        return Constraint(self._matcher.deep_copy(), self.vocab_size, self._what)

    def allowed(self) -> np.ndarray:
        """Whether each token may come next: bool [vocab_size]. End tokens may where the answer is complete.

        Raises OneVisionError where the grammar takes more work than its limits allow.
        """
        mask = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0
        self._check()
        return mask

    def accept(self, token_id: int) -> None:
        """Go on by a token. Raises OneVisionError for one that is not allowed."""
        self._matcher.consume_token(token_id)
        self._check()

    def fitting(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens, from the first on, may follow each other."""
        return self._matcher.validate_tokens(list(token_ids))

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    @property
    def ended(self) -> bool:
        """Whether nothing but an end token may follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise OneVisionError(f"{self._what} cannot be followed: {_reason(self._matcher.get_error())}")


def json_schema(schema: dict[str, Any] | str, model: Model) -> Constraint:
    """Answers that are JSON and valid by `schema`, an object or its text.

    Raises OneVisionError for a schema that is wrong, contradicts itself, refers to another place or needs a keyword
    that is not supported, such as uniqueItems: an answer that comes is valid.
    """
    what = "the JSON schema"
    value = _schema(schema)
    try:
        text = _bounded(json.dumps(value), what)
        grammar = _llguidance().LLMatcher.grammar_from_json_schema(text, overrides=_JSON)
    except (ValueError, TypeError, RecursionError) as error:
        raise OneVisionError(f"{what} cannot be read: {_reason(str(error))}") from None
    return _constraint(grammar, model, what)


def json_object(model: Model) -> Constraint:
    """Answers that are any JSON object."""
    return json_schema({"type": "object"}, model)


def regex(pattern: str, model: Model) -> Constraint:
    """Answers that match `pattern` from their beginning to their end.

    The syntax is that of Rust's regex crate, as llguidance reads it: no look-around, no references back. Raises
    OneVisionError.
    """
    if not isinstance(pattern, str):
        raise OneVisionError(f"the regex is a {type(pattern).__name__}; it must be text")
    what = "the regex"
    return _constraint(_regex_grammar(_bounded(pattern, what), what), model, what)


def choice(options: Sequence[str], model: Model) -> Constraint:
    """Answers that are one of `options`, to the letter."""
    if isinstance(options, str) or not options or not all(isinstance(o, str) and o for o in options):
        raise OneVisionError("choices must be a list of texts, none of them empty")
    what = "the list of choices"
    _bounded("".join(options), what)
    return _constraint(_regex_grammar("|".join(map(_escaped, options)), what), model, what)


def _escaped(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _regex_grammar(pattern: str, what: str) -> str:
    try:
        return _llguidance().LLMatcher.grammar_from_regex(pattern)
    except UnicodeEncodeError:  # half a surrogate pair
        raise OneVisionError(f"{what} is not valid Unicode") from None


def _schema(schema: Any) -> dict[str, Any]:
    """A schema as an object, without the options of llguidance's own: they can ask for what is not JSON."""
    try:
        value = json.loads(_bounded(schema, "the JSON schema")) if isinstance(schema, str) else schema
    except (ValueError, RecursionError) as error:
        raise OneVisionError(f"the JSON schema is not JSON: {_reason(str(error))}") from None
    if not isinstance(value, dict):
        raise OneVisionError("the JSON schema must be a JSON object")
    return {key: part for key, part in value.items() if key != "x-guidance"}


def _bounded(text: str, what: str) -> str:
    if len(text) > _LARGEST:
        raise OneVisionError(f"{what} has {len(text)} characters; {_LARGEST} are allowed")
    return text


def _constraint(grammar: str, model: Model, what: str) -> Constraint:
    library, tokenizer = _llguidance(), _tokenizer(model)
    limits = library.LLParserLimits(**_LIMITS)
    matcher = library.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise OneVisionError(f"{what} cannot be used: {_reason(matcher.get_error())}")
    made = Constraint(matcher, tokenizer.vocab_size, what)
    made.allowed()  # a grammar that nothing satisfies shows at its first mask
    return made


def _tokenizer(model: Model) -> LLTokenizer:
    """The model's tokenizer as llguidance has it: made once, 1 s for 151,936 tokens."""
    own = model.tokenizer
    if own is None:
        raise OneVisionError(f"{model.bundle.directory} has no tokenizer.json, which structured output needs")
    with _lock:
        if own not in _tokenizers:
            _tokenizers[own] = _made(own, model.config.text.vocab_size, model.eos_token_ids)
        return _tokenizers[own]


def _made(own: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    ends = [i for i in eos_token_ids if own.token(i) is not None]
    try:
        return _llguidance().LLTokenizer(own.to_json(), n_vocab=vocab_size, eos_token=ends or None)
    except ValueError as error:
        raise OneVisionError(f"structured output cannot use this tokenizer: {_reason(str(error))}") from None


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise OneVisionError("structured output needs llguidance: pip install 'onevision-edge[grammar]'") from error
    return llguidance


def _reason(message: str) -> str:
    """One line of what the library says: a regex's fault stands behind a drawing of its place."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason is given"]
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return _REASONS.get(line, line if len(line) <= 200 else line[:200] + " ...")

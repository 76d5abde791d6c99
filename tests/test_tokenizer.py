import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from onevision_edge.errors import OneVisionError
from onevision_edge.runtime.tokenizer import StreamDecoder, Tokenizer

SPECIAL = [f"<|{name}|>" for name in ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad"]]
TEXT = "the quick brown fox says: hello hello 你好 你好, the end of the story, naïve café 👩‍🚀"


def byte_level_bpe():
    """Qwen's kind of tokenizer, with 300 tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT] * 3, trainer)
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([tokenizers.AddedToken("<tool>", special=False, normalized=False)])
    return backend


BACKEND = byte_level_bpe()


@pytest.fixture
def folder(tmp_path):
    BACKEND.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    BACKEND.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_directory(folder)


def write(folder, name, value):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


# --- text and ids ---------------------------------------------------------------------------------------


def test_text_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.encode("") == []
    assert len(tokenizer) == 307


def test_special_tokens_in_the_text_count_and_none_is_added(tokenizer):
    ids = tokenizer.encode("<|im_start|>a<|im_end|>")
    assert ids == [301, tokenizer.token_id("a"), 302]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a<|im_end|>"
    assert tokenizer.token_id("<|video_pad|>") is None


def test_settings_of_the_training_run_are_dropped(folder):
    saved = json.loads(BACKEND.to_str())
    saved["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 300,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    write(folder, "tokenizer.json", saved)
    assert Tokenizer.from_directory(folder).encode(TEXT) == BACKEND.encode(TEXT).ids


def test_half_a_surrogate_pair_is_an_error(tokenizer):
    with pytest.raises(OneVisionError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")


# --- the files of a directory ---------------------------------------------------------------------------


def test_a_lone_tokenizer_json_is_enough(tokenizer):
    assert tokenizer.eos_token_ids == (302, 300)
    assert tokenizer.pad_token_id == 300
    assert tokenizer.chat_template is None
    assert tokenizer.special_ids == set(range(300, 306))


def test_end_and_padding_are_united_from_all_files(folder):
    write(folder, "generation_config.json", {"eos_token_id": [7, 300], "pad_token_id": 9})
    write(folder, "tokenizer_config.json", {"eos_token": {"content": "<|vision_end|>"}, "pad_token": None})
    tokenizer = Tokenizer.from_directory(folder)
    assert tokenizer.eos_token_ids == (7, 300, 304, 302)
    assert tokenizer.pad_token_id == 9
    write(folder, "tokenizer_config.json", {"pad_token": "<|im_start|>"})
    assert Tokenizer.from_directory(folder).pad_token_id == 301


def test_chat_template_by_precedence(folder):
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "C"}]
    for name, value, expected in (
        ("tokenizer_config.json", {"chat_template": named}, "C"),
        ("chat_template.json", {"chat_template": "B"}, "B"),
        ("chat_template.jinja", "A", "A"),
    ):
        write(folder, name, value)
        assert Tokenizer.from_directory(folder).chat_template == expected


def test_added_tokens_from_the_files_beside(folder):
    listed = {"308": {"content": "<|b|>", "special": True}, "300": {"content": "<|endoftext|>"}}
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": listed})
    write(folder, "added_tokens.json", {"<|a|>": 307, "<|b|>": 308})
    tokenizer = Tokenizer.from_directory(folder)
    assert tokenizer.encode("<|a|><|b|>") == [307, 308]
    assert tokenizer.decode([307, 308]) == "<|a|>"


def broken(name, value, message):
    return pytest.param(name, value, message, id=f"{name}-{message[:20]}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        broken("tokenizer.json", "{", "is not a tokenizer: EOF"),
        broken("tokenizer.json", "[]", "is not a tokenizer: invalid type"),
        broken("tokenizer.json", {"model": {"type": "Other"}}, "is not a tokenizer"),
        broken("tokenizer_config.json", "{", "is not JSON"),
        broken("tokenizer_config.json", "[" * 100_000, "is not JSON"),
        broken("generation_config.json", "[1]", "must hold a JSON object"),
        broken("added_tokens.json", {"<|a|>": 400}, "the id 400, but the vocabulary puts it at 307"),
        broken("added_tokens.json", {"<|im_end|>": 301}, "the id 301, but the vocabulary puts it at 302"),
        broken("added_tokens.json", {"<|a|>": "x"}, "malformed"),
        broken("tokenizer_config.json", {"added_tokens_decoder": {"5": {}}}, "malformed"),
        broken("tokenizer_config.json", {"added_tokens_decoder": [1]}, "malformed"),
        broken("tokenizer_config.json", {"chat_template": 5}, "chat_template is a int; it must be text"),
    ],
)
def test_broken_files(folder, name, value, message):
    write(folder, name, value)
    with pytest.raises(OneVisionError) as caught:
        Tokenizer.from_directory(folder)
    assert message in str(caught.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(OneVisionError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(OneVisionError, match="cannot be read"):
        Tokenizer.from_directory(tmp_path)


def test_an_added_token_the_library_would_renumber_is_an_error(folder):
    saved = json.loads(BACKEND.to_str())
    saved["added_tokens"][-1]["id"] = 1_000
    write(folder, "tokenizer.json", saved)
    with pytest.raises(OneVisionError, match="'<tool>' the id 1000, but the vocabulary puts it at 306"):
        Tokenizer.from_directory(folder)


# --- streaming ------------------------------------------------------------------------------------------


def _byte_of(letter):
    # Printable Latin-1 stands for itself, the other bytes follow from U+0100 on, in order.
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return ord(letter) if ord(letter) < 256 else others[ord(letter) - 256]


BYTE_IDS = {_byte_of(c): BACKEND.token_to_id(c) for c in pre_tokenizers.ByteLevel.alphabet()}


def byte_ids(data):
    """One token per byte: what a byte-level model may say, UTF-8 or not."""
    return [BYTE_IDS[b] for b in data]


def stream(tokenizer, ids, stop=(), **options):
    decoder = StreamDecoder(tokenizer, stop, **options)
    pieces = [decoder.push(i) for i in ids]
    return [*pieces, decoder.finish()], decoder


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    pieces, decoder = stream(tokenizer, byte_ids("a👍é!".encode()))
    assert pieces == ["a", "", "", "", "👍", "", "é", "!", ""]
    assert decoder.text == "a👍é!"
    assert not decoder.stopped


def test_invalid_bytes_are_replaced_once_nothing_can_complete_them(tokenizer):
    # a truncated 3-byte character, then text; a stray continuation byte; a truncated character at the end
    pieces, _ = stream(tokenizer, byte_ids(b"\xe2\x82a\x80b\xf0\x9f"))
    assert pieces == ["", "", "\ufffda", "", "\ufffdb", "", "", "\ufffd"]


def test_special_tokens_are_skipped_even_inside_a_character(tokenizer):
    first, second = byte_ids("é".encode())
    ids = [301, first, 302, 299_999, second, 306, 302]
    assert stream(tokenizer, ids)[0] == ["", "", "", "", "é", "<tool>", "", ""]
    shown = "".join(stream(tokenizer, ids, skip_special_tokens=False)[0])
    assert shown == tokenizer.decode(ids, skip_special_tokens=False)
    assert "<|im_end|>" in shown


def test_a_stop_string_over_several_tokens_is_never_shown(tokenizer):
    pieces, decoder = stream(tokenizer, byte_ids(b"so END. more"), ["END."])
    assert pieces == ["s", "o", " ", *[""] * 10]
    assert decoder.stopped
    assert (decoder.text, decoder.stop_string) == ("so ", "END.")


def test_text_held_for_a_stop_string_is_released_when_it_does_not_come(tokenizer):
    assert stream(tokenizer, byte_ids(b"EN EE"), ["END"])[0] == ["", "", "EN ", "", "E", "E"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("xabcd", ["abcd", "bc"], "xa"),  # "bc" is complete first
        ("xabcd", ["cd", "abcd"], "x"),  # both end together: the longer
        ("aab", ["ab"], "a"),  # a false start
        ("abababc", ["ababc"], "ab"),
        ("stop", ["stop"], ""),
        ("ab", ["abc"], "ab"),  # never complete
        ("x\nUser: y", ["\nUser:", "\n\n"], "x"),
        ("é👍!", ["👍"], "é"),
    ],
)
def test_the_stop_string_that_is_complete_first_wins(tokenizer, text, stop, expected):
    for ids in (byte_ids(text.encode()), tokenizer.encode(text)):
        assert "".join(stream(tokenizer, ids, stop)[0]) == expected


def cut(text, stop):
    """The definition: at every character, does a stop string end here?"""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


BYTES = st.sampled_from([0x20, 0x61, 0x62, 0x63, 0x80, 0x82, 0x9F, 0xAC, 0xC3, 0xE2, 0xED, 0xF0, 0xFF])
IDS = st.one_of(BYTES.map(BYTE_IDS.__getitem__), st.integers(0, 310))


@settings(max_examples=400, deadline=None)
@given(st.lists(IDS, max_size=70), st.lists(st.text("abc \ufffd", min_size=1, max_size=5), max_size=3))
def test_pieces_join_to_the_text_up_to_the_stop_string(tokenizer, ids, stop):
    decoder, shown = StreamDecoder(tokenizer, stop), ""
    for n, i in enumerate(ids, 1):
        shown += decoder.push(i)
        certain = tokenizer.decode(ids[:n]).removesuffix("\ufffd")
        if not decoder.stopped:
            claimed = [k for s in stop for k in range(1, len(s)) if certain.endswith(s[:k])]
            assert shown == certain[: len(certain) - max(claimed, default=0)]
    shown += decoder.finish()
    assert shown == decoder.text == cut(tokenizer.decode(ids), stop)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_streams_through(tokenizer, text):
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)[0]) == tokenizer.decode(ids)


@pytest.mark.parametrize("data", [b"word " * 400, b"\xff" * 2000, b"\xe2\x82" * 1000, "👍".encode() * 500])
def test_a_token_costs_the_same_however_long_the_text(tokenizer, data, monkeypatch):
    ids, sizes = byte_ids(data), []
    expected, decode = tokenizer.decode(ids), tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, skip: (sizes.append(len(ids)), decode(ids, skip))[1])
    assert "".join(stream(tokenizer, ids)[0]) == expected
    assert max(sizes) == 16
    assert sum(sizes) < 14 * len(ids)


def test_leading_spaces_of_word_tokenizers(tmp_path):
    words = ["▁one", "▁two", "▁three", "s"]
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="s"))
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = [0, 1, 2, 3] * 10
    pieces, _ = stream(tokenizer, ids)
    assert pieces[:5] == ["one", " two", " three", "s", " one"]
    assert "".join(pieces) == tokenizer.decode(ids)

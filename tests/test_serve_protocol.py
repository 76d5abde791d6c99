"""What a body may say: strict JSON, strict types, OpenAI's fields that are refused or passed over; and fuzz."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import EXAMPLES, question, refused

from onevision_edge.runtime.sampling import SamplingParams
from onevision_edge.serve.errors import ApiError, without_paths
from onevision_edge.serve.protocol import IGNORED, REFUSED, ChatCall, Picture, read_chat, texts
from onevision_edge.serve.settings import Settings
from onevision_edge.serve.strict_json import MAX_DEPTH, parse

SETTINGS = Settings()


def refusal(value: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_chat(value, SETTINGS)
    return caught.value


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "Expecting value at line 1, column 1"),
        (b"\xff\xfe{", "not UTF-8 at byte 0"),
        (b'{"a": 1, "a": 2}', "the key 'a' is twice"),
        (b'[{"b": {"a": 1, "c": 0, "a": 2}}]', "the key 'a' is twice"),
        (b"NaN", "NaN is not"),
        (b"-Infinity", "-Infinity is not"),
        (b"1e999", "out of range"),
        (b"9" * 41, "41 digits"),
        (b"9" * 100_000, "digits"),
        (b'"\\ud800"', "half a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half a surrogate pair"),
        (b"[" * 100_000, "nested deeper than 64"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested deeper than 64"),
        (b'{"a": 1} x', "Extra data"),
        (b"\xef\xbb\xbf{}", "BOM"),
    ],
)
def test_json_that_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as caught:
        parse(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_json_that_is_read() -> None:
    depth = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse(depth) == json.loads(depth)
    assert parse(b'{"a": "\\ud83d\\ude00", "b": [1, 2.5, -0.0, null]}') == {"a": "😀", "b": [1, 2.5, 0.0, None]}


def test_all_that_a_body_can_say() -> None:
    body = question(
        model="onevision",
        max_completion_tokens=5,
        max_tokens=99,
        temperature=1,
        top_p=0.5,
        top_k=4,
        min_p=0.1,
        stop=["a", "b"],
        seed=3,
        logprobs=True,
        top_logprobs=2,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        ignore_eos=True,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        min_pixels=100,
        max_pixels=200,
        response_format={"type": "regex", "regex": "a+"},
        user="me",
        store=False,
        tools=[],
        logit_bias={},
        modalities=["text"],
    )
    call = read_chat(body, SETTINGS)
    assert call.params == SamplingParams(
        max_tokens=5,
        temperature=1.0,
        top_p=0.5,
        top_k=4,
        min_p=0.1,
        stop=("a", "b"),
        seed=3,
        logprobs=2,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        ignore_eos=True,
    )
    assert (call.choices, call.stream, call.include_usage, call.min_pixels, call.max_pixels) == (
        2,
        True,
        True,
        100,
        200,
    )
    assert call.response_format is not None
    assert call.response_format.regex == "a+"


def test_what_a_body_need_not_say() -> None:
    call = read_chat({"messages": [{"role": "user", "content": "Hi"}]}, SETTINGS)
    assert call == ChatCall([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=4096))


def test_roles_images_and_frames() -> None:
    shown = [
        {"type": "image_url", "image_url": {"url": "data:a", "detail": "low"}},
        {"type": "video_url", "video_url": {"url": ["data:b", "data:c"]}},
        {"type": "text", "text": "Compare."},
    ]
    returned = {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None, "annotations": []}
    call = read_chat(
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": shown}, returned]},
        SETTINGS,
    )
    assert [message["role"] for message in call.messages] == ["system", "user", "assistant"]
    image, video, text = call.messages[1]["content"]
    assert image == {"type": "image", "image": call.pictures[0]}
    assert video == {"type": "video", "video": call.pictures[1:], "nframes": 2}
    assert [(p.url, p.where, p.is_frame) for p in call.pictures] == [
        ("data:a", "messages[1].content[0].image_url.url", False),
        ("data:b", "messages[1].content[1].video_url.url[0]", True),
        ("data:c", "messages[1].content[1].video_url.url[1]", True),
    ]
    assert [place for place, _ in texts(call.messages)] == [
        "messages[0].content",
        "messages[1].content[2].text",
        "messages[2].content",
    ]
    assert text == {"type": "text", "text": "Compare."}


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"max_tokens": 1.0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": [1]}, "stop[0]", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"temperture": 1}, "temperture", "unknown_parameter"),
        ({"tools": [{}]}, "tools", "unsupported_parameter"),
        ({"tools": False}, "tools", "unsupported_parameter"),
        ({"functions": [{}]}, "functions", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "unsupported_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"link": "x"}}]}]},
            "messages[0].content[0].image_url.url",
            "missing_required_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]},
            "messages[0].content[0]",
            "invalid_value",
        ),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, "messages[0].content", None),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
        ({"response_format": {"type": "regex"}}, "response_format.regex", None),
        ({"response_format": {"type": "text", "regex": "a"}}, "response_format.regex", None),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], param: str, code: str | None) -> None:
    error = refusal(question() | changes)
    assert (error.status, error.param, error.code) == (400, param, code)
    assert param in error.message


def test_empty_stop_is_refused() -> None:
    assert "stop" in refusal(question(stop="")).message


def test_every_ignored_field_is_passed_over() -> None:
    assert read_chat(question() | {name: {"any": 1} for name in IGNORED}, SETTINGS).choices == 1


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("/a/b.txt is gone", "(a file of the server) is gone"),
        ("cannot read '/home/me/x y/z.onnx'", "cannot read '(a file of the server)'"),
        ("file:///etc/passwd", "(a file of the server)"),
        ("use image/png, 3/4, </s> or a / b", "use image/png, 3/4, </s> or a / b"),
    ],
)
def test_paths_are_not_told(message: str, told: str) -> None:
    assert without_paths(message) == told


# Values as they come, names as the protocol has them: most of a request is right, so that the rest is looked at.
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)
URLS = st.sampled_from(["data:,", "data:image/png;base64,AA==", "/etc/passwd", "file:///x", "http://a/b"]) | st.text()
PARTS = (
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text() | VALUES})
    | st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": URLS}) | VALUES})
    | st.fixed_dictionaries(
        {"type": st.just("video_url"), "video_url": st.fixed_dictionaries({"url": st.lists(URLS)}) | VALUES}
    )
    | VALUES
)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant"]) | LEAVES,
        "content": st.text() | st.lists(PARTS, max_size=4) | VALUES,
    },
    optional={"name": VALUES, "tool_calls": VALUES, "refusal": VALUES},
)
NAMES = (
    "model stream stream_options max_tokens n temperature top_p stop seed logprobs top_logprobs presence_penalty "
    "response_format top_k min_p max_pixels x"
)
FIELDS = dict.fromkeys([*REFUSED, *IGNORED, *NAMES.split()], VALUES)
BODIES = st.fixed_dictionaries({"messages": st.lists(MESSAGES, max_size=3) | VALUES}, optional=FIELDS) | VALUES


def check_read(value: Any) -> None:
    """Either a call in which nothing of the client stands where a path could, or an ApiError that can be sent."""
    if error := refused(lambda: read_chat(value, SETTINGS)):
        assert 400 <= error.status < 500
        json.dumps(error.body(), ensure_ascii=False).encode()
        return
    call = read_chat(value, SETTINGS)
    for message in call.messages:
        for item in message["content"] if isinstance(message["content"], list) else ():
            media = item.get("video") or [item.get("image")]
            assert item["type"] == "text" or all(isinstance(medium, Picture) for medium in media)


@settings(max_examples=EXAMPLES, deadline=None)
@given(BODIES)
def test_any_value_is_read_or_refused(value: Any) -> None:
    check_read(value)


@settings(max_examples=EXAMPLES, deadline=None)
@given(BODIES, st.data())
def test_any_bytes_are_read_or_refused(value: Any, data: st.DataObject) -> None:
    body = bytearray(json.dumps(value).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(body)))
        body[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    if error := refused(lambda: parse(bytes(body))):
        assert (error.status, error.code) == (400, "invalid_json")
    else:
        check_read(parse(bytes(body)))

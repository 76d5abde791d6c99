import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onevision_edge.errors import OneVisionError
from onevision_edge.runtime import chat
from onevision_edge.runtime.chat import Video, expand_placeholders, render

# Built like the templates published with Qwen2.5-VL: namespaces, add_vision_id, tests on the items' keys.
PUBLISHED_STYLE = """\
{% set seen = namespace(images=0, videos=0) %}{% for m in messages %}
{% if loop.first and m['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}
{{ m['content'] }}<|im_end|>
{% else %}
{% for c in m['content'] %}
    {%- if c['type'] == 'image' or 'image' in c or 'image_url' in c %}
        {%- set seen.images = seen.images + 1 %}
        {%- if add_vision_id %}Picture {{ seen.images }}: {% endif -%}
        <|vision_start|><|image_pad|><|vision_end|>
    {%- elif c['type'] == 'video' or 'video' in c %}
        {%- set seen.videos = seen.videos + 1 -%}
        <|vision_start|><|video_pad|><|vision_end|>
    {%- elif 'text' in c %}
        {{- c['text'] }}
    {%- endif %}
{%- endfor %}
<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def user(*items):
    return {"role": "user", "content": list(items)}


def text(value):
    return {"type": "text", "text": value}


def image(value="a.png"):
    return {"type": "image", "image": value}


SAY = [{"role": "user", "content": "hi"}]


# --- rendering ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, PUBLISHED_STYLE])
def test_conversation_with_media(template):
    messages = [
        user(image("a.png"), text(" What is it?\n"), {"type": "video", "video": "v.mp4"}, image("b.png")),
        {"role": "assistant", "content": "A 7.\n"},
        user(text("Sure?")),
    ]
    prompt = render(messages, template)
    assert prompt.text == (
        f"{SYSTEM}<|im_start|>user\n{IMAGE} What is it?\n{VIDEO}{IMAGE}<|im_end|>\n"
        "<|im_start|>assistant\nA 7.\n<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.images == ["a.png", "b.png"]
    assert prompt.videos == [Video("v.mp4")]


@pytest.mark.parametrize("template", [None, PUBLISHED_STYLE])
def test_own_system_turn_and_no_generation_prompt(template):
    messages = [{"role": "system", "content": "Be brief."}, *SAY]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert render(messages, template, add_generation_prompt=False).text == expected
    assert render(messages, template).text == expected + "<|im_start|>assistant\n"


def test_every_kind_of_image_is_handed_on_as_it_is(tmp_path):
    picture, array = Image.new("RGB", (2, 2)), np.zeros((2, 2, 3), np.uint8)
    url = "data:image/png;base64,AAAA"
    sources = ["a.png", tmp_path, b"\x89PNG", picture, array, url]
    items = [image(s) for s in sources]
    items += [{"type": "image_url", "image_url": url}, {"type": "image_url", "image_url": {"url": url}}]
    prompt = render([user(*items)], None)
    assert all(a is b for a, b in zip(prompt.images, [*sources, url, url], strict=True))
    assert prompt.text.count(IMAGE) == 8


def test_videos_with_sampling_and_as_frames():
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    prompt = render(
        [
            user(
                {"type": "video", "video": "a.mp4", "fps": 2},
                {"type": "video", "video": ["1.png", b"x"], "nframes": 2},
                {"type": "video", "video": frames},
            )
        ],
        None,
    )
    assert prompt.videos[:2] == [Video("a.mp4", fps=2), Video(["1.png", b"x"], nframes=2)]
    assert [f.shape for f in prompt.videos[2].source] == [(2, 2, 3)] * 3


def test_other_keys_and_roles_reach_the_template():
    template = "{% for m in messages %}{{ m.role }}:{{ m.name }}:{{ m.calls | tojson }};{% endfor %}"
    messages = [{"role": "tool", "content": "", "name": "é<x>", "calls": [{"a": 1.5}]}]
    assert render(messages, template).text == 'tool:é<x>:[{"a": 1.5}];'


def test_what_templates_may_use():
    template = (
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content | trim }}{% endfor %}"
        "{{ tools is none }} {{ {'a': '<é>'} | tojson }} {{ strftime_now('%Y') | length }}"
        "{% for n in [1, 2, 3] if n != 2 %} {{ loop.index }}/{{ loop.length }}{% else %}-{% endfor %}"
        "{{ messages[::-1][0].content.split('i')[0] }} {{ messages[0:1] | length }}{{ '=' * 3 }}{{ 2 ** 3 }}"
    )
    assert render([*SAY, *SAY], template).text == 'hiTrue {"a": "<é>"} 4 1/2 2/2h 1===8'


def test_the_media_do_not_reach_the_template():
    shown = render([user(image("/secret/a.png"))], "{{ messages | tojson }}<|image_pad|>").text
    assert shown == '[{"role": "user", "content": [{"type": "image"}]}]<|image_pad|>'


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=8), st.just(image())), max_size=8))
def test_text_is_rendered_verbatim(parts):
    items = [text(p) if isinstance(p, str) else p for p in parts]
    body = "".join(p if isinstance(p, str) else IMAGE for p in parts)
    prompt = render([user(*items)], None)
    assert prompt.text == f"{SYSTEM}<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
    assert len(prompt.images) == sum(isinstance(p, dict) for p in parts)


# --- placeholders in text -------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
@pytest.mark.parametrize("with_image", [False, True])
def test_a_placeholder_in_text_is_refused(token, with_image):
    items = [image()] * with_image + [text(f"see {token}")]
    place = f"messages[0].content[{len(items) - 1}].text contains {token}"
    for content, where in ((items, place), (f"a{token}", f"messages[0].content contains {token}")):
        with pytest.raises(OneVisionError) as caught:
            render([{"role": "user", "content": content}], None)
        assert where in str(caught.value)
    with pytest.raises(OneVisionError, match=r"messages\[0\].role contains"):
        render([{"role": token, "content": ""}], None)


def test_a_placeholder_formed_by_two_items_is_refused():
    with pytest.raises(OneVisionError, match=r"1 image placeholders \(<\|image_pad\|>\) for 0 images"):
        render([user(text("<|image"), text("_pad|>"))], None)


@pytest.mark.parametrize(
    ("template", "found"),
    [("no media", 0), ("<|image_pad|>" * 2, 2), ("{{ messages[0].x }}<|image_pad|>", 2)],
)
def test_a_template_with_other_placeholders_than_media_is_an_error(template, found):
    with pytest.raises(OneVisionError, match=rf"{found} image placeholders .* for 1 images"):
        render([{**user(image()), "x": "<|image_pad|>"}], template)


def test_other_placeholder_names():
    template = "{% for m in messages %}{% for c in m.content %}<img>{% endfor %}{% endfor %}<|image_pad|>"
    assert len(render([user(image(), image())], template, image_token="<img>").images) == 2
    with pytest.raises(OneVisionError, match=r"contains <img>"):
        render([{"role": "user", "content": "<img>"}], template, image_token="<img>")


# --- messages that are not ------------------------------------------------------------------------------

ITEM = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is list; it must be a list of at least one message"),
        ("hi", "messages is 'hi'; it must be a list"),
        ({"role": "user"}, "messages is dict; it must be a list"),
        (["hi"], "messages[0] is 'hi'; it must be an object"),
        ([{"content": "x"}], 'messages[0] has no "role"'),
        ([{"role": 3, "content": "x"}], "messages[0].role is 3; it must be text"),
        ([*SAY, {"role": "user"}], 'messages[1] has no "content"'),
        ([{"role": "user", "content": 5}], "messages[0].content is 5; it must be text or a list of items"),
        ([{"role": "user", "content": "x", "y": {1, 2}}], "messages[0].y is set; it must be a JSON value"),
        ([user("text")], f"{ITEM} is 'text'; it must be an object such as"),
        ([user(Image.new("L", (1, 1)))], f"{ITEM} is Image; it must be an object such as"),
        ([*SAY, *SAY, user({"type": "audio"})], "messages[2].content[0].type is 'audio'; it must be"),
        ([user({"type": ["text"]})], f"{ITEM}.type is list; it must be"),
        ([user({"text": "x"})], f'{ITEM} has no "type"'),
        ([user({"type": "text"})], f'{ITEM} has no "text"'),
        ([user({"type": "text", "text": 1})], f"{ITEM}.text is 1; it must be text"),
        ([user({"type": "text", "text": "a", "image": "b"})], f'{ITEM} has an unknown "image"; it can have'),
        ([user({"type": "image"})], f'{ITEM} has no "image"'),
        ([user({"type": "image", "image": None})], f'{ITEM} has no "image"'),
        ([user(image({"url": "x"}))], f"{ITEM}.image is dict; it must be a path, a data URL"),
        ([user(image(""))], f"{ITEM}.image is ''; it must be a path"),
        (
            [user({**image(), "max_pixels": 9})],
            f'{ITEM} has an unknown "max_pixels"; it can have type, image',
        ),
        ([user({"type": "image_url"})], f'{ITEM} has no "image_url"'),
        ([user({"type": "image_url", "image_url": {}})], f'{ITEM}.image_url has no "url"'),
        (
            [user({"type": "image_url", "image_url": {"url": 1}})],
            f"{ITEM}.image_url.url is 1; it must be text",
        ),
        ([user({"type": "video"})], f'{ITEM} has no "video"'),
        ([user({"type": "video", "video": []})], f"{ITEM}.video is list; it must be a path or a list of at"),
        (
            [user({"type": "video", "video": ["a", 1]})],
            f"{ITEM}.video[1] is 1; it must be a path, a data URL",
        ),
        ([user({"type": "video", "video": "v", "fps": 0})], f"{ITEM}.fps is 0; it must be"),
        ([user({"type": "video", "video": "v", "fps": float("nan")})], f"{ITEM}.fps is nan; it must be"),
        ([user({"type": "video", "video": "v", "nframes": True})], f"{ITEM}.nframes is True; it must be"),
        ([user({"type": "video", "video": "v", "nframes": 2, "fps": 1})], f"{ITEM} has both fps and nframes"),
    ],
)
def test_errors_name_the_place(messages, message):
    with pytest.raises(OneVisionError) as caught:
        render(messages, None)
    assert message in str(caught.value)


# --- hostile and broken templates -----------------------------------------------------------------------

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "failed in line 1: Expected an expression"),
        ("\n\n{{ 1 / }}", "failed in line 3"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{{ raise_exception('only one image') }}", "failed: only one image"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ messages[0].update({}) }}", "'update' of 'dict' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "failed: access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "'__init__' of 'type' object is unsafe"),
        ("{{ render.__globals__ }}", "'render' is undefined"),
        (ENDLESS, "does not end within 100,000 steps"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}", "recursion"),
        ("{{ range(100001) }}", "Range too big"),
        ("{{ '=' * 99999999 }}", "too large a value with *"),
        ("{{ 99999999 * [1] }}", "too large a value with *"),
        ("{{ 10 ** 9999999 }}", "too large a value with **"),
        ("{{ (2 ** 1000) * (2 ** 1000) }}", "too large a value with *"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "recursion"),
        ("{% set a = 'x' * 15000000 %}{{ a }}{{ a }}", "renders more than 16,000,000 characters"),
    ],
)
def test_templates_that_fail(template, message):
    with pytest.raises(OneVisionError) as caught:
        render(SAY, template)
    assert "chat template" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("attribute", ["__class__", "__init__", "_private"])
def test_no_private_attribute_has_a_value(attribute):
    for value in (
        "messages",
        "''",
        "range",
        "namespace()",
        "raise_exception",
        "strftime_now",
        "self",
        "loop",
    ):
        template = "{% for m in messages %}{{ " + f"({value}|attr('{attribute}'))|length" + " }}{% endfor %}"
        assert render(SAY, template).text == "0"
    assert render(SAY, "{% for m in messages %}{{ ''." + attribute + " }}{% endfor %}").text == ""


def test_a_slow_template_is_stopped(monkeypatch):
    monkeypatch.setattr(chat, "_MAX_SECONDS", 0.05)
    slow = "{% for i in range(9999) %}{% set x = range(99999) | sum %}{% endfor %}"
    with pytest.raises(OneVisionError, match=r"does not end within 100,000 steps and 0\.05 seconds"):
        render(SAY, slow)


# --- expansion ------------------------------------------------------------------------------------------


def test_placeholders_are_repeated_in_order():
    row = expand_placeholders([5, 9, 6, 8, 9, 9], 9, 8, [2, 1, 3], [4])
    assert row.dtype == np.int64
    assert row.tolist() == [5, 9, 9, 6, 8, 8, 8, 8, 9, 9, 9, 9]
    assert expand_placeholders([], 9, 8, [], []).tolist() == []
    assert expand_placeholders(np.array([9, 1]), 9, 8, np.array([3]), ()).tolist() == [9, 9, 9, 1]


@given(st.lists(st.tuples(st.sampled_from([0, 1, 9, 8]), st.integers(1, 5))))
def test_expansion_agrees_with_the_definition(pairs):
    counts = {token: [n for t, n in pairs if t == token] for token in (9, 8)}
    expected = [t for t, n in pairs for _ in range(n if t in counts else 1)]
    assert expand_placeholders([t for t, _ in pairs], 9, 8, counts[9], counts[8]).tolist() == expected


@pytest.mark.parametrize(
    ("images", "videos", "message"),
    [
        ([1], [1], "2 image placeholders (id 9) for 1 images"),
        ([1, 1, 1], [1], "2 image placeholders (id 9) for 3 images"),
        ([1, 1], [], "1 video placeholders (id 8) for 0 videos"),
        ([1, 0], [1], "every image needs at least one token; the counts are [1, 0]"),
    ],
)
def test_expansion_errors_name_both_numbers(images, videos, message):
    with pytest.raises(OneVisionError) as caught:
        expand_placeholders([9, 8, 9], 9, 8, images, videos)
    assert message in str(caught.value)

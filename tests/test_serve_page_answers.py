"""Answers on the server's page: as they stream, as Markdown, to a screen reader, and where something goes wrong."""

import threading
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import pytest
from serve_browser import CHROMIUM, DESK, Reader, chromium, readers
from serve_fake import Reply

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
Open = Callable[..., Reader]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    with readers(browser) as new:
        yield new


def shown(reader: Reader, text: str, size: int = 3) -> str:
    """The answer's elements after it streamed in pieces of `size` characters: tags and text without attributes."""
    reader.ask("Show", Reply(pieces=tuple(text[at : at + size] for at in range(0, len(text), size))))
    script = "(answer) => answer.innerHTML.replace(/<(\\w+) [^>]*>/g, '<$1>')"
    return str(reader.tab.locator(".answer").last.evaluate(script))


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("One\nline\n\nTwo", "<p>One\nline</p><p>Two</p>"),
        (
            "A **bold**, *thin*, __strong__ _word_",
            "<p>A <strong>bold</strong>, <em>thin</em>, <strong>strong</strong> <em>word</em></p>",
        ),
        ("snake_case_name and 2 * 3 * 4", "<p>snake_case_name and 2 * 3 * 4</p>"),
        ("**a `b**` c**", "<p><strong>a <code>b**</code> c</strong></p>"),
        ("\\*not\\* `a\\*b`", "<p>*not* <code>a\\*b</code></p>"),
        ("# Title #\ntext", "<h3>Title</h3><p>text</p>"),
        (
            "- a\n- b\n  - c\n- d",
            "<ul><li><span>a</span></li><li><span>b</span><ul><li><span>c</span></li></ul></li><li><span>d</span></li></ul>",
        ),
        ("3. a\n4. b\n\ntext", "<ol><li><span>a</span></li><li><span>b</span></li></ol><p>text</p>"),
        ("- a\n\n- b", "<ul><li><span>a</span></li><li><span>b</span></li></ul>"),
        ("- a\n1. b", "<ul><li><span>a</span></li></ul><ol><li><span>b</span></li></ol>"),
        ("```py\nx = '<b>'\n\n- y\n```\nend", "<pre><code>x = '&lt;b&gt;'\n\n- y</code></pre><p>end</p>"),
        ("```\nopen", "<pre><code>open</code></pre>"),
        ("> q\n> r\n\nend", "<blockquote><p>q\nr</p></blockquote><p>end</p>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        (
            "| a | b |\n|---|--:|\n| 1 | **2** |\n| x\\|y |",
            "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td><strong>2</strong></td></tr>"
            "<tr><td>x|y</td><td></td></tr></tbody></table></div>",
        ),
        ("a | b, or\n- c", "<p>a | b, or</p><ul><li><span>c</span></li></ul>"),
        (
            "<img src=x onerror=alert(1)> [a](javascript:b)",
            "<p>&lt;img src=x onerror=alert(1)&gt; [a](javascript:b)</p>",
        ),
        ("7 × 8 = 56 日本語 🙂", "<p>7 × 8 = 56 日本語 🙂</p>"),
    ],
)
def test_markdown_becomes_elements_and_everything_else_stays_text(opened: Open, text: str, html: str) -> None:
    assert shown(opened(), text) == html


def test_strange_markdown_takes_no_time(opened: Open) -> None:
    reader = opened()
    for text in (">" * 5000, "**" * 5000, "- " * 3000, "`" * 5001, "|" * 5000 + "\n" + "|-" * 2500, "[" * 5000):
        started = perf_counter()
        reader.ask("Show", Reply(pieces=(text,)))
        assert perf_counter() - started < 3
        assert reader.tab.locator(".said .problem").count() == 0


def test_text_as_html_is_refused_by_the_browser_itself(opened: Open) -> None:
    tried = "() => { try { document.body.innerHTML = '<b>x</b>'; return 'let in'; } catch (e) { return e.name; } }"
    tab = opened().tab
    assert tab.evaluate(tried) == "TypeError"


def test_text_streams_in_and_what_is_shown_stays_in_place(opened: Open) -> None:
    reader, held = opened(), threading.Event()
    reader.ask("One", Reply(pieces=("First paragraph.\n\nSecond", " goes on", " to its end."), held=held), wait=False)
    reader.tab.wait_for_selector(".answer >> text=Second goes on")
    first = reader.tab.query_selector(".answer p")
    assert reader.tab.locator(".turn").get_attribute("aria-busy") == "true"
    assert reader.tab.locator("#stop").is_visible()
    assert not reader.tab.locator("#send").is_visible()
    held.set()
    reader.settle()
    assert reader.text(".answer").endswith("Second goes on to its end.")
    assert first.evaluate("(p) => p.isConnected")
    assert reader.tab.locator("#send").is_visible()


def test_a_screen_reader_hears_the_answer_once(opened: Open) -> None:
    reader = opened()
    reader.tab.evaluate("""() => {
      window.heard = [];
      const region = document.getElementById("announced");
      new MutationObserver(() => { if (region.textContent) window.heard.push(region.textContent); })
        .observe(region, { childList: true, characterData: true, subtree: true });
    }""")
    reader.ask("One", Reply(pieces=tuple("an answer of many tokens")))
    assert reader.tab.evaluate("window.heard") == ["The answer is on its way.", "an answer of many tokens"]
    assert reader.tab.locator("#announced").get_attribute("role") == "status"
    live = reader.tab.locator("main [aria-live], main [role=log], main [role=status]")
    assert live.count() == 0


def test_the_page_follows_the_answer_until_the_reader_scrolls_back(opened: Open) -> None:
    reader, held = opened(), threading.Event()
    pieces = tuple(f"line {index}\n\n" for index in range(80))
    reader.ask("One", Reply(pieces=(*pieces, "end"), held=held), wait=False)
    reader.tab.wait_for_selector(".answer >> text=line 79")
    end = "(() => { const d = document.documentElement; return d.scrollHeight - d.clientHeight - d.scrollTop; })()"
    reader.tab.wait_for_timeout(100)
    assert reader.tab.evaluate(end) < 2
    reader.tab.mouse.move(600, 300)
    reader.tab.mouse.wheel(0, -1000)
    reader.tab.wait_for_selector("#latest:visible")
    held.set()
    reader.settle()
    assert reader.tab.evaluate(end) > 500
    box = reader.tab.locator("#composer").bounding_box()
    assert box["y"] + box["height"] == pytest.approx(DESK["height"], abs=1)  # it stays in sight


@pytest.mark.parametrize(
    ("reply", "sentence", "way"),
    [
        (Reply(status=400, message="the prompt is too long"), "the prompt is too long.", "Edit the question"),
        (
            Reply(status=413, message=""),
            "The images are together larger than the server takes: take fewer or smaller ones.",
            "Edit the question",
        ),
        (Reply(status=429, message="full"), "The server is busy and its queue is full.", "Ask again"),
        (
            Reply(status=503, message="draining"),
            "The server takes no new questions now: it is closing or starting.",
            "Ask again",
        ),
        (Reply(status=500, message="engine"), "The server failed (500). engine.", "Ask again"),
        (Reply(broken_after=1), "The connection was lost before the answer was complete.", "Ask again"),
        (Reply(error_after=1), "the engine failed.", "Ask again"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_a_way_on(opened: Open, reply: Reply, sentence: str, way: str) -> None:
    reader = opened()
    reader.ask("One", reply)
    assert reader.text(".said .problem").split("\n") == [sentence, way]
    assert reader.text(".answer") == ("" if reply.status != 200 else "A photo")
    reader.tab.locator(".said .problem button").click()
    if way == "Edit the question":
        assert reader.tab.input_value("#question") == "One"
        reader.tab.press("#question", "Enter")
    reader.tab.wait_for_selector(".answer >> text=six digits")
    assert reader.tab.locator(".turn").count() == 1
    assert reader.tab.locator(".said .problem").count() == 0
    assert len(reader.server.requests) == 2


def test_a_busy_server_is_left_alone_for_as_long_as_it_says(opened: Open) -> None:
    reader = opened()
    reader.ask("One", Reply(status=429, message="full", retry_after="1"))
    again = reader.tab.locator(".said .problem button")
    assert (again.inner_text(), again.is_disabled()) == ("Ask again in 1 s", True)
    reader.tab.wait_for_selector(".said .problem button:enabled")
    again.click()
    reader.settle()
    assert reader.text(".answer") == "A photo of six digits."


def test_a_key_that_is_not_accepted_is_entered_and_the_question_asked_again(opened: Open) -> None:
    reader = opened()
    reader.server.api_key = "sesame"
    reader.ask("One")
    assert reader.text(".said .problem") == "The server asks for an API key.\nEnter the key"
    reader.press("Enter the key")
    reader.tab.keyboard.type("sesame")
    reader.tab.keyboard.press("Enter")
    reader.tab.wait_for_selector(".answer >> text=six digits")
    assert reader.server.keys == ["Bearer sesame"]


def test_a_server_that_is_gone_is_told(opened: Open) -> None:
    reader = opened()
    reader.tab.context.set_offline(True)
    reader.ask("One")
    assert reader.text(".said .problem") == "The server cannot be reached.\nAsk again"
    assert reader.text(".said > div > .note") == "Without an answer, the question is left out of what follows."
    reader.tab.context.set_offline(False)
    reader.ask("Two")
    assert [message["content"] for message in reader.server.requests[0]["messages"]] == ["Two"]


def test_a_new_chat_ends_the_answer_under_way(opened: Open) -> None:
    reader = opened()
    reader.ask("One", Reply(pieces=("A ", "never"), held=threading.Event()), wait=False)
    reader.tab.wait_for_selector(".answer >> text=A")
    reader.press("New chat")
    assert reader.server.left.wait(5)
    assert reader.tab.locator(".turn").count() == 0
    assert reader.text("#announced") == "A new chat."  # not that the other was stopped
    reader.ask("Two")
    assert reader.text(".answer") == "A photo of six digits."
    assert [message["content"] for message in reader.server.requests[1]["messages"]] == ["Two"]


def test_a_question_that_is_edited_while_it_is_answered_takes_its_place(opened: Open) -> None:
    reader = opened()
    reader.ask("One", Reply(pieces=("First.",)))
    reader.ask("Two", Reply(pieces=("A ", "never"), held=threading.Event()), wait=False)
    reader.tab.wait_for_selector(".turn:last-child .answer >> text=A")
    reader.tab.get_by_role("button", name="Edit the question").first.click()
    reader.ask("One, differently")
    assert reader.server.left.wait(5)
    assert reader.tab.locator(".asked").all_inner_texts() == ["One, differently"]
    assert reader.text(".answer") == "A photo of six digits."
    assert [message["content"] for message in reader.server.requests[2]["messages"]] == ["One, differently"]


def test_a_long_answer_of_many_pieces_is_shown_as_it_comes(opened: Open) -> None:
    reader = opened()
    started = perf_counter()
    pieces = tuple(f"word{index}" + ("\n\n" if index % 40 == 39 else " ") for index in range(4000))
    reader.ask("One", Reply(pieces=pieces))
    assert perf_counter() - started < 8  # about 1 s alone on a core
    assert reader.tab.locator(".answer p").count() == 100


def test_an_answer_that_was_cut_by_its_limit_says_so(opened: Open) -> None:
    reader = opened()
    reader.ask("One", Reply(finish="length"))
    assert reader.text(".said .note") == "The answer reached its limit of tokens. The limit is in Settings."

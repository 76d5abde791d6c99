"""The report's page without a browser: one document, nothing fetched, everything escaped, gaps and all."""

import base64
import copy
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from report_records import latency_record, parity_record

from onevision_edge.errors import OneVisionError
from onevision_edge.report.page.page import page

LIMIT = 300_000  # bytes without the images
# What a record may leave null, wherever it is.
NULLABLE = {
    *("error", "own", "noise", "own_noise", "worst", "first_failed_stage", "failed_module", "median_first_divergent"),
    *("low", "high", "limit", "expected", "first_divergent", "margin", "gpu", "weights_sha256", "reference_text"),
    *("cold_start", "device", "profile", "bytes_per_token", "roofline_share", "memory_bandwidth", "snr_db", "image"),
}
VOID = {"meta", "link", "img", "input", "br"}


class Document(HTMLParser):
    """Tags with their attributes, text by tag, in order."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of a tag."""
        return [attributes for name, attributes in self.tags if name == tag]

    def values(self, name: str) -> list[str]:
        """An attribute's values in the whole document."""
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]


@pytest.fixture(scope="module")
def markup() -> str:
    return page(parity_record(3), latency_record(3))


@pytest.fixture(scope="module")
def document(markup: str) -> Document:
    return Document(markup)


def test_the_verdict_is_the_first_thing_said(document: Document) -> None:
    body = [words for tag, words in document.words if tag not in ("title", "style")]
    assert body[:2] == ["✕ FAIL", "1 of 3 candidates does not match demo-fp32"]
    assert ("title", "✕ FAIL: 1 of 3 candidates does not match demo-fp32") in document.words


def test_nothing_is_fetched(markup: str, document: Document) -> None:
    assert all(value.startswith("#") or value == "data:," for value in document.values("href"))
    assert all(value.startswith("data:image/") for value in document.values("src"))
    assert set(re.findall(r"https?:[^\s\"'<]*", markup)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import", markup)
    assert [attributes for attributes in document.all("script") if attributes] == []


def test_the_policy_knows_the_style_and_the_script_that_are_there(markup: str, document: Document) -> None:
    policy = next(a["content"] or "" for a in document.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; ")
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", markup, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not [name for _, attributes in document.tags for name in attributes if name == "style" or name[:2] == "on"]


def test_what_a_record_holds_is_escaped(markup: str, document: Document) -> None:
    assert markup.count("<script") == 1
    assert "<b>bold" not in markup
    said = [words for tag, words in document.words if tag == "h3"]
    assert "What does <script>alert('no')</script> & <b>bold</b> say?" in said
    assert ("ins", "something") in document.words


@pytest.mark.parametrize("place", ["name", "source", "why", "cell", "notes", "module", "line"])
def test_markup_anywhere_in_a_record_stays_text(place: str) -> None:
    evil = "\"'><script>alert(1)</script>"

    def poisoned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poisoned(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [evil] if key == place else [poisoned(v) for v in value]
        return evil if key == place and isinstance(value, str) else value

    said = page(poisoned(parity_record(3)), poisoned(latency_record(2)))
    assert said.count("<script") == 1
    assert said.count("\"'>") == 0


def test_links_lead_somewhere_and_names_are_given_once(document: Document) -> None:
    ids = document.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in document.values("href") if value != "data:,"} <= set(ids)
    assert {v for value in document.values("aria-labelledby") for v in value.split()} <= set(ids)
    assert set(document.values("for")) <= set(ids)
    assert {"verdicts", "frontier", "candidates", "questions", "latency", "profile", "files"} <= set(ids)


def test_tables_have_captions_and_rows_as_wide_as_their_header(markup: str) -> None:
    tables = re.findall(r"<table.*?</table>", markup, re.DOTALL)
    assert len(tables) == 1 + 3 * 4 + 2 * 2 + 2 + 4 * 2 + 4
    for table in tables:
        assert "<caption>" in table
        head, *rows = table.split("<tr>")[1:]
        count = len(re.findall('<th scope="col">', head))
        assert {len(re.findall(r"<t[hd][ >]", row)) for row in rows} == {count}


def test_images_have_words_and_every_input_a_label(markup: str, document: Document) -> None:
    assert all(attributes.get("alt") for attributes in document.all("img"))
    assert "Image 3 of 4 of row cjk" in document.values("alt")
    assert len(re.findall(r"<label><input", markup)) == len(document.all("input"))
    labelled = [a for a in document.all("svg") if a.get("role") == "img" and a.get("aria-hidden") != "true"]
    assert len(labelled) == 6 + 3 + 2
    assert all(attributes["aria-label"] for attributes in labelled)


def test_an_image_is_there_once_however_many_candidates_saw_it() -> None:
    assert page(parity_record(8), None).count("<img ") == page(parity_record(1), None).count("<img ") == 9


def test_other_images_are_left_out_and_that_is_said() -> None:
    record = parity_record(1, examples=1)
    record["candidates"][0]["examples"][0]["images"] = ["https://example.org/a.png", "data:image/svg+xml;base64,AAAA"]
    said = page(record, None)
    assert "<img" not in said
    assert "example.org" not in said
    assert "2 images in another format left out" in said


def test_eight_candidates_of_66_stages_are_below_the_limit() -> None:
    said = page(parity_record(8), latency_record(8))
    assert len(re.sub(r"data:image/[^\"]*", "", said).encode()) < LIMIT
    assert said.count('class="panel candidate"') == 8


def test_the_same_records_give_the_same_page(markup: str) -> None:
    assert page(parity_record(3), latency_record(3)) == markup


def test_one_record_is_enough_but_none_is_not() -> None:
    parity, latency = Document(page(parity_record(1), None)), Document(page(None, latency_record(2)))
    assert "latency" not in parity.values("id")
    assert ("title", "✓ PASS: demo-int8 matches demo-fp32") in parity.words
    assert "candidates" not in latency.values("id")
    assert ("title", "Latency of 3 subjects") in latency.words
    with pytest.raises(OneVisionError, match="give a parity record"):
        page(None, None)


@pytest.mark.parametrize("count", [0, 1, 2, 8])
def test_any_number_of_candidates(count: int) -> None:
    document = Document(page(parity_record(count), latency_record(count)))
    assert len([i for i in document.values("id") if i.startswith("candidate-")]) == count
    assert ("candidate" in document.values("id")) == (count > 1)  # what chooses one of them


def emptied(value: Any, key: str = "") -> Any:
    """A record with null wherever it may be."""
    if key in NULLABLE:
        return None
    if isinstance(value, dict):
        return {k: emptied(v, k) for k, v in value.items()}
    return [emptied(v) for v in value] if isinstance(value, list) else value


def hollow(record: Any) -> Iterator[Any]:
    """A record without one of its lists or mappings, each in turn."""
    for key, value in record.items():
        if isinstance(value, list | dict) and key not in ("subject", "candidates", "subjects", "reference"):
            yield {**record, key: type(value)()}
            yield {**record, key: None}


def test_a_record_with_gaps_is_a_page_without_numbers_that_are_none() -> None:
    said = page(emptied(parity_record(3)), emptied(latency_record(3)))
    words = " ".join(words for tag, words in Document(said).words if tag not in ("style", "script"))
    assert not re.search(r"\b(None|nan|NaN|inf|null)\b", words)
    assert "–" in words


def test_a_record_without_any_one_of_its_parts_is_a_page() -> None:
    parity, latency = parity_record(1), latency_record(1)
    pages = [page({**parity, "candidates": [c]}, None) for c in hollow(parity["candidates"][0])]
    pages += [page(record, None) for record in hollow(parity)]
    pages += [page(None, {**latency, "subjects": [s]}) for s in hollow(latency["subjects"][0])]
    cell = latency["subjects"][0]["cells"][0]
    for changed in hollow(cell):
        record = copy.deepcopy(latency)
        record["subjects"][0]["cells"] = [changed]
        pages.append(page(parity, record))
    assert len(pages) == 2 * (8 + 2 + 5 + 2)
    assert all(said.endswith("</html>\n") for said in pages)


def test_scripts_from_the_right_and_without_spaces(document: Document) -> None:
    assert ("h3", "ما هو المجموع الكلي؟") in document.words
    assert ("del", "八") in document.words
    assert all(a.get("dir") == "auto" for a in document.all("h3") if (a.get("id") or "").startswith("q-"))

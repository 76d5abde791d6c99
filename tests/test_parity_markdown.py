"""The parity report in Markdown: verdict first, whole tables, and text that stays text."""

import re

import pytest
from report_records import parity_record

from onevision_edge.report.page.parity_markdown import markdown, text


@pytest.mark.parametrize(
    ("count", "first"),
    [
        (0, "# Nothing was compared"),
        (1, "# ✓ PASS: demo-int8 matches demo-fp32"),
        (2, "# ✓ PASS: Both candidates match demo-fp32"),
        (3, "# ✕ FAIL: 1 of 3 candidates does not match demo-fp32"),
        (8, "# ✕ FAIL: 1 of 8 candidates does not match demo-fp32"),
    ],
)
def test_the_verdict_comes_first(count: int, first: str) -> None:
    assert markdown(parity_record(count)).splitlines()[0] == first


def test_every_table_is_whole() -> None:
    lines = markdown(parity_record(3)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    rules = [i for i, row in enumerate(rows) if set(row) <= set("|-: ")]
    assert len(rules) == 1 + 3 * 4 + 4  # verdicts; gates, metrics, differences and stages; files
    for start, stop in zip(rules, [*(rule - 1 for rule in rules[1:]), len(rows)], strict=True):
        assert len(set(widths[start - 1 : stop])) == 1
    assert sum("decoder.layers.18 |" in row for row in rows) == 3


def test_the_worst_candidate_is_named_with_its_reasons() -> None:
    lines = markdown(parity_record(8)).splitlines()
    reasons = [line for line in lines if line.startswith("- **")]
    assert reasons[0] == (
        "- **✕ FAIL demo-int4-broken**: kld 0.081 is more than 0.05; accuracy 0.7103 beside 0.94; "
        "departs at decoder.layers.18, self\\_attn.q\\_proj"
    )
    assert [line.split()[2] for line in reasons[1:]] == ["AMBIGUOUS"] * 3


def test_what_a_record_holds_is_text_and_no_markup() -> None:
    assert text("a|b *c* <i> & _d_ `e`") == r"a\|b \*c\* \<i\> \& \_d\_ \`e\`"
    assert text("one\n\n# two") == r"one<br>\# two"
    said = markdown(parity_record(3))
    assert r"\<script\>alert('no')\</script\>" in said
    assert not re.search(r"(?<!\\)<(?!/?(?:del|ins|details|summary)>)", said)
    assert r"\<i\><del>nothing</del><ins>something</ins>\</i\><ins> else</ins>" in said


def test_a_summary_is_html_and_escaped_as_such() -> None:
    record = parity_record(1)
    record["candidates"][0]["subject"]["name"] = "a_b <c>"
    said = markdown(record)
    assert "<summary>Every stage of a_b &lt;c&gt;</summary>" in said
    assert r"# ✓ PASS: a\_b \<c\> matches demo-fp32" in said


def test_answers_that_are_the_same_are_told_once() -> None:
    said = markdown(parity_record(3))
    assert "6 questions, 6 with an answer that differs; 6 shown." in said
    assert "- ✓ the same: demo-int8-weight, demo-int8" in said
    assert "### cjk (4 images): 画像には何がありますか?" in said
    assert "赤い九と青い<del>八</del><ins>三</ins>があります" in said

"""A report's directory: its records, the same in Markdown, and one page, all there or none."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import BundleWriter, writing
from .record import plain

PAGE, PARITY, LATENCY = "index.html", "parity.json", "latency.json"


@dataclass
class ReportWriter:
    """Files of a report on their way; a report without a directory is dropped."""

    writer: BundleWriter | None

    def parity(self, record: Mapping[str, Any], latency: Mapping[str, Any] | None = None) -> None:
        """Write a parity record, with a latency record on its page where there is one."""
        if self.writer is None:
            return
        from .page.page import page
        from .page.parity_markdown import markdown

        self._text(PARITY, json.dumps(plain(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        self._text("parity.md", markdown(record))
        self._text(PAGE, page(record, latency))

    def _text(self, name: str, text: str) -> None:
        assert self.writer is not None
        self.writer.path(name).write_text(text, "utf-8")
        self.writer.seal(name)


@contextmanager
def write_report(output: Path | None, overwrite: bool = False) -> Iterator[ReportWriter]:
    """A directory for a report, which appears when it is complete; None: nothing is written."""
    if output is None:
        yield ReportWriter(None)
        return
    with writing(output, overwrite, marker=PAGE, what="report") as writer:
        yield ReportWriter(writer)

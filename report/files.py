"""A report's folder: records as JSON, the same in Markdown, and one page that shows all that is there.

    parity.json   parity.md
    latency.json  latency.md
    index.html

Every file is written whole or not at all, the page last.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OneVisionError
from .record import read_json, write_json, write_text

PARITY, LATENCY, PAGE = "parity.json", "latency.json", "index.html"


def open_folder(folder: Path | None) -> None:
    """Make a report's folder before the work that fills it. Raises OneVisionError where it cannot be made."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OneVisionError(f"{folder} is no folder, and a report is one: give another place") from error
    except OSError as error:
        raise OneVisionError(f"{folder}: cannot be made: {error.strerror}") from error


def write_parity(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a parity record, and the page anew. Raises OSError."""
    from .page.parity_markdown import markdown

    write_json(folder / PARITY, record)
    write_text(folder / "parity.md", markdown(record))
    write_page(folder)


def write_latency(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a latency record, and the page anew. Raises OSError."""
    from .page.latency_markdown import markdown

    write_json(folder / LATENCY, record)
    write_text(folder / "latency.md", markdown(record))
    write_page(folder)


def write_page(folder: Path) -> None:
    """The page of the records in a folder."""
    from .page.page import page

    parity, latency = (read_json(folder / name) if (folder / name).is_file() else None for name in (PARITY, LATENCY))
    write_text(folder / PAGE, page(parity, latency))

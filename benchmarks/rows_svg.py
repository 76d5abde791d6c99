"""What the benchmarks' figures share: a title, a key, a scale, and a row for each case, as one SVG file."""

from html import escape

from onevision_edge.calibration.frontier_svg import STYLE

TOP, ROW, WIDTH = 92, 34, 760
_MORE = """
.join { stroke: var(--quiet); stroke-width: 1.5; }
.diamond { fill: var(--chosen); stroke: var(--paper); }
.reference { stroke: var(--line); stroke-dasharray: 5 4; }
.name { fill: var(--ink); }
"""


def bottom_of(rows: int) -> int:
    """Where the scale begins, below so many rows."""
    return TOP + ROW * rows


def middle_of(row: int) -> int:
    """The height of a row's marks."""
    return TOP + ROW * row + ROW // 2


def frame(title: str, rows: int) -> list[str]:
    """Everything before the marks; the last line that a figure adds is </svg>."""
    height = bottom_of(rows) + 52
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{_MORE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        text("title", 16, 28, title),
    ]


def text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    """Words at a place."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def upright(kind: str, x: float, bottom: int) -> str:
    """A line through all rows."""
    return f'<line class="{kind}" x1="{x:g}" y1="{TOP}" x2="{x:g}" y2="{bottom}"/>'


def join(start: float, stop: float, y: float) -> str:
    """A line from mark to mark."""
    return f'<line class="join" x1="{start:g}" y1="{y}" x2="{stop:g}" y2="{y}"/>'


def ring(x: float, y: float) -> str:
    """A mark."""
    return f'<circle class="mark" cx="{x:g}" cy="{y}" r="4.5"/>'


def diamond(x: float, y: float) -> str:
    """The mark that counts most."""
    return f'<path class="diamond" d="M{x:g} {y - 7:g}l7 7l-7 7l-7 -7z"/>'

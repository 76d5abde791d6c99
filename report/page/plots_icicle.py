"""A profile as an icicle: every part as wide as its share of the time, under what calls it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from html import escape
from itertools import count
from typing import Any

from .numbers import milliseconds, percent
from .plots import XMLNS, percents

_ROW = 24  # pixels of a level
_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+$")
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A node as drawn: where it starts and how wide it is, in parts of the whole; its level; its parent's index."""

    name: str
    seconds: float
    start: float
    share: float
    level: int
    parent: int | None


def folded(tree: Record) -> dict[str, Any]:
    """A tree in which children that only their number tells apart are one: 0 to 35 in layers become layers.*."""
    groups: dict[str, list[Record]] = {}
    for child in tree.get("children") or ():
        groups.setdefault(_NUMBER.sub("*", str(child["name"])), []).append(child)
    children = [_merged(name, group) for name, group in groups.items()]
    if len(children) == 1 and children[0]["name"].startswith("*"):
        return {**tree, "name": f"{tree['name']}.{children[0]['name']}", "children": children[0]["children"]}
    return {**tree, "children": children}


def _merged(name: str, nodes: Sequence[Record]) -> dict[str, Any]:
    """One node of several, what is below them merged by name; a lone one keeps its name."""
    below = [child for node in nodes for child in node.get("children") or ()]
    seconds = sum(node.get("seconds") or 0.0 for node in nodes)
    label = nodes[0]["name"] if len(nodes) == 1 else f"{name} ({len(nodes)})" if "*" in name else name
    return folded({"name": label, "seconds": seconds, "children": below})


def parts(tree: Record, most: int) -> list[Part]:
    """The `most` longest nodes of a tree, parents before children; what else a parent holds is left blank under it."""
    whole = tree.get("seconds") or 0.0
    if whole <= 0:
        return []
    order = count()
    heap: list[tuple[float, int, Record, float, int, int | None]] = [(-whole, next(order), tree, 0.0, 0, None)]
    found: list[Part] = []
    while heap and len(found) < most:
        _, _, node, start, level, parent = heappop(heap)
        found.append(Part(str(node["name"]), node["seconds"], start, node["seconds"] / whole, level, parent))
        for child in node.get("children") or ():
            if (child.get("seconds") or 0) > 0:
                heappush(heap, (-child["seconds"], next(order), child, start, level + 1, len(found) - 1))
                start += child["seconds"] / whole
    return found


def icicle(tree: Record, name: str, most: int = 80) -> str:
    """An SVG of a folded tree's longest nodes, as wide as the page leaves; empty where it took no time.

    The page's script widens the one that is pressed to the whole width.
    """
    found = parts(folded(tree), most)
    if not found:
        return ""
    height = _ROW * (1 + max(part.level for part in found))
    head = f'<svg {XMLNS} class="icicle" aria-label="Profile of {escape(name)}" width="100%"'
    return f'{head} height="{height}">{"".join(_drawn(found))}</svg>'


def _drawn(found: Sequence[Part]) -> Iterator[str]:
    for part in found:
        words = f"{part.name}: {milliseconds(1e3 * part.seconds)}, {percent(part.share)}"
        place = f'x="{percents(part.start)}" y="{_ROW * part.level}" width="{percents(part.share)}" height="{_ROW - 1}"'
        parent = "" if part.parent is None else f' data-up="{part.parent}"'
        yield f'<svg class="n l{part.level % 4}" {place}{parent}><title>{escape(words)}</title>'
        # A part this narrow has no room for its name until the page's script widens it, and writes it then.
        yield "<rect/></svg>" if part.share < 0.02 else f'<rect/><text x="4" y="16">{escape(part.name)}</text></svg>'

"""Where the time of a request goes: by module, as a tree and a table, and by operation."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime.model import Model
from .profile_sources import Timed, timed_operations

_LAYER = re.compile(r"\b(layers|blocks)\.\d+")


@dataclass(slots=True)
class Total:
    """Seconds, and how often they were spent."""

    seconds: float = 0.0
    calls: int = 0

    def add(self, one: Timed) -> None:
        """Count an operation."""
        self.seconds += one.seconds
        self.calls += one.calls


def profile(model: Model, backend: str, threads: int | None, run: Callable[[Model], Any]) -> dict[str, Any]:
    """The profile of one request, which `run` makes of a model; a first one warms up. Raises OneVisionError.

    backend: what runs the model. On ONNX Runtime it is loaded once more, to be looked into.
    """
    return summary(backend, timed_operations(model, backend, threads, run))


def summary(source: str, operations: Sequence[Timed]) -> dict[str, Any]:
    """A profile as plain data. operations: in any order; a module and operation may come several times."""
    by_module = totals(operations, lambda one: _LAYER.sub(r"\1.*", one.module))
    by_operation = totals(operations, lambda one: one.operation)
    return {
        "source": source,
        "seconds": sum(one.seconds for one in operations),
        "tree": tree(operations),
        "operations": [{"operation": name, "seconds": t.seconds, "calls": t.calls} for name, t in by_operation],
        "modules": [{"module": name, "seconds": t.seconds, "calls": t.calls} for name, t in by_module],
    }


def totals(operations: Iterable[Timed], key: Callable[[Timed], str]) -> list[tuple[str, Total]]:
    """Sums by a key, the longest first."""
    found: dict[str, Total] = {}
    for one in operations:
        found.setdefault(key(one), Total()).add(one)
    return sorted(found.items(), key=lambda item: -item[1].seconds)


def tree(operations: Iterable[Timed]) -> dict[str, Any]:
    """Seconds by module path; a node's are those of all that is in it."""
    root: dict[str, Any] = {"name": "request", "seconds": 0.0, "children": []}
    for one in operations:
        node = root
        node["seconds"] += one.seconds
        for name in one.module.split("."):
            node = _child(node, name)
            node["seconds"] += one.seconds
    return root


def _child(node: dict[str, Any], name: str) -> dict[str, Any]:
    found = next((child for child in node["children"] if child["name"] == name), None)
    if found is None:
        found = {"name": name, "seconds": 0.0, "children": []}
        node["children"].append(found)
    return found

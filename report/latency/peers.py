"""Other engines that read the text half of a model, timed beside bundles: transformers, llama.cpp, OpenVINO.

Each is driven by its own Python package, with its defaults but for the number of threads. They have no tower here: in
place of an image they read as many tokens of text, so that their decode alone is compared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from ...errors import OneVisionError
from ...runtime.processor import physical_cores
from ..subject import Subject
from .cells import Cell, seeded_ids
from .metrics import DECODE, PREFILL, Request
from .peer_engines import LlamaCpp, OpenVino, Transformers
from .process import Contender

Clock = Callable[[], float]


class Reader(Protocol):
    """A text model that reads some tokens behind those it has read."""

    vocab_size: int

    def forget(self) -> None:
        """Begin a new text."""

    def read(self, ids: Sequence[int]) -> int:
        """Read tokens; the likeliest next one."""

    def describe(self, name: str) -> Subject:
        """For the record."""


@dataclass(frozen=True, slots=True)
class PeerRunner:
    """A peer, loaded. placeholders: tokens that stand for the image of a cell, by the cell's name."""

    name: str
    reader: Reader
    placeholders: Mapping[str, int]

    def subject(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """What was loaded, as the record has it."""
        found = self.reader.describe(self.name).to_dict()
        note = "text in place of images: it has no tower here"
        return {**found, "notes": [*found["notes"], *([note] if any(cell.images for cell in cells) else [])]}

    def request(self, cell: Cell, seed: int, clock: Clock = monotonic) -> Request:
        """Run a cell once. Raises OneVisionError for a batch."""
        if cell.batch > 1:
            raise OneVisionError(f"{self.name} is timed with one sequence: leave --batch at 1 beside it")
        tokens = self.placeholders.get(cell.name, 0) + cell.prompt_tokens
        ids: list[int] = seeded_ids(cell, tokens, self.reader.vocab_size, seed)[0].tolist()
        self.reader.forget()
        started, times = clock(), []
        for _ in range(cell.output_tokens):
            ids = [self.reader.read(ids)]
            times.append(clock() - started)
        return Request(started, {PREFILL: times[0], DECODE: times[-1] - times[0]}, [times], tokens)

    def device(self) -> None:
        """It runs on the CPU."""

    def profile(self, cell: Cell, seed: int) -> None:
        """Raises OneVisionError: it does not tell."""
        raise OneVisionError("it gives no access to the times of its operations")


@dataclass(frozen=True, slots=True)
class Peer:
    """How a peer is driven. modules: what must be importable; packages: what to install for that."""

    name: str
    modules: tuple[str, ...]
    packages: str
    reader: Callable[[str, int], Reader]

    def load(
        self, path: str, name: str, threads: int | None = None, placeholders: Mapping[str, int] | None = None
    ) -> PeerRunner:
        """The peer with a model. Raises OneVisionError where it cannot load it."""
        try:
            reader = self.reader(path, threads or physical_cores())
        except OneVisionError:
            raise
        except Exception as error:  # peers raise what they like
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise OneVisionError(f"{self.name} cannot load {path}: {said}") from error
        return PeerRunner(name, reader, placeholders or {})

    def check(self) -> None:
        """Raise OneVisionError unless its packages are installed."""
        missing = [name for name in self.modules if find_spec(name) is None]
        if missing:
            raise OneVisionError(
                f"{self.name} is not installed here (no {', '.join(missing)}): pip install {self.packages}"
            )


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "transformers", ("torch", "transformers", "ml_dtypes"), "'onevision-edge[reference,export]'", Transformers
        ),
        Peer("llama.cpp", ("llama_cpp",), "llama-cpp-python", LlamaCpp),
        Peer("openvino", ("openvino",), "openvino", OpenVino),
    )
}


def peer_contender(option: str, name: str, threads: int | None, placeholders: Mapping[str, int]) -> Contender:
    """A peer to be timed under a name, from PEER=PATH. Raises OneVisionError where one of them is not there."""
    kind, _, path = option.partition("=")
    if kind not in PEERS or not path:
        raise OneVisionError(f"--peer {option}: give {', '.join(f'{name}=PATH' for name in PEERS)}")
    PEERS[kind].check()
    if path != "demo" and not Path(path).exists():
        raise OneVisionError(f"--peer {option}: {path} does not exist")
    return Contender(name, kind, (path, name, threads, dict(placeholders)))

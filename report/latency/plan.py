"""Who is timed, and on what: bundles and peers by name, and cells that all of them take."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...bundle import Bundle
from ...runtime.images import ImageProcessor
from ...runtime.prompts import image_processor
from ..subject import names, numbered
from .bench import bundle_contender
from .bundle import image_tokens
from .cells import Cell, Size, default_size
from .peers import peer_contender
from .process import Contender


def open_bundles(paths: Sequence[Path]) -> dict[str, Bundle]:
    """Bundles by a name for each: its directory's, with as much of the path before it as tells them apart."""
    return dict(zip(names([path.resolve() for path in paths]), map(Bundle.open, paths), strict=True))


def common_size(bundles: Sequence[Bundle]) -> Size | None:
    """A size of image that all bundles take as it is; None where one has no tower."""
    if not all("vision" in bundle.manifest.graphs for bundle in bundles):
        return None
    processors = [_processor(bundle) for bundle in bundles]
    return min(default_size(each.max_pixels, each.factor) for each in processors)


def contenders(
    bundles: Mapping[str, Bundle],
    peers: Sequence[str],
    cells: Sequence[Cell],
    threads: int | None = None,
    engines: str | bool | None = None,
) -> list[Contender]:
    """Bundles and then peers (PEER=PATH), which read as many tokens as the first bundle does. Raises OneVisionError."""
    first = _processor(next(iter(bundles.values())))
    placeholders = {cell.name: image_tokens(first, cell) for cell in cells}
    found = [bundle_contender(bundle.directory, name, threads, engines) for name, bundle in bundles.items()]
    unique = numbered([*bundles, *(option.partition("=")[0] for option in peers)])[len(bundles) :]
    return found + [peer_contender(*each, threads, placeholders) for each in zip(peers, unique, strict=True)]


def _processor(bundle: Bundle) -> ImageProcessor:
    return image_processor(bundle.directory, bundle.manifest.model.vision)

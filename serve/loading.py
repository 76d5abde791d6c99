"""A bundle loaded to be served."""

import os

from ..engines.record import CPU
from ..runtime.model import Model, load
from ..runtime.processor import physical_cores


def load_to_serve(
    bundle: str | os.PathLike[str],
    *,
    threads: int | None = None,
    vision_threads: int | None = None,
    engines: str | bool | None = None,
) -> Model:
    """A bundle whose tower has threads of its own on a CPU, so that an image does not keep the decoder waiting.

    vision_threads: None for as many as the decoder's. The slots of a scheduler take the place of prefix caches.
    Raises OneVisionError.
    """
    if engines in (None, False, CPU):
        vision_threads = vision_threads or threads or physical_cores()
    return load(bundle, threads=threads, vision_threads=vision_threads, engines=engines, prefix_caches=0)

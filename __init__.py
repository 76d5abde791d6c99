"""LLaVA-OneVision-1.5 on edge devices: export, run, and know what you run.

onevision_edge.export(checkpoint, bundle)        checkpoint to ONNX graphs
onevision_edge.quantize(checkpoint, bundle, precision="int4")    the same, quantised and measured
onevision_edge.load(bundle).generate(messages)   questions about images to answers
onevision_edge.preprocess_images(images)         pixel rows as the vision graph takes them
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import OneVisionError

if TYPE_CHECKING:
    from .bundle import Bundle
    from .calibration.quantize import quantize
    from .export import export
    from .runtime.images import preprocess_images
    from .runtime.model import Generation, Model, load
    from .runtime.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "Generation",
    "Model",
    "OneVisionError",
    "SamplingParams",
    "export",
    "load",
    "preprocess_images",
    "quantize",
]

# Where each public name lives; it is imported when first used, so that importing the package costs nothing.
_HOMES = {
    "Bundle": ".bundle",
    "Generation": ".runtime.model",
    "Model": ".runtime.model",
    "SamplingParams": ".runtime.sampling",
    "load": ".runtime.model",
    "preprocess_images": ".runtime.images",
    "quantize": ".calibration.quantize",
}


def __getattr__(name: str) -> Any:
    if name == "export":  # the subpackage of that name, which can be called
        return import_module(".export", __name__)
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

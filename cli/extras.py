"""Packages that only some verbs need."""

from importlib import import_module

from ..errors import OneVisionError


def require(what: str, extra: str, *modules: str) -> None:
    """Raise OneVisionError, naming the extra to install, where a module that `what` needs is not there."""
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise OneVisionError(f"{what} needs {error.name}: pip install 'onevision-edge[{extra}]'") from error

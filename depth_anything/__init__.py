"""Depth Anything V2: models, inference and evaluation, with the code that trains them.

The public names load on first use, so that `import depth_anything` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "DepthAnything": "depth_anything.model.depth_anything",
    "load_model": "depth_anything.model.weights",
    "save_model": "depth_anything.model.weights",
    "Predictor": "depth_anything.inference.predictor",
}

__all__ = ["DepthAnything", "Predictor", "load_model", "save_model"]

if TYPE_CHECKING:
    from depth_anything.inference.predictor import Predictor
    from depth_anything.model.depth_anything import DepthAnything
    from depth_anything.model.weights import load_model, save_model


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)

"""Web demo that predicts the depth of an uploaded image."""

from depth_anything.demo.page import COLORMAPS, Limits, build_page, run_page, serve

__all__ = ["COLORMAPS", "Limits", "build_page", "run_page", "serve"]

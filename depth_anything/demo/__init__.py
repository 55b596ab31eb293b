"""A web page that maps the image it is given."""

from depth_anything.demo.page import COLORMAPS, Limits, build_page, run_page, serve

__all__ = ["COLORMAPS", "Limits", "build_page", "run_page", "serve"]

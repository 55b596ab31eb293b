"""A web page that maps the image it is given."""

from depth_anything.demo.page import COLOURS, Limits, build_page, running, serve

__all__ = ["COLOURS", "Limits", "build_page", "running", "serve"]

"""stage=teacher: train a large network on synthetic images with exact depth (paper §5.2, §7.1)."""

from depth_anything.training.base import DepthModule


class Teacher(DepthModule):
    """The teacher stage: ssi and gradient-matching losses, weighted 1 : 2, on the exact disparity of all pixels."""

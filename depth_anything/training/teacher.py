"""stage=teacher: a large network on synthetic images with exact depth (paper §5.2, §7.1)."""

from depth_anything.training.base import DepthModule


class Teacher(DepthModule):
    """The teacher's stage: ssi and gradient matching against exact disparity, 1 : 2, nothing trimmed."""

"""What metric.py and metric_focal.py share: the best constant depth, and networks and commands of this project."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from depth_anything import DepthAnything, Predictor
from depth_anything.data.sample import Frame

ROOT = Path(__file__).resolve().parents[1]
NEAR, FAR = 1e-3, 80.0
"""Range of the depths that are compared, meters."""


class Constant:
    """A baseline that says one depth, meters, of every pixel."""

    quantity = "depth"

    def __init__(self, depth: float) -> None:
        """Keep the depth."""
        self.depth = depth

    def predict_batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """The depth at the size of each (H,W,3) image, float32 (H,W)."""
        return [np.full(image.shape[:2], self.depth, np.float32) for image in images]


def best_constant(frames: Sequence[Frame]) -> float:
    """Find the depth of least mean AbsRel: a median of all truth, weighted by 1 / (truth · pixels of its image)."""
    depths = [frame.depth for frame in frames if frame.depth is not None]
    truths = [depth[(depth >= NEAR) & (depth <= FAR)].astype(np.float64) for depth in depths]
    values = np.concatenate(truths)
    weights = np.concatenate([1 / (truth * len(truth)) for truth in truths if len(truth)])
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def run(*command: str) -> None:
    """Run a command of this project and stop at its first failure."""
    print("$", shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def predictor(model: DepthAnything) -> Predictor:
    """Put a network on the CPU at the size it was trained at."""
    return Predictor(model, device="cpu", input_size=model.input_size)

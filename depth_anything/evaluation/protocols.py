"""Evaluation protocols of papers: which maps are aligned, and over which pixels and depths they are compared.

A figure means nothing without its protocol: one map of one image has an AbsRel of 0.05 by one and 0.2 by another. What
is fitted follows from the quantity that a model predicts. Sources: docs/evaluation.md names the code or paper of each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from depth_anything.evaluation.benchmarks.benchmark import Benchmark

Box = tuple[slice, slice]
"""Rows and columns of an image."""


@dataclass(frozen=True)
class EvalProtocol:
    """The rules by which maps are compared with depth in meters.

    Attributes:
        name: as tables and reports call it.
        fitted: the quantities that get one scale and shift per image, by least squares over the pixels compared: a
            disparity to 1 / truth, a depth to the truth. Depth that is not fitted is compared unchanged; disparity
            that is not fitted cannot be compared.
        min_depth: meters; nearer ground truth is not compared, nearer predictions are raised to it.
        max_depth: meters; farther ground truth (and sky) is not compared, farther predictions are lowered to it.
        open_interval: whether ground truth at exactly `min_depth` or `max_depth` is excluded.
        min_disparity: 1 / meters; smaller fitted disparities are raised to it before inversion. None: 1 / `max_depth`.
        min_disparity_from_truth: use 1 / the farthest truth compared in the image instead.
        fit_positive_only: whether a disparity is fitted only over the pixels where it is above zero.
        eval_crop: name in `CROPS`: the pixels compared; None: all.
        view_crop: name in `CROPS`: the part of the image shown to the model, to which `eval_crop` is applied.
        flip: whether the mean of the map and of the mirrored image's map, mirrored back, is compared.
        sharp: whether the ground truth is dense and sharp, so that `metrics.boundary_f1` is measured too.
    """

    name: str
    fitted: tuple[str, ...]
    min_depth: float = 1e-3
    max_depth: float = 80.0
    open_interval: bool = False
    min_disparity: float | None = None
    min_disparity_from_truth: bool = False
    fit_positive_only: bool = False
    eval_crop: str | None = None
    view_crop: str | None = None
    flip: bool = False
    sharp: bool = False

    @property
    def text(self) -> str:
        """The protocol in one sentence."""
        fits = [
            f"{quantity} fitted per image by least squares to {target}"
            for quantity, target in (("disparity", "1/truth"), ("depth", "truth"))
            if quantity in self.fitted
        ]
        parts = fits or ["nothing fitted"]
        if "disparity" in self.fitted:
            lowest = f"1/{self.max_depth:g} m" if self.min_disparity is None else f"{self.min_disparity:g}"
            lowest = "1/farthest truth" if self.min_disparity_from_truth else lowest
            parts.insert(1, f"raised to {lowest} and inverted")
        if self.view_crop:
            parts.append(f"images cropped to {self.view_crop}")
        if self.flip:
            parts.append("mean with the mirrored image")
        where = f" of the {self.eval_crop} crop" if self.eval_crop else ""
        if self.min_depth > 0 or self.max_depth < math.inf:
            parts.append(f"clipped to {self.min_depth:g}–{self.max_depth:g} m")
            compared = f"compared in depth over pixels{where} whose truth lies in that range"
        else:
            compared = f"compared in depth over all pixels{where} with truth"
        return f"{self.name}: {', '.join(parts)}, {compared}; means over images"

    def check_quantity(self, quantity: str) -> None:
        """Raise ValueError if predictions of this quantity cannot be compared."""
        if quantity == "classes":
            raise ValueError(
                "the set or benchmark holds depth, and a segmentation model predicts classes: use a set with class maps"
            )
        if quantity == "disparity" and "disparity" not in self.fitted:
            fitting = ", ".join(name for name, other in PROTOCOLS.items() if "disparity" in other.fitted)
            raise ValueError(
                f"protocol {self.name!r} compares meters and fits no disparity: "
                f"use a metric model, or a protocol that fits it ({fitting})"
            )

    def to_dict(self) -> dict[str, Any]:
        """The protocol under the field names of results.json, of cached rows and of best.json."""
        return {
            "name": self.name,
            "fitted": self.fitted,
            "min_depth": self.min_depth,
            "max_depth": self.max_depth,
            "strict": self.open_interval,
            "floor": self.min_disparity,
            "floor_at_truth": self.min_disparity_from_truth,
            "positive": self.fit_positive_only,
            "crop": self.eval_crop,
            "view": self.view_crop,
            "flip": self.flip,
            "sharp": self.sharp,
        }


PROTOCOLS = {
    "da2": EvalProtocol("da2", fitted=("disparity",)),
    "marigold": EvalProtocol(
        "marigold",
        fitted=("disparity", "depth"),
        open_interval=True,
        min_disparity=1e-3,
        fit_positive_only=True,
    ),
    "moge": EvalProtocol(
        "moge",
        fitted=("disparity",),
        min_depth=0.0,
        max_depth=math.inf,
        open_interval=True,
        min_disparity_from_truth=True,
    ),
    "zoedepth": EvalProtocol("zoedepth", fitted=(), open_interval=True, flip=True),
}
"""da2 reproduces the published NYU and KITTI figures within 7 %; it does not fit models of depth."""


def find_protocol(
    protocol: str | EvalProtocol, *, benchmark: Benchmark | None = None, max_depth: float | None = None
) -> EvalProtocol:
    """Look up a protocol by name, with the crops and depths that it has on a benchmark.

    Args:
        protocol: a name in `PROTOCOLS`, or rules of your own, which are the same on any benchmark.
        benchmark: with crops and depth limits for each protocol that is used on it.
        max_depth: meters, instead of theirs.

    Raises:
        ValueError: no such protocol, or the benchmark has no limits for it.
    """
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {protocol!r}; choose one of: {', '.join(PROTOCOLS)}")
        name, protocol = protocol, PROTOCOLS[protocol]
        if benchmark is not None:
            if name not in benchmark.depth_limits:
                used = ", ".join(benchmark.depth_limits) or "none"
                raise ValueError(f"protocol {name!r} is not defined on {benchmark.title}: use one of: {used}")
            limits = benchmark.depth_limits[name]
            protocol = replace(
                protocol,
                min_depth=limits.min_depth,
                max_depth=limits.max_depth,
                view_crop=limits.view_crop or None,
                eval_crop=limits.eval_crop or None,
                sharp=benchmark.sharp,
            )
    return protocol if max_depth is None else replace(protocol, max_depth=float(max_depth))


def garg_crop(height: int, width: int) -> Box:
    """KITTI's road and its surroundings: Garg et al. (arXiv 1603.04992)."""
    return _fraction_slice(height, 0.40810811, 0.99189189), _fraction_slice(width, 0.03594771, 0.96405229)


def eigen_kitti_crop(height: int, width: int) -> Box:
    """KITTI's pixels below the sky: Eigen et al. (arXiv 1406.2283)."""
    return _fraction_slice(height, 0.3324324, 0.91351351), _fraction_slice(width, 0.03594771, 0.96405229)


def eigen_nyu_crop(height: int, width: int) -> Box:
    """The common view of both cameras of NYUv2: rows 45 to 471, columns 41 to 601 of 480 by 640, in proportion."""
    return _fraction_slice(height, 45 / 480, 471 / 480), _fraction_slice(width, 41 / 640, 601 / 640)


def eigen_pixels_crop(height: int, width: int) -> Box:
    """Rows 45 to 471 and columns 41 to 601 of any size: ZoeDepth's crop of all indoor sets.

    In larger images this is the upper left part; in smaller images it is clipped.
    """
    return slice(min(45, height), min(471, height)), slice(min(41, width), min(601, width))


def kb_crop(height: int, width: int) -> Box:
    """The KITTI benchmark's 1216 by 352 pixels: at the bottom, in the middle."""
    if height < 352 or width < 1216:
        raise ValueError(f"the kb crop has 1216x352 pixels, more than {width}x{height}")
    left = (width - 1216) // 2
    return slice(height - 352, height), slice(left, left + 1216)


CROPS: dict[str, Callable[[int, int], Box]] = {
    "garg": garg_crop,
    "eigen_kitti": eigen_kitti_crop,
    "eigen_nyu": eigen_nyu_crop,
    "eigen_pixels": eigen_pixels_crop,
    "kb": kb_crop,
}
"""Name → function of height and width that gives the crop of that image."""


def _fraction_slice(length: int, low: float, high: float) -> slice:
    """The slice between two fractions of a length; 1e-9 absorbs the rounding of fractions such as 45 / 480."""
    return slice(int(low * length + 1e-9), int(high * length + 1e-9))

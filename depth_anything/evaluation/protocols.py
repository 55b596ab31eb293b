"""The rules by which papers compare depth, as named objects: what is fitted, where, and between which depths.

A figure means nothing without its rules: the same map of the same image has an AbsRel of 0.05 by one and 0.2 by
another. What is fitted follows from what a model says it gives, so that a wrong fit cannot be asked for.

Sources: docs/evaluation.md names for each rule the code or paper that has it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from depth_anything.evaluation.benchmarks.benchmark import Benchmark

Box = tuple[slice, slice]
"""Rows and columns of an image."""


@dataclass(frozen=True)
class EvalProtocol:
    """A protocol: which predictions are fitted to the truth, and between which depths they are compared.

    Attributes:
        name: what tables and reports call it.
        fitted: the quantities that get one scale and shift per image, by least squares over the pixels compared,
            in their own space: a disparity to 1 / truth, a depth to the truth. A depth that is not fitted is
            compared as it comes; a disparity that is not fitted cannot be compared.
        min_depth: metres; nearer truth is not compared, nearer predictions are raised to it.
        max_depth: metres; farther truth (sky always) is not compared, farther predictions are lowered to it.
        strict: whether truth at exactly `min_depth` or `max_depth` is not compared.
        floor: 1 / metres; a fitted disparity below is raised to it before it is inverted. None: 1 / `max_depth`.
        floor_at_truth: in place of `floor`, 1 / the farthest truth compared in the image.
        positive: whether a disparity is fitted over those pixels only where it is above zero.
        crop: name in `CROPS`: the pixels compared; None: all.
        view: name in `CROPS`: the part of the image that the model is shown, and that `crop` is a part of.
        flip: whether the mean of the map and of the mirrored image's map, mirrored back, is compared.
        sharp: whether the truth is dense and sharp, so that `metrics.boundary_f1` is measured too.
    """

    name: str
    fitted: tuple[str, ...]
    min_depth: float = 1e-3
    max_depth: float = 80.0
    strict: bool = False
    floor: float | None = None
    floor_at_truth: bool = False
    positive: bool = False
    crop: str | None = None
    view: str | None = None
    flip: bool = False
    sharp: bool = False

    @property
    def text(self) -> str:
        """The protocol in one sentence."""
        fits = [_FIT_DESCRIPTIONS[quantity] for quantity in ("disparity", "depth") if quantity in self.fitted]
        parts = fits or ["nothing fitted"]
        if "disparity" in self.fitted:
            floor = f"{self.floor:g}" if self.floor is not None else f"1/{self.max_depth:g} m"
            parts.insert(1, f"raised to {'1/farthest truth' if self.floor_at_truth else floor} and inverted")
        if self.view:
            parts.append(f"images cut to {self.view}")
        if self.flip:
            parts.append("mean with the mirrored image")
        if self.min_depth > 0 or self.max_depth < float("inf"):
            parts.append(f"clipped to {self.min_depth:g}–{self.max_depth:g} m")
        where = f" of the {self.crop} crop" if self.crop else ""
        compared = f"compared in depth over pixels{where} whose truth lies in that range; means over images"
        if parts[-1][:7] != "clipped":
            compared = f"compared in depth over all pixels{where} with truth; means over images"
        return f"{self.name}: {', '.join(parts)}, {compared}"

    def check_quantity(self, quantity: str) -> None:
        """Raise ValueError if predictions of this quantity cannot be compared by these rules."""
        if quantity == "disparity" and "disparity" not in self.fitted:
            fitting = ", ".join(name for name, other in PROTOCOLS.items() if "disparity" in other.fitted)
            raise ValueError(
                f"protocol {self.name!r} compares metres and fits no disparity: "
                f"use a metric model, or a protocol that fits one ({fitting})"
            )


_FIT_DESCRIPTIONS = {
    "disparity": "disparity fitted per image by least squares to 1/truth",
    "depth": "depth fitted per image by least squares to truth",
}

PROTOCOLS = {
    "da2": EvalProtocol("da2", fitted=("disparity",)),
    "marigold": EvalProtocol(
        "marigold", fitted=("disparity", "depth"), strict=True, floor=1e-3, positive=True
    ),
    "moge": EvalProtocol(
        "moge", fitted=("disparity",), min_depth=0.0, max_depth=float("inf"), strict=True, floor_at_truth=True
    ),
    "zoedepth": EvalProtocol("zoedepth", fitted=(), strict=True, flip=True),
}
"""da2: the rule that reproduces the published NYU and KITTI figures within 7 %; it fits no model of depth."""


def find_protocol(
    protocol: str | EvalProtocol, *, benchmark: Benchmark | None = None, max_depth: float | None = None
) -> EvalProtocol:
    """The rules of that name, or those given.

    Args:
        protocol: a name in `PROTOCOLS`, or rules of your own, which stay as they are on any benchmark.
        benchmark: with crops and depths of its own for each protocol that is used on it.
        max_depth: metres, in place of theirs.

    Raises:
        ValueError: no such protocol, or none that anyone uses on this benchmark.
    """
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {protocol!r}; choose one of: {', '.join(PROTOCOLS)}")
        name, protocol = protocol, PROTOCOLS[protocol]
        if benchmark is not None:
            if name not in benchmark.depth_limits:
                used = ", ".join(benchmark.depth_limits) or "none"
                raise ValueError(f"protocol {name!r} says nothing of {benchmark.title}: use one of: {used}")
            there = benchmark.depth_limits[name]
            protocol = replace(
                protocol,
                min_depth=there.min_depth,
                max_depth=there.max_depth,
                view=there.cut or None,
                crop=there.crop or None,
                sharp=benchmark.sharp,
            )
    return protocol if max_depth is None else replace(protocol, max_depth=float(max_depth))


def garg_crop(height: int, width: int) -> Box:
    """KITTI's road and what stands beside it: Garg et al. (arXiv 1603.04992)."""
    return _fraction_slice(height, 0.40810811, 0.99189189), _fraction_slice(width, 0.03594771, 0.96405229)


def eigen_kitti_crop(height: int, width: int) -> Box:
    """KITTI's pixels below the sky: Eigen et al. (arXiv 1406.2283)."""
    return _fraction_slice(height, 0.3324324, 0.91351351), _fraction_slice(width, 0.03594771, 0.96405229)


def eigen_nyu_crop(height: int, width: int) -> Box:
    """Where both cameras of NYUv2's Kinect see: rows 45 to 471, columns 41 to 601 of 480 by 640, in proportion."""
    return _fraction_slice(height, 45 / 480, 471 / 480), _fraction_slice(width, 41 / 640, 601 / 640)


def eigen_pixels_crop(height: int, width: int) -> Box:
    """The same rows 45 to 471 and columns 41 to 601 whatever the size: ZoeDepth's box on all sets of rooms.

    Of larger images that is a part at the upper left; of smaller ones what there is of it.
    """
    return slice(min(45, height), min(471, height)), slice(min(41, width), min(601, width))


def kb_crop(height: int, width: int) -> Box:
    """The KITTI benchmark's 1216 by 352 pixels: at the bottom, in the middle."""
    if height < 352 or width < 1216:
        raise ValueError(f"the kb crop has 1216x352 pixels, which {width}x{height} have not")
    left = (width - 1216) // 2
    return slice(height - 352, height), slice(left, left + 1216)


CROPS: dict[str, Callable[[int, int], Box]] = {
    "garg": garg_crop,
    "eigen_kitti": eigen_kitti_crop,
    "eigen_nyu": eigen_nyu_crop,
    "eigen_pixels": eigen_pixels_crop,
    "kb": kb_crop,
}
"""Name → height and width to the box of that image."""


_ROUNDING_TOLERANCE = 1e-9
"""What a share of a length may lack of a whole number by rounding."""


def _fraction_slice(length: int, low: float, high: float) -> slice:
    return slice(int(low * length + _ROUNDING_TOLERANCE), int(high * length + _ROUNDING_TOLERANCE))

"""Hypersim, its test split: rendered interiors.

Layout, images (the preview) and depth are those of `depth_anything.ingest.sets.hypersim`, which reads them; its two
tables must be in the folder, too.

Depth: planar, in meters, computed from the stored distances with each scene's own camera. Depth Anything V1 and
ZoeDepth (metric_depth/zoedepth/data/hypersim.py) and V2's metric models use a focal length of 886.81 px for every
scene: the same for plain cameras, and up to 15 % of the depth otherwise. On tilted and shifted cameras their figures
are thus against another ground truth; the effect was not measured.

Frames: the 7,690 of the table's test split, of 46 scenes. V1's code reads all frames below a folder named
hypersim_test, and its paper does not say which these were: most likely the test split, which is not confirmed.

`zoedepth` (zoedepth/utils/config.py and utils/misc.py) compares 0.001 to 80 m of rows 45 to 471 and columns 41 to 601,
which is the upper left part of 1024 x 768 pixels. Its reader shrinks the image to 640 x 480 for the network, which is
not done here. The range of `da2` is our choice.

The train split is one of V2's five training sets: figures of models trained on it are not zero-shot.

License: CC BY-SA 3.0. Get it from https://github.com/apple/ml-hypersim.
"""

from collections.abc import Iterator
from pathlib import Path

from depth_anything.data.sample import Frame
from depth_anything.errors import UserError
from depth_anything.evaluation.benchmarks.benchmark import (
    Benchmark,
    DepthLimits,
    make_frame,
    prefix_errors,
    resolve_root,
)
from depth_anything.ingest.frame_files import split_fields
from depth_anything.ingest.sets import hypersim


def find(root: Path) -> Iterator[str]:
    """List the frames of the test split; ValueError if there is none, or a table is missing."""
    root = resolve_root(root)
    try:
        yield from hypersim.find(root, split="test")
    except UserError as error:  # its fix names flags of `depth-anything shard`
        raise UserError(error.what, f"get it from {hypersim.INFO.get}") from error


def read(root: Path, line: str) -> Frame:
    """Read a frame; ValueError if a file is missing or damaged, or its scene's camera is unknown."""
    key = f"hypersim/{split_fields(line)[0]}"
    with prefix_errors(key):
        raw = hypersim.read(Path(root), line)
        assert raw.depth is not None
        return make_frame(key, raw.image, raw.depth, meta=raw.meta)


HYPERSIM = Benchmark(
    name="hypersim",
    title="Hypersim, test",
    images=7690,
    layout=f"{hypersim.INFO.layout}, and the two tables",
    get=hypersim.INFO.get,
    licence=hypersim.INFO.licence,
    find=find,
    read=read,
    sharp=True,
    depth_limits={"da2": DepthLimits(1e-3, 80), "zoedepth": DepthLimits(1e-3, 80, eval_crop="eigen_pixels")},
)

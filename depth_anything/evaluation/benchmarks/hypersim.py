"""Hypersim, its test split: rendered interiors.

Layout, images (the preview) and depth are those of `depth_anything.ingest.sets.hypersim`, which reads them; its two
tables must lie in the folder, too.

Depth: planar, in metres, from the distances that are stored, by each scene's own camera. Depth Anything V1 and
ZoeDepth (metric_depth/zoedepth/data/hypersim.py) take a focal length of 886.81 px for every scene, V2's metric models
likewise: the same for a plain camera, and up to 15 % of the depth else. Their figures are thus against another truth
on tilted and shifted cameras; by how much they would change was not measured.

Frames: the 7,690 of the table's test, of 46 scenes. V1's code takes all frames below a folder called hypersim_test,
and its paper does not say which these were: the test split is the likeliest, and not confirmed.

Compared by ZoeDepth's rules (zoedepth/utils/config.py and utils/misc.py) are 0.001 to 80 m of rows 45 to 471 and
columns 41 to 601, which of 1024 x 768 pixels is the upper left. Its reader shrinks the image to 640 x 480 before the
network sees it, which is not done here. da2's range is ours.

The train split is one of V2's five training sets: for what learnt from it this is no zero-shot figure.

Licence: CC BY-SA 3.0. Get it from https://github.com/apple/ml-hypersim.
"""

from collections.abc import Iterator
from pathlib import Path

from depth_anything.data.sample import Frame
from depth_anything.errors import UserError
from depth_anything.evaluation.benchmarks.benchmark import Benchmark, DepthLimits
from depth_anything.evaluation.benchmarks.frames import make_frame, prefix_errors, resolve_root
from depth_anything.ingest.frame_files import split_fields
from depth_anything.ingest.sets import hypersim


def find(root: Path) -> Iterator[str]:
    """List the frames of the test split; ValueError if there is none, or a table is missing."""
    root = resolve_root(root)
    try:
        yield from hypersim.find(root, split="test")
    except UserError as error:  # its fix names flags of `depth-anything shard`
        raise UserError(error.what) from error


def read(root: Path, line: str) -> Frame:
    """Read a frame; ValueError if a file is missing or damaged, or its scene's camera is not known."""
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
    depth_limits={"da2": DepthLimits(1e-3, 80), "zoedepth": DepthLimits(1e-3, 80, crop="eigen_pixels")},
)

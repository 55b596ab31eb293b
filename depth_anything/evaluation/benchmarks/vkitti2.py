"""Virtual KITTI 2, the 8 % that ZoeDepth's split excludes from training: rendered drives.

Layout and depth are those of `depth_anything.ingest.sets.vkitti2`, which reads them; camera 0. The sky has no
depth and is unknown here.

Frames: ZoeDepth's reader (metric_depth/zoedepth/data/vkitti2.py of Depth Anything V1) shuffles the 21,260 frames of
camera 0 without a seed, once, and keeps 92 % for training: 19,559 names in train.txt, which leaves 1,701. Nobody
published a test.txt, but Depth Anything V2 has such a train.txt with as many lines (metric_depth/dataset/splits/
vkitti2): the frames that it does not name are compared here. It is likely, and not confirmed, that V1's figures are of
these frames. train.txt must be in the folder; one that ZoeDepth's code wrote works as well.

Neighbors of every test frame, and the same places in other weather, are among the training frames, so a model trained
on them has seen the drive. The five drives are in V2's training sets, too.

`zoedepth` (zoedepth/utils/config.py) compares 0.001 to 80 m of Garg's crop of the last 352 rows and the middle 1,216
columns. The range of `da2` is our choice.

License: CC BY-NC-SA 3.0 (from memory). Get it from https://europe.naverlabs.com.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from depth_anything.data.sample import Frame
from depth_anything.errors import UserError
from depth_anything.evaluation.benchmarks.benchmark import (
    Benchmark,
    DepthLimits,
    make_frame,
    prefix_errors,
    require_lines,
    resolve_root,
)
from depth_anything.ingest.frame_files import split_fields
from depth_anything.ingest.sets import vkitti2

LIST_FILE = "train.txt"
_LIST_FROM = "https://github.com/DepthAnything/Depth-Anything-V2, metric_depth/dataset/splits/vkitti2"
_LIST_LINE = re.compile(r"(Scene\d\d)/([\w-]+)/frames/rgb/(Camera_\d)/rgb_(\d+)\.jpg(?:\s|$)")


def find(root: Path) -> Iterator[str]:
    """List the frames of camera 0 that train.txt does not name.

    Raises:
        ValueError: there is none, or train.txt is missing or damaged.
    """
    root = resolve_root(root)
    path = root / LIST_FILE
    lines = vkitti2.find(root)
    first = next(lines)
    if not path.is_file():
        raise UserError(
            f"{root} does not hold {LIST_FILE}, the list of the frames that are not compared",
            f"get it from {_LIST_FROM}",
        )
    named = set(_training_frames(path))
    rest = (line for line in (first, *lines) if line.partition("\t")[0] not in named)
    return require_lines(rest, f"{path} names all frames in {root}", f"get it from {_LIST_FROM}")


def read(root: Path, line: str) -> Frame:
    """Read a frame; ValueError if image or depth is missing or damaged, or they differ in size."""
    key = f"vkitti2/{split_fields(line)[0]}"
    with prefix_errors(key):
        raw = vkitti2.read(Path(root), line)
        assert raw.depth is not None and raw.sky is not None
        return make_frame(key, raw.image, raw.depth, known=~raw.sky, meta=raw.meta)


def _training_frames(path: Path) -> Iterator[str]:
    """The frames of a list, named as by `vkitti2.find`, with any path before them."""
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = _LIST_LINE.search(text)
        if not match:
            raise ValueError(
                f"{path}, line {number}: {text!r:.200} is not …/frames/rgb/Camera_0/rgb_00000.jpg"
            )
        yield "/".join(match.groups())


VKITTI2 = Benchmark(
    name="vkitti2",
    title="Virtual KITTI 2, the frames not in train.txt",
    images=1701,
    layout=f"{vkitti2.INFO.layout}, and {LIST_FILE}",
    get=vkitti2.INFO.get,
    licence=vkitti2.INFO.licence,
    find=find,
    read=read,
    sharp=True,
    depth_limits={
        "da2": DepthLimits(1e-3, 80),
        "zoedepth": DepthLimits(1e-3, 80, view_crop="kb", eval_crop="garg"),
    },
)

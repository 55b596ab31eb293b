"""ScanNet, Marigold's 800 frames of the validation scenes: indoor scenes, a structured-light sensor.

Layout: scene0406_02/color/000300.jpg (1296 x 968) with scene0406_02/depth/000300.png (640 x 480), as extracted from the
.sens files, and Marigold's list scannet_val_sampled_list_800_1.txt, all below the root.

Depth: 16 bits, millimeters; 0 is unknown. It is smaller than the image; predictions are resized to it.

License: ScanNet's terms of use, non-commercial. Get it from http://www.scan-net.org (a form; a day or so); the list
from https://github.com/prs-eth/Marigold, data_split/scannet_depth.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.data.sample import Frame
from depth_anything.errors import UserError
from depth_anything.evaluation.benchmarks.benchmark import (
    Benchmark,
    DepthLimits,
    make_frame,
    prefix_errors,
    read_file,
    resolve_root,
)
from depth_anything.ingest.file_list import escape_field
from depth_anything.ingest.frame_files import split_fields
from depth_anything.ingest.maps import read_png16

LIST_FILE = "scannet_val_sampled_list_800_1.txt"
_GET = f"http://www.scan-net.org (a form), and {LIST_FILE} from https://github.com/prs-eth/Marigold"


def find(root: Path) -> Iterator[str]:
    """List the frames of the list in its order; ValueError if the list is missing or damaged."""
    root = resolve_root(root)
    path = root / LIST_FILE
    if not path.is_file():
        raise UserError(
            f"{root} does not hold {LIST_FILE}, the list of the compared frames", f"get it from {_GET}"
        )
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = text.split()
        if len(words) != 2:
            raise ValueError(f"{path}, line {number}: {text!r} is not an image and its depth")
        scene, _, frame = words[0].partition("/")
        yield "\t".join(map(escape_field, [f"{scene}/{Path(frame).stem}", *words]))


def read(root: Path, line: str) -> Frame:
    """Read a frame; ValueError if image or depth is missing or damaged."""
    name, image, depth = split_fields(line)
    with prefix_errors(f"scannet/{name}"):
        data, values = read_file(Path(root), image), read_png16(read_file(Path(root), depth))
        return make_frame(f"scannet/{name}", data, values.astype(np.float32) / 1000, same_size=False)


SCANNET = Benchmark(
    name="scannet",
    title="ScanNet, 800 frames of Marigold",
    images=800,
    layout=f"scene0406_02/color/000300.jpg with scene0406_02/depth/000300.png, and {LIST_FILE}",
    get=_GET,
    licence="LicenseRef-ScanNet",
    find=find,
    read=read,
    depth_limits={"marigold": DepthLimits(1e-3, 10)},
)

"""MegaDepth v1: tourist photographs of 196 places with depth from multi-view stereo; used by V1.

Layout: phoenix/S6/zl548/MegaDepth_v1/0000/dense0/{imgs/NAME.jpg, depths/NAME.h5}; some images are NAME.png or NAME.JPG.

Depth: HDF5, dataset "depth", planar, in an arbitrary unit of each reconstruction. The affine-invariant losses do not
need a unit; a metric model cannot be trained on this set. 0 is invalid: people, sky and unmatched pixels. Sky is not
marked. Some files hold an ordinal map of foreground and background instead of depth, with negative numbers, by which
the authors' own code recognizes them; these frames are rejected.

Counts: about 130,000 images, of which about 30,000 are ordinal; V1 says 128 K.

License: the photographs belong to users of Flickr; it has no known identifier. Get it from
https://www.cs.cornell.edu/projects/megadepth (199 GB). Facts from https://github.com/zhengqili/MegaDepth and public
readers; counts from memory.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depth_anything.ingest.frame_files import FilePattern, find_frames, join_parts, read_pair, split_fields
from depth_anything.ingest.maps import read_hdf5
from depth_anything.ingest.source import DatasetInfo, RawSample

INFO = DatasetInfo(
    name="megadepth",
    title="MegaDepth v1",
    records=128_000,
    layout="0000/dense0/imgs/NAME.jpg with 0000/dense0/depths/NAME.h5",
    get="https://www.cs.cornell.edu/projects/megadepth (199 GB)",
    licence="LicenseRef-MegaDepth",
    sky="invalid",
)
_PATTERNS = (
    FilePattern("image", "imgs", r"(.+)\.(?i:jpe?g|png)"),
    FilePattern("depth", "depths", r"(.+)\.h5"),
)


def find(raw: Path) -> Iterator[str]:
    """List the frames as 0000/dense0/NAME, then the paths of image and depth.

    Raises:
        ValueError: As `find_frames`.
    """
    return find_frames(raw, INFO, _PATTERNS, sequence=lambda parts: join_parts(parts[:-1], 2))


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: Image or depth is missing or damaged, the two differ in size, or the map is ordinal.
    """
    _, *paths = split_fields(line)
    image, depth = read_pair(raw, _PATTERNS, paths, _decode_depth)
    return RawSample(image, {"unit": "arbitrary"}, depth=depth)


def _decode_depth(data: bytes) -> np.ndarray:
    depth = read_hdf5(data, "depth")
    if np.nanmin(depth, initial=0) < 0:
        raise ValueError("its depth is an ordinal map of foreground and background")
    return depth

"""DA-2K: which of two points is nearer, in photographs of eight scene types.

Layout: annotations.json and images/indoor/….jpg, where the folder is the scene type; about 1,030 images and 2,070
pairs. For each image the file has a list of {"point1": [row, column], "point2": [row, column], "closer_point":
"point1"}.

closer_point is always "point1", so a test of "the second point is not nearer" would give a constant map 100 %, and one
wrong sign turns 100 % into 0 %. `pairs_task.score_pairs` counts equal values as one half (a constant map has 50 %); the
order in which the points are written does not matter.

License: Apache-2.0. Get it from https://huggingface.co/datasets/depth-anything/DA-2K (682 MB). Paper: arXiv
2406.09414, section 6.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from depth_anything.data.sample import Frame, decode_image
from depth_anything.errors import UserError
from depth_anything.evaluation.benchmarks.benchmark import Benchmark, resolve_root
from depth_anything.ingest.file_list import escape_field, unescape_field
from depth_anything.ingest.maps import read_bytes

ANNOTATIONS_FILE = "annotations.json"
SCENE_TYPES = (
    "indoor",
    "outdoor",
    "non_real",
    "transparent_reflective",
    "adverse_style",
    "aerial",
    "underwater",
    "object",
)
_GET = "https://huggingface.co/datasets/depth-anything/DA-2K (682 MB)"


@dataclass
class PointPairImage(Frame):
    """An image and pairs of its points; its key is da2k/path of the image.

    Attributes:
        scene: one of `SCENE_TYPES`.
        pairs: int64 (P,2,2): pair, nearer and farther point, row and column.
    """

    scene: str = ""
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2, 2), np.int64))


def find(root: Path) -> Iterator[str]:
    """List the images that have pairs, sorted by path; ValueError if annotations.json is not there."""
    root = _find_root(resolve_root(root))
    return iter([escape_field(path) for path in sorted(_load_annotations(str(root / ANNOTATIONS_FILE)))])


def read(root: Path, line: str) -> PointPairImage:
    """Read an image and its pairs; ValueError if it is missing or damaged, or a point is outside of it."""
    root = _find_root(resolve_root(root))
    path = unescape_field(line.partition("\t")[0])
    annotations = _load_annotations(str(root / ANNOTATIONS_FILE))
    if path not in annotations:
        raise ValueError(f"{root / ANNOTATIONS_FILE} has no image {path}")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{path} is outside of {root}")
    scene = next((part for part in path.split("/") if part in SCENE_TYPES), None)
    if scene is None:
        raise ValueError(f"{path} is in no folder of a scene type ({', '.join(SCENE_TYPES)})")
    try:
        image = decode_image(read_bytes(root / path))
    except ValueError as error:
        raise ValueError(f"{root / path}: {error}") from error
    pairs = np.array([_parse_pair(pair, path) for pair in annotations[path]], np.int64).reshape(-1, 2, 2)
    if (pairs < 0).any() or (pairs >= image.shape[:2]).any():
        size = f"{image.shape[0]} rows and {image.shape[1]} columns"
        raise ValueError(f"{path} has {size}, and a point outside of them: points are [row, column]")
    return PointPairImage(f"da2k/{path}", image, scene=scene, pairs=pairs)


def _find_root(root: Path) -> Path:
    """The folder of annotations.json."""
    for folder in (root, root / "DA-2K"):
        if (folder / ANNOTATIONS_FILE).is_file():
            return folder
    raise UserError(
        f"{root} does not hold DA-2K: looked for {ANNOTATIONS_FILE} with images/", f"get it from {_GET}"
    )


@lru_cache(maxsize=2)
def _load_annotations(path: str) -> Mapping[str, Any]:
    """Image path → list of pairs."""
    try:
        annotations = json.loads(read_bytes(Path(path)))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(annotations, dict) or not all(
        isinstance(pairs, list) for pairs in annotations.values()
    ):
        raise ValueError(f"{path} does not map images to lists of pairs")
    return annotations


def _parse_pair(pair: Any, path: str) -> list[list[int]]:
    """The nearer and the farther point of an annotated pair."""
    try:
        points = {name: [round(float(number)) for number in pair[name]] for name in ("point1", "point2")}
        if any(len(point) != 2 for point in points.values()):
            raise ValueError
        return [points.pop(pair["closer_point"]), *points.values()]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ValueError(
            f"{path} has a pair that is not point1, point2 and closer_point: {pair!r:.200}"
        ) from None


DA2K = Benchmark(
    name="da2k",
    title="DA-2K",
    images=1033,
    layout="annotations.json with images/indoor/….jpg",
    get=_GET,
    licence="Apache-2.0",
    find=find,
    read=read,
)

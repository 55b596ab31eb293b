"""DA-2K: which of two points is nearer, in photographs of eight kinds.

Layout: annotations.json with images/indoor/….jpg beside it, the kind being the folder's name; about 1,030
images and 2,070 pairs. The file names for each image a list of {"point1": [row, column], "point2": [row,
column], "closer_point": "point1"}.

closer_point is "point1" throughout, so that whoever asks whether the second point is not nearer gives a
constant map 100 %, and one mistaken sign makes 0 of 100. Here a pair is right if the nearer point is strictly
nearer in the map, half right where both are the same (a constant map scores 50 %), and wrong otherwise; the
order in which the points are written changes nothing.

Licence: Apache-2.0. Get it from https://huggingface.co/datasets/depth-anything/DA-2K (682 MB). Paper: arXiv
2406.09414, section 6.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import cv2
import numpy as np

from depth_anything.data.sample import decode_image
from depth_anything.evaluation.benchmarks.benchmark import Benchmark
from depth_anything.evaluation.benchmarks.frames import resolve_root
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


@dataclass(frozen=True)
class PointPairImage:
    """An image and pairs of its points.

    Attributes:
        key: da2k/path of the image.
        image: uint8 (H, W, 3), RGB.
        scene: One of `SCENES`.
        pairs: int64 (P, 2, 2): pair, nearer and farther point, row and column.
    """

    key: str
    image: np.ndarray
    scene: str
    pairs: np.ndarray


class PairPredictor(Protocol):
    """What is judged: a `Predictor`, or anything with these two."""

    @property
    def quantity(self) -> str:
        """Either "disparity" (larger is nearer) or "depth" (smaller is nearer)."""

    def predict_batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """RGB uint8 (H,W,3) images → float32 (H,W) maps."""


@dataclass(frozen=True)
class PairResult:
    """What a model scored.

    Attributes:
        rows: A dict an image: "key", "scene", "pairs" (how many), "right" (how many, a tie being a half) and
            "mute" (1 where the map has no number at a point).
    """

    rows: tuple[dict[str, Any], ...]

    @property
    def pairs(self) -> int:
        """How many pairs were asked."""
        return sum(row["pairs"] for row in self.rows)

    @property
    def accuracy(self) -> float:
        """Share of the pairs that are right, 0 to 1; NaN without a pair."""
        return _accuracy(self.rows)

    @property
    def scenes(self) -> dict[str, float]:
        """The same for each kind of scene that occurs, in the order of `SCENES`."""
        return {
            scene: _accuracy(rows)
            for scene in SCENE_TYPES
            if (rows := tuple(row for row in self.rows if row["scene"] == scene))
        }


def find(root: Path) -> Iterator[str]:
    """List the images that have pairs, in the order of their paths; ValueError if annotations.json is not there."""
    root = _find_root(resolve_root(root))
    return iter([escape_field(path) for path in sorted(_load_annotations(str(root / ANNOTATIONS_FILE)))])


def read(root: Path, line: str) -> PointPairImage:
    """Read an image and its pairs; ValueError if it is missing or damaged, or a point lies outside."""
    root = _find_root(resolve_root(root))
    path = unescape_field(line.partition("\t")[0])
    annotated = _load_annotations(str(root / ANNOTATIONS_FILE))
    if path not in annotated:
        raise ValueError(f"{root / ANNOTATIONS_FILE} names no image {path}")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{path} leads out of the folder")
    scene = next((part for part in path.split("/") if part in SCENE_TYPES), None)
    if scene is None:
        raise ValueError(f"{path} lies in no folder of a kind of scene ({', '.join(SCENE_TYPES)})")
    try:
        image = decode_image(read_bytes(root / path))
    except ValueError as error:
        raise ValueError(f"{root / path}: {error}") from error
    pairs = np.array([_parse_pair(pair, path) for pair in annotated[path]], np.int64).reshape(-1, 2, 2)
    if (pairs < 0).any() or (pairs >= image.shape[:2]).any():
        size = f"{image.shape[0]} rows and {image.shape[1]} columns"
        raise ValueError(f"{path} has {size}, and a point outside of them: points are [row, column]")
    return PointPairImage(f"da2k/{path}", image, scene, pairs)


def score_pairs(map_: np.ndarray, compared: PointPairImage, *, quantity: str) -> np.ndarray:
    """Say which pairs a map orders as people do.

    Args:
        map_: (h, w) disparity or depth; brought to the image's size where it has another.
        compared: The image and its pairs.
        quantity: "disparity" or "depth": what of the map is nearer.

    Returns:
        float64 (P,): 1 where it does, 0.5 where both points have the same value, 0 otherwise and where a value is no
        number.
    """
    if quantity not in ("disparity", "depth"):
        raise ValueError(f"a map of {quantity!r} has no nearer and farther: disparity or depth")
    height, width = compared.image.shape[:2]
    values = np.asarray(map_, np.float32)
    if values.shape != (height, width):
        values = cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    near, far = (values[compared.pairs[:, point, 0], compared.pairs[:, point, 1]] for point in (0, 1))
    if quantity == "depth":
        near, far = far, near
    known = ~(np.isnan(near) | np.isnan(far))
    return np.where(near > far, 1.0, 0.5 * (near == far)) * known


def score_da2k(
    predictor: PairPredictor, images: Iterable[PointPairImage], *, batch_size: int = 16
) -> PairResult:
    """Ask a model for the order of all pairs. Holds `batch_size` images at a time."""
    rows = []
    images = iter(images)
    while batch := list(islice(images, batch_size)):
        maps = predictor.predict_batch([compared.image for compared in batch])
        for compared, map_ in zip(batch, maps, strict=True):
            answers = score_pairs(map_, compared, quantity=predictor.quantity)
            row = {"pairs": len(answers), "right": float(answers.sum())}
            row["mute"] = int(_has_missing_values(map_, compared, quantity=predictor.quantity))
            rows.append({"key": compared.key, "scene": compared.scene, **row})
    return PairResult(tuple(rows))


def _has_missing_values(map_: np.ndarray, compared: PointPairImage, *, quantity: str) -> bool:
    """Whether a map has no number at a point that is asked for; infinite depth is sky."""
    faults = np.isnan(map_) if quantity == "depth" else ~np.isfinite(map_)
    if not faults.any():
        return False
    height, width = compared.image.shape[:2]
    whole = cv2.resize(faults.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return bool(whole[compared.pairs[..., 0], compared.pairs[..., 1]].any())


def _find_root(root: Path) -> Path:
    for folder in (root, root / "DA-2K"):
        if (folder / ANNOTATIONS_FILE).is_file():
            return folder
    raise ValueError(
        f"{root} does not hold DA-2K: looked for {ANNOTATIONS_FILE} with images/; get it from {_GET}"
    )


@lru_cache(maxsize=2)
def _load_annotations(path: str) -> Mapping[str, Any]:
    try:
        read_ = json.loads(read_bytes(Path(path)))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(read_, dict) or not all(isinstance(pairs, list) for pairs in read_.values()):
        raise ValueError(f"{path} is no map of images to lists of pairs")
    return read_


def _parse_pair(pair: Any, path: str) -> list[list[int]]:
    """Nearer and farther point of an annotated pair."""
    try:
        nearer = pair["closer_point"]
        points = {name: [round(float(number)) for number in pair[name]] for name in ("point1", "point2")}
        if any(len(point) != 2 for point in points.values()):
            raise ValueError
        return [points.pop(nearer), *points.values()]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ValueError(
            f"{path} has a pair that is not point1, point2 and closer_point: {pair!r:.200}"
        ) from None


def _accuracy(rows: Iterable[dict[str, Any]]) -> float:
    rows = tuple(rows)
    pairs = sum(row["pairs"] for row in rows)
    return float(np.sum([row["right"] for row in rows]) / pairs) if pairs else float("nan")


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

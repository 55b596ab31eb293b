"""Hypersim: rendered interiors, photorealistic.

Layout: ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5 (dataset "dataset", float16) with
scene_cam_00_final_preview/frame.0000.tonemap.jpg or scene_cam_00_final_hdf5/frame.0000.color.hdf5; 768 x 1024. Two
tables of the repository are needed too, anywhere above the scenes: metadata_camera_parameters.csv
(contrib/mikeroberts3000) and metadata_images_split_scene_v1.csv (evermotion_dataset/analysis; not for --split all).

Depth: "depth_meters" is the distance to the optical center along the ray of each pixel, in meters. It is converted to
planar depth with the camera of the scene: for a pixel with center (u, v), both from -1 to 1 and v upward, the ray is
M (u, v, 1) with M = M_cam_from_uv of the scene, and z = distance · |ray z| / |ray|. The usual constant, a focal length
of 886.81 px, is right for only 190 of 457 scenes and wrong for 60 % of the train frames, by up to 15 % of the depth:
many cameras are tilted or shifted. Intrinsics in pixels are stored for cameras that are not tilted, 208 of the 482 in
the table. A scene without a row in the table is rejected. NaN means no geometry (perhaps a window): invalid. No pixel
of this set counts as sky.

Images: the JPEG preview unchanged, as other projects use it; or, with --images hdr, the authors' tone mapping of the
float colors, without JPEG: brightness 0.3 R + 0.59 G + 0.11 B; its 90th percentile over pixels with geometry
(render_entity_id, next to the depth, is not -1) becomes 0.8 after a gamma of 1/2.2.

Left out by default: ai_004_009/cam_01 and ai_038_007, rendered without light or textures (issue 22).

Counts: 461 scenes, 74,619 public frames; train, val and test have 59,543, 7,386 and 7,690, and the paper uses train.

License: CC BY-SA 3.0. Get it from https://github.com/apple/ml-hypersim: 1.9 TB in all; contrib/99991 of it downloads
single files of the zips, about 35 GB for depth and previews. Facts from that repository.
"""

import csv
import io
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np

from depth_anything.errors import UserError
from depth_anything.ingest.find_files import walk_files
from depth_anything.ingest.frame_files import (
    FilePattern,
    check_map_size,
    find_frames,
    read_frame_file,
    split_fields,
)
from depth_anything.ingest.maps import check_hdf5_cost, find_hdf5_dataset, read_bytes, read_hdf5
from depth_anything.ingest.source import DatasetInfo, RawSample

INFO = DatasetInfo(
    name="hypersim",
    title="Hypersim",
    records=59_543,
    layout="ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5 with "
    "scene_cam_00_final_preview/frame.0000.tonemap.jpg",
    get="https://github.com/apple/ml-hypersim (1.9 TB; depth and previews alone 35 GB)",
    licence="CC-BY-SA-3.0",
    sky="invalid",
    leave_out=("ai_004_009/cam_01/*", "ai_038_007/*"),
)
SPLITS = ("train", "val", "test", "all")
_CAMERA_TABLE = "metadata_camera_parameters.csv"
_SPLIT_TABLE = "metadata_images_split_scene_v1.csv"
_MATRIX_COLUMNS = [f"M_cam_from_uv_{row}{column}" for row in range(3) for column in range(3)]
_DEPTH = FilePattern("depth", "scene_cam_*_geometry_hdf5", r"(frame\.\d+)\.depth_meters\.hdf5")
_IMAGE_PATTERNS = {
    "preview": FilePattern("image", "scene_cam_*_final_preview", r"(frame\.\d+)\.tonemap\.jpg"),
    "hdr": FilePattern("image", "scene_cam_*_final_hdf5", r"(frame\.\d+)\.color\.hdf5"),
}
_ENTITY_IDS = FilePattern(
    "segmentation", "scene_cam_*_geometry_hdf5", r"(frame\.\d+)\.render_entity_id\.hdf5"
)
_TILT_TOLERANCE = 1e-6
_GAMMA = 1 / 2.2
_BRIGHT_TARGET, _BRIGHT_PERCENTILE, _MIN_BRIGHTNESS = 0.8, 90, 0.0001


def find(
    raw: Path, *, split: str = "train", images: str = "preview", cameras: Path | None = None
) -> Iterator[str]:
    """List the frames of a split as ai_001_001/cam_00/frame.0000.

    The fields after the name are the paths of image and depth, `images`, and the camera matrix of the scene.

    Args:
        raw: Folder of the scenes, or one above it.
        split: A published split, "train", "val" or "test", or "all" for every frame in `raw`.
        images: "preview" or "hdr".
        cameras: metadata_camera_parameters.csv. None: searched in `raw`.

    Raises:
        ValueError: `split` or `images` is unknown, a table is missing, or as `find_frames`.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split} is unknown: use one of {', '.join(SPLITS)}")
    if images not in _IMAGE_PATTERNS:
        raise ValueError(f"images={images} is unknown: use {' or '.join(_IMAGE_PATTERNS)}")
    above = raw.resolve().parts
    patterns = (_IMAGE_PATTERNS[images], _DEPTH)
    frames = find_frames(raw, INFO, patterns, sequence=lambda parts: _sequence_name((*above, *parts)))
    first = next(frames)
    table = cameras or _find_table(raw, _CAMERA_TABLE, "contrib/mikeroberts3000", "--cameras FILE")
    matrices = _read_cameras(table)
    selected = None
    if split != "all":
        sibling = table.parent / _SPLIT_TABLE
        published = "evermotion_dataset/analysis"
        table = sibling if sibling.exists() else _find_table(raw, _SPLIT_TABLE, published, "--split all")
        selected = _read_split(table, split)
    count = 0
    for line in (first, *frames):
        scene, camera, frame = line.partition("\t")[0].split("/")
        if selected is None or (scene, camera, int(frame.partition(".")[2])) in selected:
            count += 1
            yield "\t".join([line, images, matrices.get(scene, "")])
    if not count:
        raise UserError(f"{raw} holds no frame of the split {split} of {table}", "use another split")


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: A file is missing or damaged, sizes differ, or the camera of the scene is unknown.
    """
    name, image_path, depth_path, images, matrix = split_fields(line)
    if not matrix:
        raise ValueError(f"the camera of scene {name.partition('/')[0]} is not in {_CAMERA_TABLE}")
    data = read_frame_file(raw, _IMAGE_PATTERNS[images], image_path)
    distance = read_hdf5(read_frame_file(raw, _DEPTH, depth_path), "dataset")
    camera = np.array(matrix.split(","), np.float64).reshape(3, 3)
    depth = planar_depth(distance, camera)
    meta = {"unit": "m", "M_cam_from_uv": camera.tolist(), **_pixel_intrinsics(camera, *distance.shape)}
    if images == "preview":
        check_map_size(data, depth, _DEPTH.content)
        return RawSample(data, meta, depth=depth)
    entity_path = depth_path.replace(".depth_meters.", ".render_entity_id.")
    entities = read_hdf5(read_frame_file(raw, _ENTITY_IDS, entity_path), "dataset")
    color = _read_color(data)
    if not color.shape[:2] == entities.shape == depth.shape:
        sizes = f"{color.shape[:2]}, {entities.shape} and {depth.shape}"
        raise ValueError(f"its color, segmentation and depth differ in size: {sizes}")
    return RawSample(tone_map(color, entities != -1), meta, depth=depth)


def planar_depth(distance: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """Convert the distance along the ray of each pixel to the depth along the optical axis.

    Args:
        distance: (H, W), distance to the optical center.
        camera: float64 (3, 3), M_cam_from_uv of the scene.

    Returns:
        float32 (H, W) in the unit of the distance; NaN stays NaN.
    """
    return (distance * _depth_per_distance(camera.tobytes(), *distance.shape)).astype(np.float32)


@lru_cache(maxsize=4)  # frames are read scene by scene
def _depth_per_distance(camera: bytes, height: int, width: int) -> np.ndarray:
    """Return the depth of a point at distance 1 along the ray of each pixel, float64 (H, W)."""
    u = (2 * np.arange(width) + 1) / width - 1
    v = 1 - (2 * np.arange(height)[:, None] + 1) / height
    rows = np.frombuffer(camera).reshape(3, 3)
    x, y, z = (row[0] * u + row[1] * v + row[2] for row in rows)
    with np.errstate(invalid="ignore"):  # a matrix of zeros gives NaN for every pixel
        return np.abs(z) / np.sqrt(x * x + y * y + z * z)


def tone_map(color: np.ndarray, geometry: np.ndarray) -> np.ndarray:
    """Map radiance to an image as the authors do (scene_generate_images_tonemap.py), without JPEG.

    Args:
        color: float (H, W, 3), radiance. NaN becomes black and infinity white; neither affects the brightness, while
            the authors' script would lose the whole image.
        geometry: bool (H, W), pixels that determine the brightness. Without any, the scale is 1.

    Returns:
        uint8 (H, W, 3), RGB, truncated as by the authors' use of matplotlib's imsave.
    """
    color = color.astype(np.float32)
    brightness = 0.3 * color[..., 0] + 0.59 * color[..., 1] + 0.11 * color[..., 2]
    counted = brightness[geometry & np.isfinite(brightness)]
    scale = 1.0
    if counted.size:
        bright = np.percentile(counted, _BRIGHT_PERCENTILE)
        scale = 0.0 if bright < _MIN_BRIGHTNESS else _BRIGHT_TARGET ** (1 / _GAMMA) / bright
    with np.errstate(invalid="ignore", over="ignore"):  # of infinite values
        mapped = np.power(np.maximum(np.float32(scale) * color, 0), np.float32(_GAMMA))
    return (np.clip(np.nan_to_num(mapped, nan=0.0, posinf=1.0), 0, 1) * 255).astype(np.uint8)


def _sequence_name(parts: tuple[str, ...]) -> str:
    """Return ai_001_001/cam_00 for …/ai_001_001/images/scene_cam_00_geometry_hdf5."""
    return f"{parts[-3]}/{'_'.join(parts[-1].split('_')[1:3])}"


def _find_table(raw: Path, name: str, published: str, alternative: str) -> Path:
    """Find a table above the scenes, without searching the scenes."""
    files = walk_files(
        raw,
        follow=True,
        skip_folder=lambda folder: folder.name.startswith("ai_"),
        on_error=lambda folder, error: None,
        files_first=True,
    )
    for path, _ in files:
        if path.rpartition("/")[2] == name:
            return raw / path
    where = f"{published} of https://github.com/apple/ml-hypersim"
    raise UserError(
        f"{raw} has no {name}, which is published in {where}", f"put it there, or add {alternative}"
    )


def _read_rows(path: Path, columns: list[str]) -> list[dict[str, str]]:
    """Read these columns of a CSV file; missing cells are empty."""
    try:
        data = read_bytes(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        table = csv.DictReader(io.StringIO(data.decode("utf-8-sig", "replace")))
        missing = [column for column in columns if column not in (table.fieldnames or ())]
        rows = [{column: (row.get(column) or "").strip() for column in columns} for row in table]
    except csv.Error as error:
        raise ValueError(f"{path} is not the expected table: {error}") from error
    if missing:
        raise ValueError(f"{path} is not the expected table: it has no column {', '.join(missing)}")
    return rows


def _read_cameras(path: Path) -> dict[str, str]:
    """Return the nine comma-separated numbers of each scene's matrix, row by row; "" if one is missing."""
    matrices = {}
    for row in _read_rows(path, ["scene_name", *_MATRIX_COLUMNS]):
        words = [row[column] for column in _MATRIX_COLUMNS]
        matrices[row["scene_name"]] = ",".join(words) if all(map(_is_number, words)) else ""
    return matrices


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _read_split(path: Path, split: str) -> set[tuple[str, str, int]]:
    columns = ["scene_name", "camera_name", "frame_id", "split_partition_name"]
    return {
        (row["scene_name"], row["camera_name"], int(row["frame_id"]))
        for row in _read_rows(path, columns)
        if row["split_partition_name"] == split and row["frame_id"].isdecimal()
    }


def _pixel_intrinsics(camera: np.ndarray, height: int, width: int) -> dict[str, dict[str, float]]:
    """Return focal lengths and principal point in pixels, or {} for a tilted camera, which has no such intrinsics.

    The scale of a matrix is arbitrary, and the numbers of the table are rounded: a camera counts as untilted if tilt
    and skew are below 1e-6 of its axis.
    """
    axis = camera[2, 2]
    if not axis < 0:
        return {}
    (fx, skew, left), (other, fy, down), (tilt, tip, _) = (camera / -axis).tolist()
    if not max(map(abs, (skew, other, tilt, tip))) < _TILT_TOLERANCE or not (fx > 0 and fy > 0):
        return {}
    return {
        "intrinsics": {
            "fx": width / 2 / fx,
            "fy": height / 2 / fy,
            "cx": width / 2 * (1 - left / fx) - 0.5,
            "cy": height / 2 * (1 + down / fy) - 0.5,
        }
    }


def _read_color(data: bytes) -> np.ndarray:
    """Read the colors of an HDF5 file, float (H, W, 3)."""
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            dataset = find_hdf5_dataset(file, "dataset")
            shape = dataset.shape
            if len(shape) != 3 or shape[2] != 3 or dataset.dtype.kind != "f":
                raise ValueError(f"{dataset.dtype} of shape {shape} instead of floats (H, W, 3)")
            check_hdf5_cost(dataset)
            return dataset[()]
    except Exception as error:  # the library raises a dozen types for damaged files
        raise ValueError(f"its color cannot be read: {error}") from error

"""Hypersim: rendered interiors, photorealistic.

Layout: ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5 (dataset "dataset", float16) with
scene_cam_00_final_preview/frame.0000.tonemap.jpg or scene_cam_00_final_hdf5/frame.0000.color.hdf5; 768 x 1024. Two
tables of the repository are needed, too, anywhere above the scenes: metadata_camera_parameters.csv
(contrib/mikeroberts3000) and metadata_images_split_scene_v1.csv (evermotion_dataset/analysis; not for --split all).

Depth: "depth_meters" is the distance to the optical centre along each pixel's ray, in metres. Here it becomes planar
by the scene's own camera: the ray of the pixel whose centre is (u, v), both from -1 to 1, v upwards, is M (u, v, 1)
with M = M_cam_from_uv of the scene; z = distance · |ray z| / |ray|. The usual constant, a focal length of 886.81 px,
fits only 190 of 457 scenes and is wrong for 60 % of the frames of train, by up to 15 % of the depth: many cameras are
tilted or shifted. Intrinsics in pixels are kept of the cameras that are not tilted, 208 of the table's 482. A scene
without a row in the table is refused. No number means no geometry (a window perhaps):
invalid. Nothing of this set is ever sky.

Images: the preview as it is, as others train on it; or --images hdr, the makers' own tone mapping of the colours in
float, without the JPEG: brightness 0.3 R + 0.59 G + 0.11 B, its 90th percentile where there is geometry
(render_entity_id, next to the depth, is not -1) becomes 0.8 after a gamma of 1/2.2.

Not taken unless asked for: ai_004_009/cam_01 and ai_038_007, rendered without light or textures (issue 22).

Counts: 461 scenes, 74,619 public frames; train, val and test have 59,543, 7,386 and 7,690, and the paper takes train.

Licence: CC BY-SA 3.0. Get it from https://github.com/apple/ml-hypersim: 1.9 TB in all; contrib/99991 of it fetches
single files out of the zips, some 35 GB for depth and previews. Facts from that repository.
"""

import csv
import io
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np

from depth_anything.errors import UserError
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
_BRIGHT_TARGET, _PERCENTILE, _MIN_BRIGHTNESS = 0.8, 90, 0.0001


def find(
    raw: Path, *, split: str = "train", images: str = "preview", cameras: Path | None = None
) -> Iterator[str]:
    """List the frames of a split, ai_001_001/cam_00/frame.0000 each.

    After it stand the paths of image and depth, how images are made, and the scene's camera matrix.

    Args:
        raw: Folder of the scenes, or one above it.
        split: "train", "val" or "test" as published; "all" is what lies there.
        images: "preview" or "hdr".
        cameras: metadata_camera_parameters.csv; None: looked for in `raw`.

    Raises:
        ValueError: If split or images are unknown, a table is missing, or as `find_frames`.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split} is unknown: type one of {', '.join(SPLITS)}")
    if images not in _IMAGE_PATTERNS:
        raise ValueError(f"images={images} is unknown: type {' or '.join(_IMAGE_PATTERNS)}")
    above = raw.resolve().parts
    kinds = (_IMAGE_PATTERNS[images], _DEPTH)
    frames = find_frames(raw, INFO, kinds, sequence=lambda parts: _sequence_name((*above, *parts)))
    first = next(frames)
    table = cameras or _find_table(raw, _CAMERA_TABLE, "contrib/mikeroberts3000", "--cameras FILE")
    matrices = _read_cameras(table)
    wanted = None
    if split != "all":
        beside = table.parent / _SPLIT_TABLE
        published = "evermotion_dataset/analysis"
        table = beside if beside.exists() else _find_table(raw, _SPLIT_TABLE, published, "--split all")
        wanted = _read_split(table, split)
    taken = 0
    for line in (first, *frames):
        scene, camera, frame = line.partition("\t")[0].split("/")
        if wanted is None or (scene, camera, int(frame.partition(".")[2])) in wanted:
            taken += 1
            yield "\t".join([line, images, matrices.get(scene, "")])
    if not taken:
        raise UserError(f"{raw} holds no frame of the split {split} of {table}", "type another split")


def read(raw: Path, line: str) -> RawSample:
    """Read one frame.

    Raises:
        ValueError: If a file is missing or damaged, sizes differ, or the scene's camera is not known.
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
        check_map_size(data, depth, _DEPTH.what)
        return RawSample(data, meta, depth=depth)
    beside = depth_path.replace(".depth_meters.", ".render_entity_id.")
    entities = read_hdf5(read_frame_file(raw, _ENTITY_IDS, beside), "dataset")
    colour = _read_color(data)
    if not colour.shape[:2] == entities.shape == depth.shape:
        sizes = f"{colour.shape[:2]}, {entities.shape} and {depth.shape}"
        raise ValueError(f"its colour, segmentation and depth differ in size: {sizes}")
    return RawSample(tone_map(colour, entities != -1), meta, depth=depth)


def planar_depth(distance: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """Make the distance along each pixel's ray the depth along the optical axis.

    Args:
        distance: (H, W), to the optical centre.
        camera: float64 (3, 3), M_cam_from_uv of the scene.

    Returns:
        float32 (H, W), in the distance's unit; no numbers stay.
    """
    return (distance * _depth_per_distance(camera.tobytes(), *distance.shape)).astype(np.float32)


@lru_cache(maxsize=4)  # frames come scene by scene
def _depth_per_distance(camera: bytes, height: int, width: int) -> np.ndarray:
    """What part of its length each pixel's ray covers along the optical axis, float64 (H, W)."""
    u = (2 * np.arange(width) + 1) / width - 1
    v = 1 - (2 * np.arange(height)[:, None] + 1) / height
    rows = np.frombuffer(camera).reshape(3, 3)
    x, y, z = (row[0] * u + row[1] * v + row[2] for row in rows)
    with np.errstate(invalid="ignore"):  # a matrix of zeros has no rays, and no pixel of it is known
        return np.abs(z) / np.sqrt(x * x + y * y + z * z)


def tone_map(colour: np.ndarray, geometry: np.ndarray) -> np.ndarray:
    """Map radiance to an image as the set's makers do (scene_generate_images_tonemap.py), without the JPEG.

    Args:
        colour: float (H, W, 3), radiance; what is no number becomes black and what is infinite white, and neither
            counts, where theirs would lose the whole image.
        geometry: bool (H, W), the pixels whose brightness decides; if there are none, nothing is scaled.

    Returns:
        uint8 (H, W, 3), RGB; fractions are cut off, as matplotlib's imsave does it for them.
    """
    colour = colour.astype(np.float32)
    brightness = 0.3 * colour[..., 0] + 0.59 * colour[..., 1] + 0.11 * colour[..., 2]
    counted = brightness[geometry & np.isfinite(brightness)]
    scale = 1.0
    if counted.size:
        bright = np.percentile(counted, _PERCENTILE)
        scale = 0.0 if bright < _MIN_BRIGHTNESS else _BRIGHT_TARGET ** (1 / _GAMMA) / bright
    with np.errstate(invalid="ignore", over="ignore"):  # of what is infinite
        mapped = np.power(np.maximum(np.float32(scale) * colour, 0), np.float32(_GAMMA))
    return (np.clip(np.nan_to_num(mapped, nan=0.0, posinf=1.0), 0, 1) * 255).astype(np.uint8)


def _sequence_name(parts: tuple[str, ...]) -> str:
    """Make …/ai_001_001/images/scene_cam_00_geometry_hdf5 ai_001_001/cam_00."""
    return f"{parts[-3]}/{'_'.join(parts[-1].split('_')[1:3])}"


def _find_table(raw: Path, name: str, published: str, instead: str) -> Path:
    """Find a table above the scenes, which themselves are not searched; links are followed, as for these."""
    seen = set()
    for here, folders, files in os.walk(raw, followlinks=True):
        real = os.path.realpath(here)
        new = [] if real in seen else sorted(folder for folder in folders if not folder.startswith("ai_"))
        seen.add(real)
        folders[:] = new
        if name in files:
            return Path(here, name)
    where = f"{published} of https://github.com/apple/ml-hypersim"
    raise UserError(f"{raw} has no {name}, which is published in {where}", f"put it there, or add {instead}")


def _read_rows(path: Path, columns: list[str]) -> list[dict[str, str]]:
    """The rows of a table that has these columns; a word that is not there is empty."""
    try:
        data = read_bytes(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        table = csv.DictReader(io.StringIO(data.decode("utf-8-sig", "replace")))
        lacking = [column for column in columns if column not in (table.fieldnames or ())]
        rows = [{column: (row.get(column) or "").strip() for column in columns} for row in table]
    except csv.Error as error:
        raise ValueError(f"{path} is not the table that is meant: {error}") from error
    if lacking:
        raise ValueError(f"{path} is not the table that is meant: it has no column {', '.join(lacking)}")
    return rows


def _read_cameras(path: Path) -> dict[str, str]:
    """The nine numbers of each scene's matrix, row by row, as the table has them; nothing where one is missing."""
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
    """Focal lengths and principal point in pixels; nothing for a tilted camera, which has none in this sense.

    Only the ratios of a matrix count, and the table's are rounded: a camera is taken for upright where its tilt and
    skew are below 1e-6 of its axis.
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
    """The dataset of an HDF5 file of colours, float (H, W, 3)."""
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            dataset = find_hdf5_dataset(file, "dataset")
            shape = dataset.shape
            if len(shape) != 3 or shape[2] != 3 or dataset.dtype.kind != "f":
                raise ValueError(f"{dataset.dtype} of shape {shape} in place of floats (H, W, 3)")
            check_hdf5_cost(dataset)
            return dataset[()]
    except Exception as error:  # what damage makes of the library is of a dozen types
        raise ValueError(f"its colour cannot be read: {error}") from error

"""DDAD, its validation scenes: streets in the United States and Japan, the front camera, LiDAR to 250 m.

Layout: ddad_train_val/ddad.json names the scene files of each split; 000150/scene_….json holds a scene's data and
samples; in the same folder are rgb/CAMERA_01/….png, point_cloud/LIDAR/….npz and calibration/….json. 1936 x 1216 pixels.

The format is DGP of the Toyota Research Institute. This reader follows the source of TRI-ML/dgp (proto/*.proto,
datasets/base_dataset.py, utils/annotation.py, utils/camera.py, utils/pose.py) and the scenes of its tests; no file of
DDAD itself was available. In ddad.json split "1" is val. A sample names its data by their keys, and its calibration
file. A pose maps a sensor's points to the world: quaternion (w, x, y, z) and translation; the poses of camera and LiDAR
are of their own times, and together map LiDAR points to the camera. Fields missing in the JSON are 0. Points are an
array "data", (N, 3) or more, or one with fields X, Y and Z, in meters, in the sensor's frame.

Depth: planar depth of the projected points, at pixel coordinates truncated as dgp does; the nearest of several points
in a pixel counts. (dgp keeps the last one of the file. Its extrinsics and distortions are used neither there nor here.)

Frames: 3,950 of 50 scenes, seen by CAMERA_01 (TRI-ML/DDAD, README.md); the authors compare up to 200 m without a crop
(evaluation/main.py there; configs/eval_ddad.yaml of TRI-ML/packnet-sfm). Depth Anything V1 does not say which images,
cameras or depths its figures are of. `zoedepth` is that of metric_depth/zoedepth/utils/config.py: up to 80 m, Garg's
crop; its code stretches the image to 1216 x 352 for the network, which is not done here.

License: CC BY-NC-SA 4.0. Get it from https://github.com/TRI-ML/DDAD (DDAD.tar, 257 GB with the training scenes).
"""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from depth_anything.data.sample import Frame, decode_image
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
from depth_anything.ingest.maps import MAX_FILE_BYTES

INDEX_FILE, CAMERA, LIDAR = "ddad.json", "CAMERA_01", "LIDAR"
_VALIDATION_SPLIT = "1"
_GET = "https://github.com/TRI-ML/DDAD (DDAD.tar, 257 GB)"
_LAYOUT = f"ddad_train_val/{INDEX_FILE} with the folders of its scenes"


@dataclass(frozen=True)
class LidarSample:
    """The image and the point cloud of one time.

    Attributes:
        name: of the image, without its suffix.
        calibration: name of the calibration file, without its suffix.
        image: path below the scene's folder, or "".
        cloud: path of the point cloud below the scene's folder, or "".
        camera: float64 (4,4), from the camera to the world.
        lidar: float64 (4,4), from the LiDAR to the world.
    """

    name: str
    calibration: str
    image: str
    cloud: str
    camera: np.ndarray
    lidar: np.ndarray


def find(root: Path) -> Iterator[str]:
    """List the frames of the validation scenes that are there, in the order of ddad.json and of their samples.

    Raises:
        ValueError: ddad.json or all of its scenes are missing, or a scene's file is damaged.
    """
    place = _find_root(root)
    here = [scene for scene in _validation_scenes(place) if (place / scene).is_file()]
    if not here:
        raise UserError(f"{place} holds no scene of DDAD's validation split", f"get it from {_GET}")
    for scene in here:
        folder = PurePosixPath(scene).parent
        for sample in _read_samples(place, scene):
            paths = [str(folder / path) if path else "" for path in (sample.cloud, sample.image)]
            yield "\t".join(map(escape_field, [f"{folder}/{sample.name}", scene, *paths]))


def read(root: Path, line: str) -> Frame:
    """Read a frame and project its points to depth; ValueError if a file is missing or damaged."""
    name, scene, cloud, image = split_fields(line)
    place = _find_root(root)
    with prefix_errors(f"ddad/{name}"):
        held = {one.name: one for one in _read_samples(place, scene)}
        sample = held.get(PurePosixPath(name).name)
        if sample is None:
            raise ValueError(f"{scene} no longer has it")
        for path, what in ((image, CAMERA), (cloud, LIDAR)):
            if not path:
                raise ValueError(f"its scene has no data of {what} at that time")
        pixels = decode_image(read_file(place, _check_inside(image)))
        calibration = _check_inside(f"{PurePosixPath(scene).parent}/calibration/{sample.calibration}.json")
        camera = read_intrinsics(read_file(place, calibration))
        points = read_points(read_file(place, _check_inside(cloud)))
        turn = np.linalg.inv(sample.camera) @ sample.lidar
        depth = project_points(points @ turn[:3, :3].T + turn[:3, 3], camera, size=pixels.shape[:2])
        meta = {"intrinsics": {"fx": float(camera[0, 0]), "fy": float(camera[1, 1])}}
        return make_frame(f"ddad/{name}", pixels, depth, meta=meta)


def project_points(points: np.ndarray, camera: np.ndarray, *, size: tuple[int, int]) -> np.ndarray:
    """Project points to a depth map.

    Args:
        points: float64 (N,3), meters, in the camera's frame: x to the right, y down, z forward.
        camera: float64 (3,3), intrinsics in pixels.
        size: height and width.

    Returns:
        float64 (H,W), planar depth in meters of the nearest point in each pixel; 0 where there is none.
    """
    points = points[points[:, 2] > 0]
    depth = points[:, 2]
    columns, rows = np.trunc((points @ camera.T)[:, :2] / depth[:, None]).T
    inside = (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
    spots = rows[inside].astype(np.int64) * size[1] + columns[inside].astype(np.int64)
    nearest = np.full(size, np.inf)
    np.minimum.at(nearest.reshape(-1), spots, depth[inside])
    return np.where(np.isfinite(nearest), nearest, 0.0)


def read_points(data: bytes) -> np.ndarray:
    """Read the points of a .npz file, float64 (N,3); ValueError if it is damaged or holds something else."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if archive.getinfo("data.npy").file_size > MAX_FILE_BYTES:
                raise ValueError(f"it has more than {MAX_FILE_BYTES >> 20} MiB")
            stream = io.BytesIO(archive.read("data.npy"))
        _check_npy_size(stream)
        values = np.load(stream, allow_pickle=False)
        if values.dtype.names is not None:
            values = np.stack([values[axis].reshape(-1) for axis in "XYZ"], 1)
        if values.ndim != 2 or values.shape[1] < 3 or values.dtype.kind not in "fiu":
            raise ValueError(f"an array of shape {values.shape} is not a list of points")
    except Exception as error:  # damage makes the libraries raise a dozen types
        raise ValueError(f"its point cloud cannot be read: {error}") from error
    points = values[:, :3].astype(np.float64)
    return points[np.isfinite(points).all(1)]


def _check_npy_size(stream: io.BytesIO) -> None:
    """Refuse an NPY file whose header claims more bytes than follow it, before memory is allocated for them."""
    form = np.lib.format
    read_header = (
        form.read_array_header_1_0 if form.read_magic(stream) == (1, 0) else form.read_array_header_2_0
    )
    shape, _, dtype = read_header(stream)
    held = len(stream.getbuffer()) - stream.tell()
    if np.prod(shape, dtype=float) * dtype.itemsize > held:
        raise ValueError(f"{held} bytes follow its header, which says {dtype} of shape {shape}")
    stream.seek(0)


def read_intrinsics(data: bytes) -> np.ndarray:
    """Read the camera's intrinsics from a calibration file, float64 (3,3); ValueError if it has none."""
    try:
        calibration = json.loads(data)
        names = [str(name).upper() for name in calibration["names"]]
        values = calibration["intrinsics"][names.index(CAMERA)]
        fx, fy, cx, cy = (float(values.get(key, 0)) for key in ("fx", "fy", "cx", "cy"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"its calibration has no {CAMERA}") from None
    if not (min(fx, fy) > 0 and np.isfinite([fx, fy, cx, cy]).all()):
        raise ValueError(f"its calibration says {fx:g} and {fy:g} pixels of {CAMERA}'s focal length")
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def _find_root(root: Path) -> Path:
    """The folder of ddad.json."""
    root = resolve_root(root)
    for place in (root, root / "ddad_train_val"):
        if (place / INDEX_FILE).is_file():
            return place
    raise UserError(f"{root} does not hold DDAD: looked for {_LAYOUT}", f"get it from {_GET}")


def _validation_scenes(place: Path) -> list[str]:
    """The scene files of the validation split, relative to `place`."""
    try:
        names = json.loads((place / INDEX_FILE).read_bytes())["scene_splits"][_VALIDATION_SPLIT]["filenames"]
        return [_check_inside(name) for name in names]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{place / INDEX_FILE} has no scenes of the validation split") from None


def _check_inside(path: str) -> str:
    """Return the path; ValueError if it leads outside of the folder."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{path!r} is outside of the folder")
    return path


def _read_samples(place: Path, scene: str) -> tuple[LidarSample, ...]:
    path = place / _check_inside(scene)
    return _read_scene(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _read_scene(path: Path, changed: int) -> tuple[LidarSample, ...]:
    """Read the samples of a scene file; `changed` is its time, for the cache. ValueError if it is damaged."""
    try:
        scene = json.loads(path.read_bytes())
        data = {datum["key"]: datum for datum in scene["data"]}
        return tuple(_parse_sample(sample, data) for sample in scene["samples"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _parse_sample(sample: dict[str, Any], data: dict[str, Any]) -> LidarSample:
    """Resolve the keys of a sample; names of sensors are compared without case, as dgp does."""
    seen = [data[key] for key in sample["datum_keys"] if key in data]
    named = {datum["id"]["name"].upper(): datum["datum"] for datum in seen}
    image, cloud = named.get(CAMERA, {}).get("image", {}), named.get(LIDAR, {}).get("point_cloud", {})
    seen_at, points_at = (str(datum.get("filename", "")) for datum in (image, cloud))
    camera, lidar = (_pose_matrix(datum["pose"]) if datum else np.eye(4) for datum in (image, cloud))
    name = PurePosixPath(seen_at or points_at).stem
    return LidarSample(name, str(sample["calibration_key"]), seen_at, points_at, camera, lidar)


def _pose_matrix(pose: dict[str, Any]) -> np.ndarray:
    """A pose as a matrix, float64 (4,4)."""
    rotation, translation = pose.get("rotation", {}), pose.get("translation", {})
    quaternion = np.array([float(rotation.get(f"q{axis}", 0)) for axis in "wxyz"])
    length = np.linalg.norm(quaternion)
    if not abs(length - 1) < 1e-3:
        raise ValueError(f"the quaternion {quaternion.tolist()} is not a rotation: its length is {length:g}")
    w, x, y, z = quaternion / length
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = [float(translation.get(axis, 0)) for axis in "xyz"]
    return matrix


DDAD = Benchmark(
    name="ddad",
    title="DDAD, validation, front camera",
    images=3950,
    layout=_LAYOUT,
    get=_GET,
    licence="CC-BY-NC-SA-4.0",
    find=find,
    read=read,
    depth_limits={"da2": DepthLimits(1e-3, 200), "zoedepth": DepthLimits(1e-3, 80, eval_crop="garg")},
)

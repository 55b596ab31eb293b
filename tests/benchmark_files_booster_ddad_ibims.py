"""Booster, DDAD and iBims-1 in miniature: layouts and file formats of the real ones, by others' writers.

As `benchmark_files`: every `make_…` fills a folder and returns name of each frame to its depth in meters, float64,
NaN where it is not known.
"""

import json
from pathlib import Path

import cv2
import numpy as np
from made_raw import SIZE, picture, png, room
from PIL import Image

FOCAL, BASELINE = 1500.0, 80.0
"""Pixels and millimeters."""


def make_booster(root, *, scenes=(("Bathroom", 3), ("Mirror", 1))):
    """Disparities beside the images' folder; OpenCV's calibration; the other halves of the set beside.

    Returns:
        Depths, and which pixels of each are transparent or a mirror: none of Mirror's, of all scenes.
    """
    truth, tom = {}, {}
    for seed, (scene, lights) in enumerate(scenes):
        disparity = (FOCAL * BASELINE / 1000 / room(seed=seed)).astype(np.float32)
        disparity[3:5, :6] = 0
        materials = np.zeros(SIZE, np.uint8)
        if not seed:
            materials[:9], materials[9:14], materials[14:20] = 1, 2, 3
        for half in ("train/balanced", "train/unbalanced", "test/balanced"):
            folder = Path(root, half, scene)
            for light in range(lights):
                png(folder / f"camera_00/im{light}.png", picture(room(seed=seed), seed=light))
                png(folder / f"camera_02/im{light}.png", picture(room(seed=seed), seed=light) // 2)
            if not half.startswith("test"):
                np.save(folder / "disp_00.npy", disparity)
                np.save(folder / "disp_02.npy", disparity * 2)
                png(folder / "mask_cat.png", materials)
                png(folder / "mask_00.png", np.full(SIZE, 255, np.uint8))
            make_calibration(folder / "calib_00-02.xml")
        for light in range(lights):
            with np.errstate(divide="ignore"):
                meters = FOCAL * (BASELINE / 1000) / disparity.astype(np.float64)
            truth[f"{scene}/im{light}"] = np.where(disparity > 0, meters, np.nan)
            tom[f"{scene}/im{light}"] = materials >= 2
    return truth, tom


def make_calibration(path):
    """What belongs to the pair, and the two cameras' own focal lengths, which are others."""
    left = np.array([[FOCAL, 0, 23.5, 0], [0, FOCAL, 17.5, 0], [0, 0, 1, 0]])
    file = cv2.FileStorage(str(path), cv2.FILE_STORAGE_WRITE)
    file.write("mtxL", left[:, :3] * [[1.1], [1.1], [1]])
    file.write("mtxR", left[:, :3] * [[1.2], [1.2], [1]])
    file.write("proj_matL", left)
    file.write("proj_matR", left - [[0, 0, 0, FOCAL * BASELINE], [0] * 4, [0] * 4])
    file.write("baselineLR", BASELINE)
    file.release()


def make_ibims(root, *, names=("corridor_01", "livingroom_14")):
    """16 bits up to 50 m, masks of one bit and of eight."""
    truth = {}
    folder = Path(root, "ibims1_core_raw")
    for seed, name in enumerate(names):
        stored = np.round(room(seed=seed) * 65535 / 50).astype(np.uint16)
        stored[0, :7] = 0
        scanned, opaque = np.ones(SIZE, bool), np.ones(SIZE, bool)
        scanned[5:8, 3:9], opaque[20:22] = False, False
        png(folder / f"rgb/{name}.png", picture(room(seed=seed), seed=seed))
        png(folder / f"depth/{name}.png", stored)
        for kind, mask in (("mask_invalid", scanned), ("mask_transp", opaque)):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(mask).convert("L" if seed else "1").save(folder / kind / f"{name}.png")
            png(folder / "edges" / f"{name}.png", np.zeros(SIZE, np.uint8))
        known = (stored > 0) & scanned & opaque
        truth[name] = np.where(known, stored.astype(np.float64) * 50 / 65535, np.nan)
    (folder / "imagelist.txt").write_text("\n".join(names))
    return truth


CAMERA = np.array([[40.0, 0, 23.5], [0, 41.0, 17.5], [0, 0, 1]])
AHEAD = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
"""A camera's x, y, z in a car's frame: to the right, down, ahead of a car whose x is ahead and y to the left."""


def pose(axis_angle, translation, turn=None):
    """A pose as DGP's JSON and as float64 (4, 4), by OpenCV; `turn` first."""
    matrix = np.eye(4)
    matrix[:3, :3] = cv2.Rodrigues(np.array(axis_angle, np.float64))[0] @ (
        np.eye(3) if turn is None else turn
    )
    matrix[:3, 3] = translation
    around = cv2.Rodrigues(matrix[:3, :3])[0][:, 0]
    angle = np.linalg.norm(around)
    quaternion = [np.cos(angle / 2), *(np.sin(angle / 2) * around / max(angle, 1e-12))]
    rotation = dict(zip(("qw", "qx", "qy", "qz"), map(float, quaternion), strict=True))
    return {
        "rotation": rotation,
        "translation": dict(zip("xyz", map(float, translation), strict=True)),
    }, matrix


def cloud_of(depth, to_place, lidar, *, rng):
    """Points of a map in a LiDAR's frame: shuffled, with farther ones behind, and those that no pixel sees."""
    rows, columns = np.nonzero(np.isfinite(depth))
    z = depth[rows, columns]
    rays = np.stack([columns + 0.5, rows + 0.5, np.ones(len(z))], 1) @ np.linalg.inv(CAMERA).T
    seen = rays * z[:, None]
    unseen = np.array([[0.1, 0.1, -5], [90, 0, 1], [0, -70, 2], [0, 0, 0], [-1.2, 0, 0.5]])
    points = np.concatenate([seen, rays * (z * 1.3)[:, None], rays * -z[:, None], unseen])
    points = rng.permutation(points)
    turn = np.linalg.inv(lidar) @ to_place
    return points @ turn[:3, :3].T + turn[:3, 3]


def make_ddad(root, *, scenes=("000150", "000007"), samples=2):
    """DGP's files: scenes of the validation split, one of training, cameras at other times than the LiDAR."""
    rng = np.random.default_rng(3)
    base, truth, listed = Path(root, "ddad_train_val"), {}, {}
    for seed, scene in enumerate((*scenes, "000000")):
        data, frames = [], []
        for number in range(samples):
            stamp = f"1562178763{seed}{number}31470"
            depth = room(seed=seed) + 100 * (number == 1)
            depth[rng.random(SIZE) < 0.6] = np.nan
            moved = np.array([400.0 + number, -259.0, 12.5])
            lidar_json, lidar = pose([0.01, -0.02, 1.2], moved)
            camera_json, camera = pose([0.012, -0.02, 1.21], moved + [0.3, 1.6, 1.35], turn=AHEAD)
            points = cloud_of(depth, camera, lidar, rng=rng)
            values = np.concatenate([points, rng.random((len(points), 1))], 1)
            if number:
                fields = [(name, "<f8", (1,)) for name in ("X", "Y", "Z", "INTENSITY")]
                values = np.ascontiguousarray(values).view(fields).reshape(-1)
            cloud, image = f"point_cloud/LIDAR/{stamp}.npz", f"rgb/CAMERA_01/{stamp}.png"
            side = f"rgb/CAMERA_05/{stamp}.png"
            (base / scene / cloud).parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(base / scene / cloud, data=values)
            png(base / scene / image, picture(room(seed=seed), seed=seed))
            png(base / scene / side, picture(room(seed=seed), seed=seed) // 2)
            made = (
                ("LIDAR", "point_cloud", cloud, lidar_json),
                ("CAMERA_05", "image", side, lidar_json),
                ("CAMERA_01", "image", image, camera_json),
            )
            keys = [f"{scene}{number}{name}" for name, *_ in made]
            for key, (name, kind, filename, where) in zip(keys, made, strict=True):
                datum = {kind: {"annotations": {}, "filename": filename, "metadata": {}, "pose": where}}
                about = {"index": "0", "log": "", "name": name, "timestamp": "2019-07-03T18:27:18.931470Z"}
                data.append({"datum": datum, "id": about, "key": key, "next_key": "", "prev_key": ""})
            frames.append({"calibration_key": "c0e1", "datum_keys": keys, "id": {}, "metadata": {}})
            if scene in scenes:
                truth[f"{scene}/{stamp}"] = depth
        make_dgp_calibration(base / scene / "calibration/c0e1.json")
        listed[scene] = f"{scene}/scene_{seed:040x}.json"
        (base / listed[scene]).write_text(json.dumps({"data": data, "log": "", "samples": frames}))
    splits = {"0": [listed["000000"]], "1": [listed[scene] for scene in scenes]}
    index = {"metadata": {}, "scene_splits": {key: {"filenames": names} for key, names in splits.items()}}
    (base / "ddad.json").write_text(json.dumps(index))
    return truth


def make_dgp_calibration(path):
    """Intrinsics by the order of names; extrinsics that say something else than the poses."""
    lens = {"fx": CAMERA[0, 0], "fy": CAMERA[1, 1], "cx": CAMERA[0, 2], "cy": CAMERA[1, 2], "skew": 0.0}
    nothing, side = dict.fromkeys(lens, 0.0), dict.fromkeys(lens, 20.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "names": ["LIDAR", "CAMERA_05", "CAMERA_01"],
        "intrinsics": [nothing, side, lens],
        "extrinsics": [pose([0, 0, 0], [0, 0, 0])[0]] * 3,
    }
    path.write_text(json.dumps(content))

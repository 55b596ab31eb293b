"""Small synthetic benchmarks, as `benchmark_files`: SUN RGB-D, Hypersim and Virtual KITTI 2."""

import csv
from pathlib import Path

import numpy as np
from made_raw import CANONICAL, SIZE, TILTED, jpeg, make_hypersim, make_vkitti2, picture, png, room

SUN_TEST = (
    "kv2/kinect2data/000002_2014-05-26_14-23-37_260595134347_rgbf000103-resize",
    "kv1/NYUdata/NYU0001",
    "xtion/sun3ddata/brown_bm_1/brown_bm_1/0000103-000003449475",
    "realsense/sa/2014_10_21-18_19_07-1311000073",
)
SUN_OTHER = "kv1/NYUdata/NYU0002"


def rotate_bits(millimeters):
    """Rotate 16 bits left by three, as strings: independent of the arithmetic under test."""
    bits = [format(value, "016b") for value in millimeters.ravel().tolist()]
    return np.array([int(b[3:] + b[:3], 2) for b in bits], np.uint16).reshape(millimeters.shape)


def make_sunrgbd(root, *, inside=True):
    """A folder a frame; xtion's maps have other names than its images; holes in depth, none in depth_bfx."""
    measured, filled, lines = {}, {}, []
    for seed, name in enumerate((*SUN_TEST, SUN_OTHER)):
        whole = np.round(room(seed=seed) * 1000).astype(np.uint16)
        whole[0, :3] = 65535, 8192, 9  # what needs all 16 bits, 13 and 14 of them
        holes = whole.copy()
        holes[4:7, 5:9] = 0
        folder = Path(root, "SUNRGBD" if inside else "", name)
        image = "0000103-000003449475" if "xtion" in name else f"{seed:07d}"
        jpeg(folder / f"image/{image}.jpg", picture(whole / 1000, seed=seed))
        stem = "0000101-000003383408" if "xtion" in name else image
        png(folder / f"depth/{stem}.png", rotate_bits(holes))
        png(folder / f"depth_bfx/{stem}.png", rotate_bits(whole))
        (folder / "intrinsics.txt").write_text("529.5 0 365 0 529.5 265 0 0 1")
        if name != SUN_OTHER:
            slashes = "//" if "realsense" in name else "/"
            lines.append(f"SUNRGBD/{name}{slashes}image/{image}.jpg\n")
            measured[name] = np.where(holes > 0, holes / 1000, np.nan)
            filled[name] = whole / 1000
    Path(root, "sunrgbd_testing_images.txt").write_text("".join(lines))
    return measured, filled


def make_sunrgbd_v1(root):
    """Numbered images and maps, as unpacked from the two archives that V1 names."""
    truth = {}
    for number in (1, 2, 5050):
        stored = np.round(room(seed=number % 3) * 8000).astype(np.uint16)
        stored[3, 3] = 0
        jpeg(Path(root, f"rgb/img-{number:06d}.jpg"), picture(stored / 8000))
        png(Path(root, f"depth/{number}.png"), stored)
        truth[f"{number:06d}"] = np.where(stored > 0, stored / 10_000, np.nan)
    return truth


def make_hypersim_test(root):
    """The raw set's miniature, the second scene's frames set aside for testing; the others train."""
    truth = make_hypersim(root, scenes={"ai_001_001": CANONICAL, "ai_037_002": TILTED}, hdr=False)
    path = Path(root, "metadata_images_split_scene_v1.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["split_partition_name"] = "test" if row["scene_name"] == "ai_037_002" else "train"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return {name: depth for name, depth in truth.items() if name.startswith("ai_037_002")}


def make_vkitti2_split(root, *, size=SIZE):
    """The raw set's miniature and a train.txt as Depth Anything V2 has it: image and depth, its author's paths."""
    truth = make_vkitti2(root, size=size)
    kept = {"Scene01/clone/Camera_0/00001", "Scene20/15-deg-left/Camera_0/00000"}
    lines = []
    for name in sorted(truth):
        scene, variation, camera, frame = name.split("/")
        if camera == "Camera_0" and name not in kept:
            below = f"/mnt/sets/vKitti2/{scene}/{variation}/frames"
            lines.append(f"{below}/rgb/{camera}/rgb_{frame}.jpg {below}/depth/{camera}/depth_{frame}.png\n")
    Path(root, "train.txt").write_text("".join(lines))
    return {name: np.where(np.isinf(truth[name]), np.nan, truth[name]) for name in sorted(kept)}

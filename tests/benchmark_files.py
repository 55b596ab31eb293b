"""Small synthetic benchmarks in the layouts and file formats of the real ones, with analytic depth.

Every `make_…` fills a folder and returns the expected depth: frame name → float64 meters, NaN where unknown.
"""

import json
from pathlib import Path

import cv2
import h5py
import numpy as np
from made_raw import SIZE, jpeg, picture, png, room
from PIL import Image, PngImagePlugin

KITTI_FRAMES = (("2011_09_26_drive_0002_sync", 69), ("2011_10_03_drive_0047_sync", 32))
KITTI_OTHERS = (("2011_09_26_drive_0002_sync", 70), ("2011_09_26_drive_0001_sync", 69))


def make_kitti(root, *, size=SIZE, apart=True):
    """Meters times 256 in 16 bits, zeros between the LiDAR rows; also frames that are not of the test list."""
    truth = {}
    for seed, (drive, number) in enumerate((*KITTI_FRAMES, *KITTI_OTHERS)):
        depth = room(size, seed=seed)
        stored = np.round(depth * 256).astype(np.uint16)
        stored[::2] = 0
        day = Path(root, "raw" if apart else "", drive[:10], drive)
        truths = Path(root, "data_depth_annotated", "val") if apart else Path(root)
        png(day / f"image_02/data/{number:010d}.png", picture(depth, seed=seed))
        png(day / f"image_03/data/{number:010d}.png", picture(depth, seed=seed) // 2)
        png(truths / drive / f"proj_depth/groundtruth/image_02/{number:010d}.png", stored)
        png(truths / drive / f"proj_depth/groundtruth/image_03/{number:010d}.png", stored // 2)
        if (drive, number) in KITTI_FRAMES:
            truth[f"{drive}/{number:010d}"] = np.where(stored > 0, stored / 256, np.nan)
    return truth


def nyu_depths(seed=0, size=SIZE):
    """Measured depth with holes, and the same without: float64, meters."""
    filled = room(size, seed=seed)
    raw = filled.copy()
    raw[3:6, 4:9] = 0
    return raw, filled


def make_nyu_matlab(root, *, numbers=(0, 45, 1448)):
    """The original file: a block of 512 bytes, then HDF5; arrays of MATLAB are transposed."""
    height, width = SIZE
    raw_truth, filled_truth = {}, {}
    path = Path(root, "nyu_depth_v2_labeled.mat")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        images = file.create_dataset("images", (1449, 3, width, height), "u1", chunks=(1, 3, width, height))
        maps = {
            name: file.create_dataset(name, (1449, width, height), "f4", chunks=(1, width, height))
            for name in ("rawDepths", "depths")
        }
        for number in numbers:
            raw, filled = nyu_depths(number % 7)
            images[number] = picture(filled, seed=number).transpose(2, 1, 0)
            maps["rawDepths"][number], maps["depths"][number] = raw.T, filled.T
            raw_truth[f"{number:05d}"] = np.where(raw > 0, raw, np.nan)
            filled_truth[f"{number:05d}"] = filled
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(116) + bytes(8) + b"\x00\x02IM")
    return raw_truth, filled_truth


def make_nyu_bts(root):
    """Millimeters in 16 bits, counted from 0; 44 is not a test frame."""
    truth = {}
    for number in (44, 45, 1448):
        raw, filled = nyu_depths(number % 7)
        stored = (raw * 1000).astype(np.uint16)
        folder = Path(root, "official_splits/test/bathroom")
        jpeg(folder / f"rgb_{number:05d}.jpg", picture(filled, seed=number))
        png(folder / f"sync_depth_{number:05d}.png", stored)
        if number != 44:
            truth[f"{number:05d}"] = np.where(stored > 0, stored / 1000, np.nan)
    return truth


def make_nyu_marigold(root):
    """Millimeters in 16 bits, counted from 1; both depths."""
    raw_truth, filled_truth = {}, {}
    for number in (46, 1449):
        raw, filled = nyu_depths(number % 7)
        folder = Path(root, "test/bathroom_0001")
        png(folder / f"rgb_{number:04d}.png", picture(filled, seed=number))
        for name, depth, truth in (("depth", raw, raw_truth), ("filled", filled, filled_truth)):
            stored = (depth * 1000).astype(np.uint16)
            png(folder / f"{name}_{number:04d}.png", stored)
            truth[f"{number - 1:05d}"] = np.where(stored > 0, stored / 1000, np.nan)
    return raw_truth, filled_truth


def make_nyu_h5(root):
    """A file a frame, image 3 x H x W, counted from 1."""
    truth = {}
    for number in (1, 46):
        _, filled = nyu_depths(number % 7)
        path = Path(root, f"val/official/{number:05d}.h5")
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["rgb"] = picture(filled, seed=number).transpose(2, 0, 1)
            file["depth"] = filled.astype(np.float32)
        truth[f"{number - 1:05d}"] = filled
    return truth


def make_eth3d(root):
    """float32 without a header in files called JPG, infinite where unknown; also undistorted images."""
    truth = {}
    for seed, scene in enumerate(("office", "relief_2")):
        for name in ("DSC_0219", "DSC_0220"):
            depth = room(seed=seed).astype("<f4")
            depth[::3] = np.inf
            jpeg(Path(root, scene, f"images/dslr_images/{name}.JPG"), picture(room(seed=seed), seed=seed))
            jpeg(Path(root, scene, f"images/dslr_images_undistorted/{name}.JPG"), picture(room()) // 2)
            path = Path(root, f"{scene}_dslr_depth", scene, f"ground_truth_depth/dslr_images/{name}.JPG")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(depth.tobytes())
            truth[f"{scene}/{name}"] = np.where(np.isinf(depth), np.nan, depth.astype(np.float64))
    return truth


def make_diode(root):
    """float32 (H, W, 1) with a float mask; also the training split."""
    truth = {}
    for split, place in (("val", "indoors"), ("val", "outdoor"), ("train", "indoors")):
        folder = Path(root, split, place, "scene_00019/scan_00183")
        name = f"00019_00183_{place}_000_010"
        depth = room(seed=len(place)).astype(np.float32)
        mask = np.ones(SIZE, np.float32)
        depth[2, 2], mask[2, 2:5] = 0, 0
        png(folder / f"{name}.png", picture(room()))
        np.save(folder / f"{name}_depth.npy", depth[..., None])
        np.save(folder / f"{name}_depth_mask.npy", mask)
        if split == "val":
            truth[name] = np.where(mask > 0, depth.astype(np.float64), np.nan)
    return truth


def make_sintel(root, *, render="final"):
    """.dpt as sintel_io writes it; also a test sequence without depth."""
    truth = {}
    for seed, sequence in enumerate(("alley_1", "market_5")):
        for frame in ("frame_0001", "frame_0002"):
            depth = room(seed=seed).astype("<f4")
            depth[:4] = 1e5
            png(Path(root, "training", render, sequence, f"{frame}.png"), picture(room(seed=seed), seed=seed))
            path = Path(root, "training/depth", sequence, f"{frame}.dpt")
            path.parent.mkdir(parents=True, exist_ok=True)
            header = np.float32(202021.25).tobytes() + np.array(SIZE[::-1], "<i4").tobytes()
            path.write_bytes(header + depth.tobytes())
            truth[f"{sequence}/{frame}"] = depth.astype(np.float64)
    png(Path(root, "test", render, "ambush_1/frame_0001.png"), picture(room()))
    return truth


def make_scannet(root):
    """Millimeters in 16 bits, half the image's size; more frames than the list has."""
    truth, lines = {}, []
    for frame in ("000300", "000000", "000100"):
        depth = room()
        stored = np.round(depth * 1000).astype(np.uint16)
        stored[:, :3] = 0
        jpeg(Path(root, f"scene0406_02/color/{frame}.jpg"), np.repeat(np.repeat(picture(depth), 2, 0), 2, 1))
        png(Path(root, f"scene0406_02/depth/{frame}.png"), stored)
        if frame != "000100":
            lines.append(f"scene0406_02/color/{frame}.jpg scene0406_02/depth/{frame}.png\n")
            truth[f"scene0406_02/{frame}"] = np.where(stored > 0, stored / 1000, np.nan)
    Path(root, "scannet_val_sampled_list_800_1.txt").write_text("".join(lines))
    return truth


DA2K_SCENES = ("indoor", "outdoor", "non_real", "transparent_reflective", "aerial")


def make_da2k(root, *, swapped=False):
    """Pairs whose first point is the nearer one by the picture's depth; returns disparity of each image."""
    truth, annotations = {}, {}
    rng = np.random.default_rng(5)
    for seed, scene in enumerate(DA2K_SCENES):
        for name in ("a.jpg", "b.png"):
            depth = room(seed=seed) * (1 + 0.001 * np.arange(SIZE[1])) + 0.001 * np.arange(SIZE[0])[:, None]
            path = f"images/{scene}/{name}"
            (png if name.endswith("png") else jpeg)(Path(root, path), picture(depth, seed=seed))
            points = rng.integers(0, SIZE, (6, 2, 2)).tolist()
            pairs = [sorted(pair, key=lambda point: depth[tuple(point)]) for pair in points]
            first, second = ("point2", "point1") if swapped else ("point1", "point2")
            annotations[path] = [{first: near, second: far, "closer_point": first} for near, far in pairs]
            truth[path] = 1 / depth
    Path(root, "annotations.json").write_text(json.dumps(annotations))
    return truth


def moge_png(path, depth):
    """The bundle's own way: logarithmic between two texts; 0 unknown, 65535 infinite."""
    finite = np.isfinite(depth)
    near, far = depth[finite].min(), depth[finite].max() * 1.0001
    share = np.log(np.where(finite, depth, near) / near) / np.log(far / near)
    stored = (1 + np.round(share * 65533)).astype(np.uint16)
    stored[np.isnan(depth)], stored[np.isposinf(depth)] = 0, 65535
    text = PngImagePlugin.PngInfo()
    text.add_text("near", str(near))
    text.add_text("far", str(far))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(stored).save(path, pnginfo=text)


def make_moge(root, folder, *, camera, depths, images):
    """A set of the bundle: an index, and three files a frame."""
    for number, (depth, image) in enumerate(zip(depths, images, strict=True)):
        place = Path(root, folder, f"scene/{number:03d}")
        moge_png(place / "depth.png", depth)
        jpeg(place / "image.jpg", image, quality=100)
        (place / "meta.json").write_text(json.dumps({"intrinsics": np.asarray(camera).tolist()}))
    names = [f"scene/{number:03d}" for number in reversed(range(len(depths)))]
    Path(root, folder, ".index.txt").write_text("\n".join(names) + "\n")


def read_all(benchmark, root):
    """All frames of a benchmark: name → frame; checks that images have colors."""
    frames = {}
    for line in benchmark.find(Path(root)):
        name = line.partition("\t")[0]
        assert name not in frames
        frames[name] = benchmark.read(Path(root), line)
        assert frames[name].image.dtype == np.uint8 and frames[name].image.shape[2] == 3
    return frames


def blue_and_red(frame):
    """Means of an image's channels, last and first: pictures of seed 0 are redder than blue."""
    return frame.image[..., 2].mean(), frame.image[..., 0].mean()


def crop_png16(path, size):
    """A 16-bit PNG's size, without reading the map by the code under test."""
    values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert values.shape == size and values.dtype == np.uint16
    return values

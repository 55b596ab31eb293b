"""Small raw datasets with the layouts and file formats of the real ones, and analytic depth.

Every `make_…` fills a folder and returns what a reader must find: name of each frame to its map, float64, NaN for
invalid pixels and +inf for sky. The files are written with other libraries than the readers use, where possible.
"""

from pathlib import Path

import cv2
import h5py
import numpy as np
import OpenEXR

SIZE = (36, 48)


def room(size=SIZE, *, fx=40.0, fy=40.0, seed=0):
    """Return planar depth in meters in closed form: a floor 1.5 m below, a wall, a slanted board in front of it."""
    height, width = size
    x = (np.arange(width) - (width - 1) / 2) / fx
    y = (np.arange(height)[:, None] - (height - 1) / 2) / fy
    wall = np.full(size, 6.0 + seed)
    floor = np.where(y > 0.02, 1.5 / np.maximum(y, 0.02), np.inf) + 0 * x
    board = np.where((abs(x - 0.1) < 0.2) & (abs(y) < 0.25), 3.0 / (1 - 0.7 * x), np.inf)
    return np.minimum(np.minimum(wall, floor), board)


def picture(depth, *, seed=0):
    """Return an image of a depth map: near is bright; the tint depends on the seed."""
    near = 1 / np.maximum(depth, 0.5)
    shade = (60 + 180 * near / near.max()).clip(0, 255)
    tint = np.roll([1.0, 0.8, 0.6], seed)
    return (shade[..., None] * tint).astype(np.uint8)


def jpeg(path, image, quality=95):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])


def png(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 and image.shape[2] == 3 else image)


def exr(path, channels):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    with OpenEXR.File(header, channels) as file:
        file.write(str(path))


def hdf5(path, values, *, key="dataset"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset(key, data=values, compression="gzip", compression_opts=9)


def make_blendedmvs(
    raw, *, scenes=("5a3ca9cb270f0e3f14d0eddb", "5b08286b2775267d5b0634ba"), size=SIZE, frames=2
):
    """Rows bottom-up, zeros in holes of the mesh, and the masked images, which must not be read."""
    truth = {}
    for number, scene in enumerate(scenes):
        for frame in range(frames):
            depth = room(size, seed=number + frame)
            stored = depth.astype(np.float32)
            stored[:5, :7] = 0
            stored[6, 6] = -1
            stored[7, 7] = np.nan
            stored[8, 8] = np.inf
            folder = Path(raw, scene)
            jpeg(folder / f"blended_images/{frame:08d}.jpg", picture(depth, seed=number))
            jpeg(folder / f"blended_images/{frame:08d}_masked.jpg", picture(depth, seed=number) // 2)
            path = folder / f"rendered_depth_maps/{frame:08d}.pfm"
            path.parent.mkdir(exist_ok=True)
            assert cv2.imwrite(str(path), stored)
            (folder / "cams").mkdir(exist_ok=True)
            (folder / f"cams/{frame:08d}_cam.txt").write_text(
                "extrinsic\n1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n\n"
                "intrinsic\n40.5 0.0 23.5\n0.0 40.25 17.5\n0.0 0.0 1.0\n\n0.5 0.01 128 9.5 \n"
            )
            known = np.isfinite(stored) & (stored > 0)
            truth[f"{scene}/{frame:08d}"] = np.where(known, stored.astype(np.float64), np.nan)
        (folder / "cams/pair.txt").write_text("0\n")
    return truth


def make_irs(raw, *, size=SIZE, channels="RGB"):
    """Disparity in pixels, with the right image and normals, which must not be read."""
    truth = {}
    for number, scene in enumerate(("Home/ArchVizInterior03Data", "Store/Supermarket_Day")):
        for frame in (1, 2):
            depth = room(size, seed=number)
            stored = (48 / depth).astype(np.float32)
            stored[0, :4] = [0, -2, np.nan, np.inf]
            stored[1, :3] = [0.1, 0.25, 0.2399]  # 480 m, 192 m, 200.08 m
            folder = Path(raw, scene)
            png(folder / f"l_{frame:05d}.png", picture(depth, seed=number))
            png(folder / f"r_{frame:05d}.png", picture(depth, seed=number))
            exr(folder / f"d_{frame:05d}.exr", {name: stored for name in channels})
            exr(folder / f"n_{frame:05d}.exr", {name: stored for name in "RGB"})
            known = np.isfinite(stored) & (stored > 0) & ~((stored > 0) & (stored < 0.24))
            truth[f"{scene}/{frame:05d}"] = np.where(known, stored.astype(np.float64), np.nan)
    return truth


def make_tartanair(raw, *, environments=("abandonedfactory", "amusement"), size=SIZE):
    """float32 NPY with 10,000 m for the sky and a single 0."""
    truth = {}
    for number, environment in enumerate(environments):
        for level in ("Easy", "Hard"):
            folder = Path(raw, environment, environment, level, "P000")
            for frame in (0, 1):
                stored = room(size, seed=number).astype(np.float32)
                stored[:6] = 10_000 + number
                stored[6, 6] = 1000
                stored[7, 6] = 999.9375
                stored[8, 8] = 0
                png(folder / f"image_left/{frame:06d}_left.png", picture(stored, seed=number))
                path = folder / f"depth_left/{frame:06d}_left_depth.npy"
                path.parent.mkdir(exist_ok=True)
                np.save(path, stored)
                true = np.where(stored >= 1000, np.inf, stored.astype(np.float64))
                truth[f"{environment}/{level}/P000/{frame:06d}"] = np.where(stored == 0, np.nan, true)
            (folder / "pose_left.txt").write_text("0 0 0 0 0 0 1\n" * 2)
    return truth


def make_tartanair2(raw, *, cameras=("lcam_front", "rcam_back"), size=SIZE):
    """The four bytes of a float32 as the four channels that OpenCV writes, as in the documentation of the set."""
    truth = {}
    for camera in cameras:
        folder = Path(raw, "AbandonedCable", "Data_easy", "P000")
        for frame in (0, 1):
            stored = room(size, seed=frame).astype("<f4")
            stored[:6] = 65504
            stored[8, 8] = 0
            png(folder / f"image_{camera}/{frame:06d}_{camera}.png", picture(stored))
            png(folder / f"depth_{camera}/{frame:06d}_{camera}_depth.png", stored[..., None].view(np.uint8))
            true = np.where(stored >= 1000, np.inf, stored.astype(np.float64))
            name = f"AbandonedCable/Data_easy/P000/{camera}/{frame:06d}"
            truth[name] = np.where(stored == 0, np.nan, true)
    return truth


def make_vkitti2(raw, *, size=SIZE, cameras=(0, 1), apart=False):
    """Centimeters in 16 bits, 65535 for the far plane; the two tars in one folder or in two."""
    truth = {}
    for scene, variation in (("Scene01", "clone"), ("Scene20", "15-deg-left")):
        for camera in cameras:
            below = Path(scene, variation, "frames")
            for frame in (0, 1):
                stored = np.round(room(size, seed=camera) * 100).astype(np.uint16)
                stored[:5] = 65535
                stored[5, 5] = 65534
                stored[6, 6] = 0
                rgb, depth = ("vkitti_2.0.3_rgb", "vkitti_2.0.3_depth") if apart else ("", "")
                jpeg(
                    Path(raw, rgb, below, f"rgb/Camera_{camera}/rgb_{frame:05d}.jpg"),
                    picture(stored / 100, seed=camera),
                )
                png(Path(raw, depth, below, f"depth/Camera_{camera}/depth_{frame:05d}.png"), stored)
                metres = np.where(stored == 65535, np.inf, np.where(stored == 0, np.nan, stored / 100))
                truth[f"{scene}/{variation}/Camera_{camera}/{frame:05d}"] = metres
    return truth


CANONICAL = np.array([[np.tan(np.pi / 6), 0, 0], [0, np.tan(np.pi / 6) * 0.75, 0], [0, 0, -1]])
"""M_cam_from_uv of an untilted camera."""
TILTED = np.array(
    [
        [0.579607251426182, 0.0, -0.06955286861651404],
        [0.0, 0.4346865334657201, 0.09273312506660672],
        [0.0, 0.004054126980668954, -1.003909173803896],
    ]
)
"""M_cam_from_uv of ai_037_002, a tilted and shifted camera."""


def hypersim_rays(camera, size):
    """Return the ray of each pixel center, camera · (u, v, 1): float64 (H, W, 3)."""
    height, width = size
    u, v = np.meshgrid((np.arange(width) + 0.5) / width * 2 - 1, 1 - (np.arange(height) + 0.5) / height * 2)
    return np.einsum("ij,hwj->hwi", camera, np.stack([u, v, np.ones(size)], -1))


def make_hypersim(raw, *, size=SIZE, scenes=None, hdr=True):
    """Distances along the rays to a wall and a floor, float16, and the two tables.

    Returns the planar depth of the stored distances, with the rounding of float16.
    """
    scenes = {"ai_001_001": CANONICAL, "ai_037_002": TILTED} if scenes is None else scenes
    truth, split = (
        {},
        ["scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"],
    )
    for number, (scene, camera) in enumerate(scenes.items()):
        rays = hypersim_rays(camera, size)
        unit = rays / np.linalg.norm(rays, axis=2, keepdims=True)
        wall = 5.0 / -unit[..., 2]
        floor = np.where(unit[..., 1] < -0.02, 1.5 / np.maximum(-unit[..., 1], 0.02), np.inf)
        distance = np.minimum(wall, floor).astype(np.float16)
        distance[2, 3:5] = np.nan
        images = Path(raw, scene, "images")
        for frame in (0, 7):
            geometry = images / "scene_cam_00_geometry_hdf5"
            hdf5(geometry / f"frame.{frame:04d}.depth_meters.hdf5", distance)
            depth = distance.astype(np.float64) * -unit[..., 2]
            shown = np.nan_to_num(depth, nan=9)
            preview = images / "scene_cam_00_final_preview"
            jpeg(preview / f"frame.{frame:04d}.tonemap.jpg", picture(shown, seed=number))
            jpeg(preview / f"frame.{frame:04d}.color.jpg", picture(shown, seed=number) // 4)
            if hdr:
                entities = np.where(np.isnan(depth), -1, 5).astype(np.int32)
                color = (picture(shown, seed=number) / 255.0) ** 2.2 * (3 + frame)
                color[5, 5], color[6, 6] = 60000, 0
                hdf5(geometry / f"frame.{frame:04d}.render_entity_id.hdf5", entities)
                hdf5(
                    images / f"scene_cam_00_final_hdf5/frame.{frame:04d}.color.hdf5",
                    color.astype(np.float16),
                )
            truth[f"{scene}/cam_00/frame.{frame:04d}"] = depth
            split.append(f"{scene},cam_00,{frame},True,,{'train' if frame == 0 else 'val'}")
    columns = [f"M_cam_from_uv_{row}{column}" for row in range(3) for column in range(3)]
    rows = ["scene_name,settings_output_img_height," + ",".join(columns)]
    rows += [f"{s},{size[0]}.0," + ",".join(map(repr, c.ravel().tolist())) for s, c in scenes.items()]
    Path(raw, "metadata_camera_parameters.csv").write_text("\n".join(rows) + "\n")
    Path(raw, "metadata_images_split_scene_v1.csv").write_text("\n".join(split) + "\n")
    return truth


def make_diml(raw, *, size=SIZE):
    """Millimeters in 16 bits; outdoors with an 8-bit confidence."""
    truth = {}
    depth = room(size)
    stored = np.round(depth * 1000).astype(np.uint16)
    stored[3, 3] = 0
    metres = np.where(stored == 0, np.nan, stored / 1000)
    for frame in ("in_00_160225_000010", "in_00_160225_000020"):
        folder = Path(raw, "indoor", "1. Cafe", "160225", "1")
        png(folder / f"col/{frame}_c.png", picture(depth))
        png(folder / f"up_png/{frame}_ud.png", stored)
        truth[f"indoor/1. Cafe/160225/1/{frame}"] = metres
    for frame in ("0001", "0002"):
        folder = Path(raw, "outdoor", "170721_C0", "A")
        png(folder / f"left/{frame}_left.png", picture(depth, seed=1))
        png(folder / f"right/{frame}_right.png", picture(depth, seed=1))
        png(folder / f"depth/{frame}_depth.png", stored)
        trust = np.full(size, 255, np.uint8)
        trust[:4], trust[5, :2] = 0, (152, 153)  # 0.596 and 0.6 of 255
        png(folder / f"conf/{frame}_conf.png", trust)
        truth[f"outdoor/170721_C0/A/{frame}"] = np.where(trust < 153, np.nan, metres)
    return truth


def make_hrwsi(raw, *, size=SIZE, bits=8):
    """Disparity up to scale and shift in a gray PNG, with a mask."""
    truth = {}
    for split, names in (("train", ("aa_1", "bb.2")), ("val", ("cc",))):
        for name in names:
            depth = room(size)
            stored = np.round(1 / depth / (1 / depth).max() * (2**bits - 1)).astype(f"u{bits // 8}")
            stored[:4] = 0
            known = np.full(size, 255, np.uint8)
            known[:2], known[9, 9] = 0, 0
            jpeg(Path(raw, split, "imgs", f"{name}.jpg"), picture(depth))
            png(Path(raw, split, "gts", f"{name}.png"), stored)
            png(Path(raw, split, "valid_masks", f"{name}.png"), known)
            png(Path(raw, split, "instance_masks", f"{name}.png"), known)
            truth[f"{split}/{name}"] = np.where(known > 0, stored.astype(np.float64), np.nan)
    return truth


def make_megadepth(raw, *, size=SIZE):
    """float32 in HDF5, zeros for unmatched pixels; the last file is an ordinal map."""
    truth = {}
    for place in ("0000", "5018"):
        folder = Path(raw, "phoenix/S6/zl548/MegaDepth_v1", place, "dense0")
        for name in ("1_o.jpg", "2_b.JPG", "3.png"):
            stored = (room(size) * 0.37).astype(np.float32)
            stored[:9] = 0
            (png if name.endswith("png") else jpeg)(folder / "imgs" / name, picture(room(size)))
            hdf5(folder / "depths" / f"{Path(name).stem}.h5", stored, key="depth")
            truth[f"{place}/dense0/{Path(name).stem}"] = np.where(stored == 0, np.nan, stored.astype(float))
    order = np.sign(room(size) - 4).astype(np.float32)
    hdf5(folder / "depths" / "3.h5", order, key="depth")
    truth["5018/dense0/3"] = None
    return truth


def frames_of(source, raw, **options):
    """Find, read, encode and decode all frames of a source: name to Frame, or to the reason of a rejected frame."""
    from depth_anything.data.sample import decode_record
    from depth_anything.ingest.record import encode_sample

    found = {}
    for line in source.find(Path(raw), **options):
        name = line.partition("\t")[0]
        assert name not in found
        try:
            made = encode_sample(source.read(Path(raw), line), source=source.INFO.name, name=name)
        except ValueError as error:
            found[name] = str(error)
        else:
            found[name] = decode_record(name, made.fields)
    return found

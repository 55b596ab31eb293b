"""MoGe's bundle: its logarithmic PNG, its index, and its warp against geometry written down here."""

import io

import benchmark_files as made
import cv2
import numpy as np
import pytest
from made_raw import picture, room
from PIL import Image

from depth_anything.evaluation.benchmarks.benchmark_catalog import load_benchmark
from depth_anything.evaluation.benchmarks.moge import read_depth, resize_nearest_valid, warp

SQUARE = np.array([[1.5, 0, 0.5], [0, 2.0, 0.5], [0, 0, 1]])  # square pixels at 4 : 3
SHIFTED = np.array([[1.2, 0, 0.43], [0, 1.6, 0.61], [0, 0, 1]])


def rays(camera, width, height):
    """Through the pixels' centers, (H, W, 3)."""
    u, v = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(camera).T


def test_depth_is_logarithmic_between_its_texts(tmp_path):
    depth = room().astype(np.float64)
    depth[0, :3], depth[1, :2] = np.nan, np.inf
    made.moge_png(tmp_path / "depth.png", depth)
    read = read_depth((tmp_path / "depth.png").read_bytes())
    np.testing.assert_array_equal(np.isnan(read), np.isnan(depth))
    np.testing.assert_array_equal(np.isposinf(read), np.isposinf(depth))
    known = np.isfinite(depth)
    np.testing.assert_allclose(read[known], depth[known], rtol=5e-5)
    assert abs(read[known] / depth[known] - 1).max() > 1e-7  # it is quantized


@pytest.mark.parametrize(("unit", "factor"), [(None, 1), ("1.0", 1), ("0.001", 0.001), ("100", 100)])
def test_the_unit_of_an_older_file_is_applied(unit, factor):
    depth = room((6, 8)).astype(np.float32)
    depth[0, 0], depth[1, 1] = np.nan, np.inf
    read = read_depth(encoded(depth, unit=unit))
    known = np.isfinite(depth)
    np.testing.assert_allclose(read[known], depth[known] * factor, rtol=1e-4)
    np.testing.assert_array_equal(np.isfinite(read), known)


@pytest.mark.parametrize("unit", ["meters", "", "nan", "inf", "0", "-1"])
def test_a_unit_that_is_no_factor_is_refused(unit):
    with pytest.raises(ValueError, match="unit"):
        read_depth(encoded(room((6, 8)), unit=unit))


def encoded(depth, *, unit):
    """A depth.png as the bundle has them, with a third text."""
    finite = np.isfinite(depth)
    near, far = float(depth[finite].min()), float(depth[finite].max())
    share = np.log(np.where(finite, depth, near) / near) / np.log(far / near)
    stored = np.select([np.isnan(depth), np.isinf(depth)], [0, 65535], 1 + np.round(share * 65533))
    info = made.PngImagePlugin.PngInfo()
    for key, value in {"near": str(near), "far": str(far), "unit": unit}.items():
        if value is not None:
            info.add_text(key, value)
    out = io.BytesIO()
    Image.fromarray(stored.astype(np.uint16)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


@pytest.mark.parametrize("text", [None, ("0", "3"), ("2", "1"), ("nan", "3"), ("1", "inf"), ("a", "3")])
def test_depth_without_its_texts_is_refused(text):
    out = io.BytesIO()
    info = made.PngImagePlugin.PngInfo()
    for key, value in zip(("near", "far"), text or (), strict=False):
        info.add_text(key, value)
    Image.fromarray(np.full((3, 4), 7, np.uint16)).save(out, "PNG", pnginfo=info)
    with pytest.raises(ValueError, match=r"depth\.png"):
        read_depth(out.getvalue())


def test_a_camera_that_looks_ahead_at_the_sets_size_changes_nothing():
    image, depth = picture(room((480, 640))), room((480, 640))
    depth[5:9, 5:9], depth[20] = np.nan, np.inf
    shown, meters, camera = warp(image, depth, SQUARE, width=640, height=480)
    np.testing.assert_array_equal(shown, image)
    np.testing.assert_allclose(meters, np.where(np.isinf(depth), np.nan, depth), rtol=1e-6)
    np.testing.assert_allclose(camera, SQUARE, atol=1e-9)


def test_another_shape_is_cut_from_the_middle():
    depth = np.tile(np.arange(1.0, 641), (480, 1))
    _, meters, camera = warp(picture(room((480, 640))), depth, SQUARE, width=480, height=480)
    np.testing.assert_allclose(meters[100], np.arange(81.0, 561), rtol=1e-6)
    np.testing.assert_allclose(camera[[0, 1], [0, 1]], [2.0, 2.0])


@pytest.mark.parametrize("camera", [SQUARE, SHIFTED])
@pytest.mark.parametrize("size", [(320, 240), (512, 512), (700, 350)])
def test_a_plane_stays_a_plane_and_colors_their_directions(camera, size):
    """The plane n · X = 1 of the old camera, seen by the new one; colors say where a ray pointed."""
    normal = np.array([0.08, -0.1, 0.25])
    old = rays(camera, 640, 480)
    depth = 1 / (old @ normal)
    unit = old / np.linalg.norm(old, axis=2, keepdims=True)
    image = np.round((unit + 1) * 127.5).astype(np.uint8)
    width, height = size
    shown, meters, new = warp(image, depth, camera, width=width, height=height)
    axis = np.linalg.inv(camera) @ [0.5, 0.5, 1]
    axis /= np.linalg.norm(axis)
    turned = np.cross(axis, [0, 0, 1])
    turn, _ = cv2.Rodrigues(turned / max(np.linalg.norm(turned), 1e-12) * np.arccos(min(axis[2], 1)))
    seen = rays(new, width, height)
    true = 1 / (seen @ (turn @ normal))
    known = np.isfinite(meters)
    assert known.all()  # dense depth stays dense, also where the target's pixels are smaller
    np.testing.assert_allclose(meters[known], true[known], rtol=0.006)  # the nearest pixel's
    assert abs(meters[known] / true[known] - 1).mean() < 0.0015
    back = (seen / np.linalg.norm(seen, axis=2, keepdims=True)) @ turn
    assert abs(shown - (back + 1) * 127.5)[2:-2, 2:-2].max() < 2
    assert np.isclose(new[0, 0] * width, new[1, 1] * height) and new[0, 2] == new[1, 2] == 0.5


def test_sparse_depth_is_not_thinned_out():
    depth = np.full((480, 640), np.nan)
    depth[1::4, 1::4] = 3.0  # one of sixteen
    _, meters, _ = warp(picture(room((480, 640))), depth, SQUARE, width=160, height=120)
    known = meters[np.isfinite(meters)]
    assert len(known) == 160 * 120
    np.testing.assert_allclose(known, 3.0, rtol=1e-6)  # resized as depth, and only then made distance


def nearest_by_hand(depth, *, width, height):
    """MoGe's resize, a pixel at a time: the known value nearest to the new pixel's center, out of its window."""
    half = np.float32(0.5)
    out = np.full((height, width), np.nan, np.float32)
    tall, broad = max(1, depth.shape[0] / height), max(1, depth.shape[1] / width)
    for i in range(height):
        y = np.float32((i + 0.5) / height) * np.float32(depth.shape[0])
        for j in range(width):
            x = np.float32((j + 0.5) / width) * np.float32(depth.shape[1])
            top, left = round(float(y - np.float32(tall / 2))), round(float(x - np.float32(broad / 2)))
            least = np.float32(np.inf)
            for row in range(max(top, 0), min(top + int(np.ceil(tall)), depth.shape[0])):
                for column in range(max(left, 0), min(left + int(np.ceil(broad)), depth.shape[1])):
                    far = (np.float32(column) + half - x) ** 2 + (np.float32(row) + half - y) ** 2
                    if np.isfinite(depth[row, column]) and far < least:
                        out[i, j], least = depth[row, column], far
    return out


@pytest.mark.parametrize("share", [1.0, 0.5, 0.04])
@pytest.mark.parametrize("size", [(24, 32), (12, 16), (11, 13), (31, 45), (24, 20), (5, 40), (1, 1)])
def test_depth_is_resized_as_by_hand(size, share):
    draw = np.random.default_rng(3)
    depth = draw.uniform(1, 9, (24, 32)).astype(np.float32)
    depth[draw.random(depth.shape) >= share] = np.nan
    depth[draw.random(depth.shape) < 0.05] = np.inf
    got = resize_nearest_valid(depth, width=size[1], height=size[0])
    np.testing.assert_array_equal(got, nearest_by_hand(depth, width=size[1], height=size[0]))


def test_more_pixels_than_the_depth_has_repeat_it():
    """As in MoGe's loader: a set's images are enlarged to its size, and each of the target's pixels counts."""
    depth = np.where(np.arange(240 * 320).reshape(240, 320) % 7 > 0, room((240, 320)), np.nan)
    _, meters, _ = warp(picture(room((240, 320))), depth, SQUARE, width=640, height=480)
    assert np.isfinite(meters).mean() == pytest.approx(6 / 7, abs=1e-4)
    np.testing.assert_allclose(meters[::2, ::2], depth, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(meters[::2, ::2]), np.isnan(meters[1::2, 1::2]))


def warped_by_hand(depth, camera, *, width, height):
    """The depth of each target pixel: its ray, turned into the old camera, in float64, by the pixel it falls into."""
    inverse = np.linalg.inv(camera)
    axis = inverse @ [0.5, 0.5, 1]
    axis /= np.linalg.norm(axis)
    side = np.cross(axis, [0, 0, 1])
    angle = np.arccos(axis[2])
    turn, _ = cv2.Rodrigues(side / max(np.linalg.norm(side), 1e-12) * angle)
    ends = [turn @ inverse @ [u, v, 1] for u, v in ((0, 0), (1, 0), (1, 1), (0, 1))]
    ends = np.array([end[:2] / end[2] for end in ends])
    wide = min(inverse[0, 0], inverse[1, 1] * width / height)
    for share in np.linspace(0, 1, 20001):  # the view's corner must stay within every edge
        for begin, end in zip(ends, np.roll(ends, -1, 0), strict=True):
            x, y = begin + share * (end - begin)
            wide = min(wide, max(2 * abs(x), 2 * abs(y) * width / height))
    high = wide * height / width
    small = nearest_by_hand(
        depth.astype(np.float32),
        width=int(width * inverse[0, 0] / wide + 1e-6),
        height=int(height * inverse[1, 1] / high + 1e-6),
    )
    out = np.full((height, width), np.nan)
    for i in range(height):
        for j in range(width):
            ray = np.array([wide * ((j + 0.5) / width - 0.5), high * ((i + 0.5) / height - 0.5), 1.0])
            old = turn.T @ ray
            u, v, w = camera @ old
            row, column = int(v / w * small.shape[0]), int(u / w * small.shape[1])
            if 0 <= row < small.shape[0] and 0 <= column < small.shape[1]:
                there = inverse @ [(column + 0.5) / small.shape[1], (row + 0.5) / small.shape[0], 1]
                distance = small[row, column] * np.linalg.norm(there) / there[2]
                out[i, j] = distance / np.linalg.norm(ray)
    return out


@pytest.mark.parametrize("size", [(40, 30), (48, 24), (90, 60)])
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_the_pixels_compared_are_those_of_a_warp_by_hand(size, share):
    """Except where a ray falls within a hundredth of a pixel's edge, where rounding has the say."""
    draw = np.random.default_rng(5)
    depth = draw.uniform(2, 9, (60, 80))
    depth[draw.random(depth.shape) >= share] = np.nan
    _, meters, _ = warp(picture(room((60, 80))), depth, SHIFTED, width=size[0], height=size[1])
    wanted = warped_by_hand(depth, SHIFTED, width=size[0], height=size[1])
    same = np.isclose(meters, wanted, rtol=1e-4, equal_nan=True)
    assert same.mean() > 0.995
    assert 0.5 * share < np.isfinite(meters).mean() <= 1


# Pixels with depth by MoGe's own loader (commit 0744441, utils3d 3fab839) on the maps that `bundle_like` makes.
COUNTS = [
    ("moge_nyu", (427, 565), 0.9, (1.09, 1.44, 0.51, 0.48), 276443),
    ("moge_nyu", (480, 640), 0.04, (0.8, 1.07, 0.5, 0.5), 12288),
    ("moge_kitti", (375, 1242), 0.05, (0.58, 1.92, 0.49, 0.46), 14083),
    ("moge_gso", (512, 512), 0.3, (0.9, 0.9, 0.5, 0.5), 78632),
    ("moge_sintel", (436, 1024), 1.0, (1.1, 2.58, 0.5, 0.5), 380192),
]


def bundle_like(height, width, *, share, seed):
    """A map that any machine makes alike: whole numbers from a linear congruence, known where it says so."""
    numbers = (np.arange(height * width, dtype=np.uint64) * 2654435761 + seed * 40503) % 2**32
    known = (numbers >> 8) % 1000 < 1000 * share
    return np.where(known, 1 + (numbers % 4096) / 256, np.nan).reshape(height, width)


@pytest.mark.parametrize(("name", "size", "share", "intrinsics", "count"), COUNTS)
def test_as_many_pixels_are_compared_as_by_the_loader_of_moge(tmp_path, name, size, share, intrinsics, count):
    fx, fy, cx, cy = intrinsics
    camera = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    depth = bundle_like(*size, share=share, seed=1)
    folder = {"moge_nyu": "NYUv2", "moge_kitti": "KITTI", "moge_gso": "GSO", "moge_sintel": "Sintel"}[name]
    black = np.zeros((*size, 3), np.uint8)
    made.make_moge(tmp_path, folder, camera=camera, depths=[depth], images=[black])
    [frame] = made.read_all(load_benchmark(name), tmp_path).values()
    assert np.isfinite(frame.depth).sum() == count


def test_the_bundle_is_read_in_the_order_of_its_index(tmp_path):
    depth = room((480, 640))
    far = depth.copy()
    far[0, 0], far[1, 1], far[2, 2] = 1e5, np.inf, np.nan
    images = [picture(depth, seed=seed) for seed in (0, 1)]
    made.make_moge(tmp_path, "NYUv2", camera=SQUARE, depths=[depth, far], images=images)
    benchmark = load_benchmark("moge_nyu")
    for root in (tmp_path, tmp_path / "NYUv2"):
        frames = made.read_all(benchmark, root)
        assert list(frames) == ["scene/001", "scene/000"]
        np.testing.assert_allclose(frames["scene/000"].depth, depth, rtol=1e-4)
        assert np.argwhere(np.isnan(frames["scene/001"].depth)).tolist() == [[0, 0], [1, 1], [2, 2]]
        assert frames["scene/001"].key == "moge_nyu/scene/001"
    with pytest.raises(ValueError, match=r"KITTI/\.index\.txt.*KITTI\.zip"):
        list(load_benchmark("moge_kitti").find(tmp_path))


def test_paths_outside_of_the_bundle_and_damaged_files_are_refused(tmp_path):
    depth = room((48, 64))
    made.make_moge(tmp_path, "GSO", camera=SQUARE, depths=[depth], images=[picture(depth)])
    benchmark = load_benchmark("moge_gso")
    line = next(iter(benchmark.find(tmp_path)))
    assert benchmark.read(tmp_path, line).depth.shape == (512, 512)
    (tmp_path / "GSO/scene/000/depth.png").rename(tmp_path / "depth.png")
    with pytest.raises(ValueError, match="moge_gso/scene/000: GSO/scene/000/depth.png: No such file"):
        benchmark.read(tmp_path, line)
    (tmp_path / "depth.png").rename(tmp_path / "GSO/scene/000/depth.png")
    (tmp_path / "GSO/scene/000/meta.json").write_text('{"intrinsics": [[0]]}')
    with pytest.raises(ValueError, match="moge_gso/scene/000: .*meta.json"):
        benchmark.read(tmp_path, line)
    (tmp_path / "GSO/.index.txt").write_text("../../etc\n")
    with pytest.raises(ValueError, match="moge_gso/../../etc"):
        benchmark.read(tmp_path, next(iter(benchmark.find(tmp_path))))

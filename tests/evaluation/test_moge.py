"""MoGe's bundle: its logarithmic PNG, its index, and its warp against geometry written down here."""

import io

import cv2
import made_benchmarks as made
import numpy as np
import pytest
from made_raw import picture, room
from PIL import Image

from depth_anything.evaluation.benchmarks.catalogue import load
from depth_anything.evaluation.benchmarks.moge import read_depth, warp

SQUARE = np.array([[1.2, 0, 0.5], [0, 1.6, 0.5], [0, 0, 1]])  # square pixels at 4 : 3
SHIFTED = np.array([[1.2, 0, 0.43], [0, 1.6, 0.61], [0, 0, 1]])


def rays(camera, width, height):
    """Through the pixels' centres, (H, W, 3)."""
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
    assert abs(read[known] / depth[known] - 1).max() > 1e-7  # it is quantised


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
    shown, metres, camera = warp(image, depth, SQUARE, width=640, height=480)
    np.testing.assert_array_equal(shown, image)
    np.testing.assert_allclose(metres, np.where(np.isinf(depth), np.nan, depth), rtol=1e-6)
    np.testing.assert_allclose(camera, SQUARE, atol=1e-9)


def test_another_shape_is_cut_from_the_middle():
    depth = np.tile(np.arange(1.0, 641), (480, 1))
    _, metres, camera = warp(picture(room((480, 640))), depth, SQUARE, width=480, height=480)
    np.testing.assert_allclose(metres[100], np.arange(81.0, 561), rtol=1e-6)
    np.testing.assert_allclose(camera[[0, 1], [0, 1]], [1.6, 1.6])


@pytest.mark.parametrize("camera", [SQUARE, SHIFTED])
@pytest.mark.parametrize("size", [(320, 240), (512, 512), (700, 350)])
def test_a_plane_stays_a_plane_and_colours_their_directions(camera, size):
    """The plane n · X = 1 of the old camera, seen by the new one; colours say where a ray pointed."""
    normal = np.array([0.08, -0.1, 0.25])
    old = rays(camera, 640, 480)
    depth = 1 / (old @ normal)
    unit = old / np.linalg.norm(old, axis=2, keepdims=True)
    image = np.round((unit + 1) * 127.5).astype(np.uint8)
    width, height = size
    shown, metres, new = warp(image, depth, camera, width=width, height=height)
    axis = np.linalg.inv(camera) @ [0.5, 0.5, 1]
    axis /= np.linalg.norm(axis)
    turned = np.cross(axis, [0, 0, 1])
    turn, _ = cv2.Rodrigues(turned / max(np.linalg.norm(turned), 1e-12) * np.arccos(min(axis[2], 1)))
    seen = rays(new, width, height)
    true = 1 / (seen @ (turn @ normal))
    known = np.isfinite(metres)
    bigger = [width * new[0, 0] / camera[0, 0] / 640, height * new[1, 1] / camera[1, 1] / 480]
    assert known.mean() == pytest.approx(1 / np.maximum(bigger, 1).prod(), rel=0.02)  # no depth counts twice
    np.testing.assert_allclose(metres[known], true[known], rtol=0.006)  # the nearest pixel's
    assert abs(metres[known] / true[known] - 1).mean() < 0.0015
    back = (seen / np.linalg.norm(seen, axis=2, keepdims=True)) @ turn
    assert abs(shown - (back + 1) * 127.5)[2:-2, 2:-2].max() < 2
    assert np.isclose(new[0, 0] * width, new[1, 1] * height) and new[0, 2] == new[1, 2] == 0.5


def test_sparse_depth_is_not_thinned_out():
    depth = np.full((480, 640), np.nan)
    depth[1::4, 1::4] = 3.0  # one of sixteen
    _, metres, _ = warp(picture(room((480, 640))), depth, SQUARE, width=160, height=120)
    known = metres[np.isfinite(metres)]
    assert len(known) == 160 * 120
    np.testing.assert_allclose(known, 3.0, rtol=1e-6)  # resized as depth, and only then made distance


def test_the_bundle_is_read_in_the_order_of_its_index(tmp_path):
    depth = room((480, 640))
    far = depth.copy()
    far[0, 0], far[1, 1], far[2, 2] = 1e5, np.inf, np.nan
    images = [picture(depth, seed=seed) for seed in (0, 1)]
    made.make_moge(tmp_path, "NYUv2", camera=SQUARE, depths=[depth, far], images=images)
    benchmark = load("moge_nyu")
    for root in (tmp_path, tmp_path / "NYUv2"):
        frames = made.read_all(benchmark, root)
        assert list(frames) == ["scene/001", "scene/000"]
        np.testing.assert_allclose(frames["scene/000"].depth, depth, rtol=1e-4)
        assert np.argwhere(np.isnan(frames["scene/001"].depth)).tolist() == [[0, 0], [1, 1], [2, 2]]
        assert frames["scene/001"].key == "moge_nyu/scene/001"
    with pytest.raises(ValueError, match=r"KITTI/\.index\.txt; get KITTI\.zip"):
        list(load("moge_kitti").find(tmp_path))


def test_what_leads_elsewhere_or_is_damaged_is_refused(tmp_path):
    depth = room((48, 64))
    made.make_moge(tmp_path, "GSO", camera=SQUARE, depths=[depth], images=[picture(depth)])
    benchmark = load("moge_gso")
    line = next(iter(benchmark.find(tmp_path)))
    assert benchmark.read(tmp_path, line).depth.shape == (512, 512)
    (tmp_path / "GSO/scene/000/depth.png").rename(tmp_path / "depth.png")
    with pytest.raises(ValueError, match="moge_gso/scene/000: GSO/scene/000/depth.png: No such file"):
        benchmark.read(tmp_path, line)
    (tmp_path / "depth.png").rename(tmp_path / "GSO/scene/000/depth.png")
    (tmp_path / "GSO/scene/000/meta.json").write_text('{"intrinsics": [[0]]}')
    with pytest.raises(ValueError, match="moge_gso/scene/000: its meta"):
        benchmark.read(tmp_path, line)
    (tmp_path / "GSO/.index.txt").write_text("../../etc\n")
    with pytest.raises(ValueError, match="out of the bundle"):
        benchmark.read(tmp_path, next(iter(benchmark.find(tmp_path))))

"""Point clouds: planes, extents, axes of the formats, focal lengths."""

import io
import struct

import numpy as np
import pytest
import trimesh
from PIL import Image

from depth_anything.inference.focal import choose_focal_length
from depth_anything.inference.pointcloud import encode_points, unproject

FOCAL = 100.0


def wall(height=60, width=80, metres=2.0):
    """A wall facing the camera, red on the left, blue at the bottom."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2, 0], image[height // 2 :, :, 2] = 255, 255
    return image, np.full((height, width), metres, np.float32)


def read(cloud, format):
    loaded = trimesh.load(io.BytesIO(encode_points(cloud, format)), file_type=format)
    if isinstance(loaded, trimesh.Scene):
        (loaded,) = loaded.geometry.values()
    return np.asarray(loaded.vertices), np.asarray(loaded.colors)[:, :3]


def test_a_wall_is_flat_and_has_its_width():
    image, depth = wall()
    cloud = unproject(image, depth, quantity="depth", focal_px=FOCAL)
    assert cloud.unit == "m" and cloud.points.dtype == np.float32 and cloud.colors.dtype == np.uint8
    np.testing.assert_array_equal(cloud.points[:, 2], 2)
    np.testing.assert_allclose(np.ptp(cloud.points, axis=0), [79 * 2 / 100, 59 * 2 / 100, 0], rtol=1e-6)
    np.testing.assert_allclose(
        cloud.points.mean(0), [0, 0, 2], atol=1e-6
    )  # the principal point is the middle


@pytest.mark.parametrize("format", ["ply", "glb"])
def test_files_have_their_axes_and_colors(format):
    image, depth = wall()
    points, colors = read(unproject(image, depth, quantity="depth", focal_px=FOCAL), format)
    assert len(points) == 60 * 80
    up, forward = (1, -1) if format == "glb" else (-1, 1)
    assert (points[:, 2] * forward == 2).all()
    red, blue = colors[:, 0] == 255, colors[:, 2] == 255
    assert (points[red, 0] < 0).all() and (points[~red, 0] > 0).all()
    assert (points[blue, 1] * up < 0).all() and (points[~blue, 1] * up > 0).all()


@pytest.mark.parametrize(("format", "stored"), [("ply", 188), ("glb", 128)])
def test_glb_colors_are_linear_and_ply_colors_srgb(format, stored):
    """Half the light is 188 in sRGB (IEC 61966-2-1)."""
    image = np.full((8, 8, 3), 188, np.uint8)
    cloud = unproject(image, np.ones((8, 8), np.float32), quantity="depth", focal_px=FOCAL)
    assert (read(cloud, format)[1] == stored).all()


def test_a_floor_is_a_plane_from_depth_and_from_disparity():
    height, width, camera_m = 80, 100, 1.5
    rows = np.arange(height)[:, None] + 0.5 - height / 2
    depth = np.where(rows > 1, camera_m * FOCAL / np.maximum(rows, 1e-3), np.inf) * np.ones(width)
    image = np.zeros((height, width, 3), np.uint8)
    in_metres = unproject(image, depth, quantity="depth", focal_px=FOCAL).points
    np.testing.assert_allclose(in_metres[:, 1], camera_m, rtol=1e-5)
    disparity = np.where(np.isfinite(depth), 1 / depth, 0) * 7  # scaled at will
    cloud = unproject(image, disparity, quantity="disparity", focal_px=FOCAL, far=1e9)
    assert cloud.unit == "relative" and np.median(cloud.points[:, 2]) == pytest.approx(1, rel=0.02)
    np.testing.assert_allclose(cloud.points[:, 1], cloud.points[0, 1], rtol=1e-5)
    assert len(cloud.points) == len(in_metres)


def test_sky_is_left_out():
    image, depth = wall()
    depth[:10], depth[10:20] = np.inf, 19.9
    assert len(unproject(image, depth, quantity="depth", focal_px=FOCAL, far=0.99 * 20).points) == 40 * 80
    disparity = np.full((60, 80), 4.0)
    disparity[:10], disparity[10:20] = 0, 0.1
    cloud = unproject(image, disparity, quantity="disparity", focal_px=FOCAL)
    assert len(cloud.points) == 40 * 80 and (cloud.points[:, 2] == 1).all()


@pytest.mark.parametrize("map", [np.zeros((6, 8)), np.full((6, 8), np.inf), np.full((6, 8), np.nan)])
@pytest.mark.parametrize("quantity", ["depth", "disparity"])
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_a_map_of_only_sky_has_no_points(map, quantity):
    cloud = unproject(np.zeros((6, 8, 3), np.uint8), map, quantity=quantity, focal_px=FOCAL)
    assert cloud.points.shape == (0, 3)
    for format in ("ply", "glb"):
        with pytest.raises(ValueError, match="sky"):
            encode_points(cloud, format)


@pytest.mark.parametrize("most", [1, 7, 500, 4799, 4800])
def test_the_number_of_points_is_limited(most):
    image, depth = wall()
    cloud = unproject(image, depth, quantity="depth", focal_px=FOCAL, max_points=most)
    assert (
        0.2 * most <= len(cloud.points) <= most == len(cloud.points)
        or 0.2 * most <= len(cloud.points) <= most
    )
    if most >= 500:  # thinned, not cropped
        assert np.ptp(cloud.points[:, 0]) > 1.4
        red = cloud.colors[:, 0] == 255
        assert (cloud.points[red, 0] < 0).all()


def test_files_state_unit_axes_and_focal_length():
    image, depth = wall()
    head = encode_points(unproject(image, depth, quantity="depth", focal_px=FOCAL), "ply")[:300]
    assert b"comment unit m; x right, y down, z forward; focal 100 px\n" in head
    glb = encode_points(unproject(image, depth, quantity="disparity", focal_px=FOCAL), "glb")
    length = struct.unpack("<I", glb[12:16])[0]
    assert b'"unit":"relative"' in glb[20 : 20 + length]


def photograph(**tags):
    exif = Image.Exif()
    inner = exif.get_ifd(0x8769)
    for tag, value in tags.items():
        inner[int(tag[1:], 16)] = value
    out = io.BytesIO()
    Image.new("RGB", (400, 300)).save(out, "JPEG", exif=exif)
    return out.getvalue()


def test_focal_length_from_exif():
    full_frame = photograph(xA405=50)
    focal, source = choose_focal_length(full_frame, (300, 400, 3))
    assert focal == pytest.approx(50 / 43.2666 * 500, rel=1e-4) and source == "EXIF: 50 mm on 35 mm film"
    assert choose_focal_length(full_frame, (400, 300, 3))[0] == pytest.approx(focal)  # turned upright
    sensor = photograph(x920A=8.0, xA20E=2540.0, xA210=2, xA002=4000, xA003=3000)  # 100 px a mm, then resized
    focal, source = choose_focal_length(sensor, (300, 400, 3))
    assert focal == pytest.approx(80) and source == "EXIF: 8 mm, 100 px per mm of the sensor"
    assert choose_focal_length(full_frame, (300, 400, 3), focal_px=321) == (321, "given")


@pytest.mark.parametrize(
    "data",
    [
        photograph(),
        photograph(xA405=0),
        photograph(x920A=8.0),
        b"no image",
        photograph(x920A=8.0, xA20E=100.0, xA210=9),
    ],
)
def test_the_default_focal_length_is_the_authors(data):
    for shape, expected in [((480, 640), 470.4), ((640, 480), 470.4), ((960, 1280), 940.8)]:
        focal, source = choose_focal_length(data, shape)
        assert focal == pytest.approx(expected) and source.startswith(
            "assumed: 470.4 px for a longer side of 640"
        )


@pytest.mark.parametrize(("focal_px", "max_points"), [(0, 1), (-3, 1), (float("nan"), 1), (10, 0)])
def test_invalid_arguments_are_refused(focal_px, max_points):
    image, depth = wall()
    with pytest.raises(ValueError, match=f"focal={focal_px} and max_points={max_points}"):
        unproject(image, depth, quantity="depth", focal_px=focal_px, max_points=max_points)

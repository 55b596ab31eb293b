"""Encoding a raw sample as a record."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from depth_anything.data.sample import Frame, decode_labels, decode_record, make_disparity_target
from depth_anything.data.transforms import Crop, crop_map, resize_image
from depth_anything.ingest.record import encode_sample, mask_invalid, resize_nearest
from depth_anything.ingest.source import RawSample
from depth_anything.preprocess import resize_shape

GRAY = np.full((4, 6, 3), 99, np.uint8)


def encode(raw, **options):
    return encode_sample(raw, source="toy", name="a", **options)


def frame_of(record):
    return decode_record("k", record.fields)


def ramp(height=4, width=6):
    return np.arange(1.0, height * width + 1).reshape(height, width)


def test_the_sky_of_disparity_is_zero_and_other_bad_values_are_nan():
    values, sky = ramp(), np.zeros((4, 6), bool)
    values[0, :3] = 0, -1, np.nan
    sky[3] = True
    record = encode(RawSample(GRAY, disparity=values, sky=sky))
    label = decode_labels(record.fields)["disparity"]
    assert (label[3] == 0).all() and np.isnan(label[0, :3]).all() and label.dtype == np.float32
    assert frame_of(record).meta["sky"] == "zero" and record.quantity == "disparity"
    assert record.pixels == {"all": 24, "valid": 15, "sky": 6, "zero": 1, "negative": 1, "nan": 1}
    disparity, valid = make_disparity_target(Frame("k", GRAY, {}, disparity=label))
    assert valid.sum() == 21 and (disparity[3] == 0).all()


def test_each_pixel_is_counted_as_one_kind():
    values, sky, far = ramp(2, 4), np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    values[0] = np.inf, np.inf, np.nan, np.nan
    sky[0, 0] = sky[0, 2] = sky[1, 0] = True  # infinite and NaN in the sky, and a number
    far[0, 1] = far[0, 3] = far[1, 0] = far[1, 1] = True
    label, pixels = mask_invalid(values, RawSample(b"", sky=sky, invalid={"far": far}), sky=np.inf)
    assert pixels == {"all": 8, "sky": 2, "infinite": 1, "nan": 1, "far": 2, "valid": 2}
    assert np.isposinf(label[0, [0, 2]]).all() and np.isnan(label[0, [1, 3]]).all()
    assert np.isnan(label[1, :2]).all() and (label[1, 2:] == [7, 8]).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint16, ">f4"])
def test_values_of_any_type_are_stored_exactly(dtype):
    record = encode(RawSample(GRAY, depth=ramp().astype(dtype)))
    assert (decode_labels(record.fields)["depth"] == ramp()).all()


def test_meta_of_the_source_is_stored():
    raw = RawSample(GRAY, {"unit": "m", "sky": "inf", "name": None, "intrinsics": {"fx": 5.0}}, depth=ramp())
    meta = json.loads(encode(raw).fields["json"])
    assert meta == {
        "source": "toy",
        "unit": "m",
        "sky": "inf",
        "intrinsics": {"fx": 5.0},
        "original_size": [4, 6],
    }


def test_arrays_and_gray_files_become_png():
    assert set(encode(RawSample(GRAY)).fields) == {"png", "json"}
    out = io.BytesIO()
    Image.fromarray(GRAY[..., 0]).save(out, "JPEG")
    assert set(encode(RawSample(out.getvalue())).fields) == {"png", "json"}


def test_a_label_of_another_size_needs_the_same_aspect_ratio():
    image = np.zeros((48, 64, 3), np.uint8)
    assert frame_of(encode(RawSample(image, depth=ramp(12, 16)))).meta["label_size"] == [12, 16]
    assert frame_of(encode(RawSample(image, depth=ramp(19, 25)))).meta["label_size"] == [19, 25], (
        "within a pixel"
    )
    for size in ((16, 12), (48, 62), (12, 20)):
        with pytest.raises(ValueError, match=rf"48 x 64 .* {size[0]} x {size[1]}"):
            encode(RawSample(image, depth=ramp(*size)))


@pytest.mark.parametrize(
    ("label", "masks", "named"),
    [
        (np.zeros((4, 6)), {}, "24 zero"),
        (np.full((4, 6), np.nan), {}, "24 nan"),
        (np.ones((4, 6, 1)), {}, r"the shape \(4, 6, 1\)"),
        (np.ones((0, 6)), {}, r"\(0, 6\)"),
        (np.ones((4, 6)), {"sky": np.zeros((6, 4), bool)}, "sky .*6, 4"),
        (np.ones((4, 6)), {"invalid": {"glass": np.zeros((1, 1), bool)}}, "glass .*1, 1"),
        (np.ones((4, 6)), {"sky": np.ones((4, 6), bool)}, "24 sky"),
    ],
)
def test_labels_without_valid_pixels_or_of_another_shape_are_rejected(label, masks, named):
    with pytest.raises(ValueError, match=named):
        encode(RawSample(GRAY, depth=label, **masks))


def test_short_sides_resize_image_and_label_as_training_does():
    rng = np.random.Generator(np.random.Philox(1))
    image = rng.integers(0, 255, (90, 130, 3), np.uint8)
    depth, sky = ramp(90, 130), np.zeros((90, 130), bool)
    depth[40:50] = np.nan
    sky[:9] = True
    record = encode(RawSample(image, {"unit": "m"}, depth=depth, sky=sky), short_side=56)
    size = resize_shape(90, 130, 56)
    frame = frame_of(record)
    assert frame.image.shape[:2] == frame.depth.shape == size == (56, 84)
    assert frame.meta["original_size"] == [90, 130] and "label_size" not in frame.meta
    whole = mask_invalid(depth, RawSample(b"", sky=sky), sky=np.inf)[0]
    for left in (0, 28):
        square = crop_map(whole, Crop(*size, 0, left, 56, False))
        assert np.array_equal(frame.depth[:, left : left + 56], square, equal_nan=True)
    expected = io.BytesIO()
    Image.fromarray(resize_image(image, *size)).save(expected, "JPEG", quality=92, subsampling=2)
    assert record.fields["jpg"] == expected.getvalue()
    assert record.pixels["all"] == 90 * 130, "pixels are counted as the set has them"


def test_resize_nearest_takes_the_values_at_pixel_centers():
    assert resize_nearest(np.arange(10)[None].repeat(2, 0), 1, 5).tolist() == [[1, 3, 5, 7, 9]]
    assert resize_nearest(np.arange(3)[None], 2, 6).tolist() == [[0, 0, 1, 1, 2, 2]] * 2


def test_nan_in_the_meta_is_an_error():
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        encode(RawSample(GRAY, {"intrinsics": {"fx": np.nan}}))


@pytest.mark.parametrize("orientation", [1, 6])
def test_intrinsics_are_scaled_with_a_resized_image(orientation):
    """A 3D point projects to the same relative position before and after resizing, for any EXIF orientation."""
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = (96, 64) if orientation == 1 else (64, 96)
    Image.new("RGB", size).save(out, "JPEG", exif=exif)
    camera = {"fx": 80.0, "fy": 81.0, "cx": 40.25, "cy": 33.5}
    kept = frame_of(encode(RawSample(out.getvalue(), {"intrinsics": camera}, depth=np.ones((64, 96))))).meta
    assert kept["intrinsics"] == camera and kept["original_size"] == [64, 96]
    record = encode(RawSample(out.getvalue(), {"intrinsics": camera}, depth=np.ones((64, 96))), short_side=28)
    small = json.loads(record.fields["json"])["intrinsics"]
    frame = decode_record("k", record.fields)
    assert frame.image.shape[:2] == (28, 42) == frame.depth.shape
    for x, y, z in ((0.2, -0.3, 1.0), (-1.5, 0.7, 4.0)):
        before = (80 * x / z + 40.25 + 0.5) / 96, (81 * y / z + 33.5 + 0.5) / 64
        after = (
            (small["fx"] * x / z + small["cx"] + 0.5) / 42,
            (small["fy"] * y / z + small["cy"] + 0.5) / 28,
        )
        assert after == pytest.approx(before)


def test_a_camera_matrix_in_relative_coordinates_is_not_scaled():
    """Hypersim's matrix is of u and v from -1 to 1."""
    matrix = np.diag([0.577, 0.433, -1.0]).tolist()
    record = encode(RawSample(np.zeros((64, 96, 3), np.uint8), {"M_cam_from_uv": matrix}), short_side=28)
    assert json.loads(record.fields["json"])["M_cam_from_uv"] == matrix

"""The check of a custom set before it is written: sizes, values, warnings and advice."""

import re

import cv2
import numpy as np
import pytest
from made_custom import SIZE, make_set, write_map
from made_raw import room

from depth_anything.ingest.declaration import load_declaration
from depth_anything.inspect import dataset_check
from depth_anything.inspect.dataset_check import check_dataset

NAMES = tuple("abcdef")
LICENCE = "licence: CC0-1.0\n"


def check(folder, **options):
    return check_dataset(load_declaration(folder / "set.yaml"), **options)


def test_a_correct_set_gives_no_warning(tmp_path):
    truth = make_set(tmp_path, names=NAMES, yaml="unit: mm\n" + LICENCE)
    result = check(tmp_path)
    assert result.warnings == [] and result.refused == [] and result.taken == 6
    text = "\n".join(result.lines)
    values = np.concatenate([depth[depth > 0] for depth in truth.values()])
    assert f"{values.min():.4g} to {values.max():.4g} m" in text
    assert "images:     48 x 36 (6)" in text and "pairs:      6" in text
    zero = 15 / (SIZE[0] * SIZE[1])
    assert f"valid {1 - zero:.1%}, zero {zero:.1%}" in text
    assert result.picture is not None and result.picture.dtype == np.uint8 and result.picture.shape[1] > 1200


@pytest.mark.parametrize(
    ("scale", "unit", "message"),
    [
        (0.001, "m", r"median depth is \d{4} m, .*with  unit: mm  it would be [4-8][.\d]* m"),
        (0.01, "m", r"median depth is [4-8]\d\d m, .*with  unit: cm  it would be [4-8][.\d]* m"),
        (1 / 256, "m", r"median depth is \d{4} m, .*with  scale: 1/256  it would be [4-8][.\d]* m"),
        (1.0, "mm", r"median depth is 0.00\d+ m, .*with  unit: m  it would be [4-8][.\d]* m"),
    ],
)
def test_a_wrong_unit_gives_a_warning(tmp_path, scale, unit, message):
    make_set(tmp_path, names=NAMES, ending=".npy", scale=scale, yaml=f"unit: {unit}\n{LICENCE}")
    (warning,) = check(tmp_path).warnings
    assert re.search(message, warning), warning


def test_whole_meters_give_a_warning(tmp_path):
    make_set(tmp_path, names=NAMES, scale=0.1, yaml="unit: m\n" + LICENCE)  # decimeters, declared as meters
    (warning,) = check(tmp_path).warnings
    assert "unit: cm" in warning


def test_a_wrong_quantity_and_maps_upside_down_give_a_warning(tmp_path):
    make_set(tmp_path, names=NAMES, ending=".npy", scale=1, yaml="quantity: disparity\n" + LICENCE)
    (warning,) = check(tmp_path).warnings
    assert "100%" in warning and "quantity: depth" in warning
    make_set(tmp_path, names=NAMES, ending=".npy", scale=1, yaml="unit: m\n" + LICENCE)
    for number, name in enumerate(NAMES):
        write_map(tmp_path / f"depth/{name}.npy", room(SIZE, seed=number % 3)[::-1])
    (warning,) = check(tmp_path).warnings
    assert "quantity: disparity" in warning


def test_a_common_largest_value_gives_a_warning(tmp_path):
    make_set(tmp_path, names=NAMES, yaml="unit: mm\n" + LICENCE)
    for number, name in enumerate(NAMES):
        stored = np.round(room(SIZE, seed=number % 3) * 1000)
        stored[:4] = 65535
        write_map(tmp_path / f"depth/{name}.png", stored)
    (warning,) = check(tmp_path).warnings
    assert "65535 " in warning and "11.1%" in warning
    assert "  sky: 65535, " in warning and "  invalid: [65535]" in warning
    for more in ("sky: 65535\n", "invalid: 65535\n"):
        (tmp_path / "set.yaml").write_text("images: rgb\ndepth: depth\nunit: mm\n" + more + LICENCE)
        assert check(tmp_path).warnings == []


def test_maps_scaled_to_their_own_range_give_a_warning(tmp_path):
    make_set(tmp_path, names=NAMES, yaml="unit: mm\n" + LICENCE)
    for number, name in enumerate(NAMES):
        depth = room(SIZE, seed=number % 3)
        depth[0, 0] = depth.max() + 1 + number
        write_map(tmp_path / f"depth/{name}.png", np.round(depth / depth.max() * 65535))
    assert any("units are lost" in warning for warning in check(tmp_path).warnings)


def test_sizes_of_all_pairs_are_checked(tmp_path):
    make_set(tmp_path, names=NAMES, yaml="unit: mm\nintrinsics: [40, 40, 20, 20]\n" + LICENCE)
    make_set(tmp_path / "b", names=("x",), size=(40, 40))
    for kind, ending in (("rgb", "jpg"), ("depth", "png")):
        (tmp_path / f"b/{kind}/x.{ending}").rename(tmp_path / f"{kind}/x.{ending}")
    write_map(tmp_path / "depth/c.png", np.ones((36, 36)))
    (tmp_path / "depth/d.png").write_bytes(b"hello")
    (tmp_path / "rgb/e.jpg").unlink()
    result = check(tmp_path, sample=2)
    assert dict(result.refused) == {
        "c": "its map has 36 x 36 pixels, its image 48 x 36: the aspect ratios differ",
        "d": "its depth: not a PNG file",
        "e": "no image of this name in rgb",
    }
    assert result.taken == 4 and any("2 sizes" in warning for warning in result.warnings)
    assert "images:     48 x 36 (3), 40 x 40 (1)" in result.lines


def test_pixels_of_the_sample_are_checked(tmp_path):
    make_set(tmp_path, names=NAMES, yaml="unit: mm\n")
    write_map(tmp_path / "depth/a.png", np.zeros(SIZE))
    result = check(tmp_path)
    assert dict(result.refused) == {"a": "no pixel has a value"} and result.taken == 5
    (warning,) = result.warnings
    assert "licence: CC-BY-4.0" in warning
    for name in NAMES:
        write_map(tmp_path / f"depth/{name}.png", np.zeros(SIZE))
    with pytest.raises(ValueError, match=r"none of 6 pairs .*\(a: .*; b:"):
        check(tmp_path)


def test_an_overlay_shows_what_is_near_and_what_is_unknown(tmp_path):
    label = np.full((30, 60), 2.0, np.float32)
    label[:, 30:] = 8
    label[:10] = np.nan
    label[10] = np.nan
    label[10, ::10] = 2  # a scan line of LiDAR, thinner than a pixel of the picture
    image = np.full((600, 1200, 3), (200, 100, 0), np.uint8)
    tile = dataset_check._draw_overlay("name", image, np.kron(label, np.ones((20, 20), np.float32)), "depth")
    above, over = tile[:152], tile[152:304]
    assert (above == (200, 100, 0)).all()
    near, far, nothing = over[120, 40].astype(int), over[120, 260].astype(int), over[5, 5]
    assert near[0] > near[2] + 40 and far[2] > far[0] + 40 and len(set(nothing.tolist())) == 1
    thin = np.full((600, 1200), np.nan, np.float32)
    thin[300, ::8] = 3
    tile = dataset_check._draw_overlay("name", image, thin, "depth")[152:304]
    assert (tile != tile[:1, :1]).any(2).sum() > 100


@pytest.mark.parametrize("channels", [(), (3,), (4,)])
def test_8_bit_maps_are_refused_with_advice(tmp_path, channels):
    """What to write instead, and what to declare where 8 bits are all there is; the others are taken."""
    make_set(tmp_path, names=NAMES, yaml="unit: mm\n" + LICENCE)
    for name in "ab":
        path = str(tmp_path / f"depth/{name}.png")
        assert cv2.imwrite(path, np.full((*SIZE, *channels), 7, np.uint8))
    result = check(tmp_path)
    assert result.taken == 4 and [name for name, _ in result.refused] == ["a", "b"]
    (warning,) = result.warnings
    assert "2 maps" in warning and all(
        word in warning for word in ("16-bit PNG", "NPY", "quantity: disparity", "scale:")
    )
    for name in "cdef":
        assert cv2.imwrite(str(tmp_path / f"depth/{name}.png"), np.full(SIZE, 7, np.uint8))
    with pytest.raises(ValueError, match="none of 6 pairs.*16-bit PNG.*quantity: disparity"):
        check(tmp_path)


def test_the_advice_for_8_bit_maps_works(tmp_path):
    make_set(tmp_path, names=NAMES, yaml="quantity: disparity\n" + LICENCE)
    for name in NAMES:
        gray = np.tile(np.arange(SIZE[1], dtype=np.uint8) * 5, (SIZE[0], 1))
        (tmp_path / f"depth/{name}.png").unlink()
        np.save(tmp_path / f"depth/{name}.npy", gray)
    result = check(tmp_path)
    assert result.taken == 6 and not result.refused

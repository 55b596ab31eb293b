"""What is said of a user's set before it is written."""

import re

import cv2
import numpy as np
import pytest
from made_custom import SIZE, make_set, write_map
from made_raw import room

from depth_anything.ingest.declaration import load_declaration
from depth_anything.inspect import dataset_check as survey_module
from depth_anything.inspect.dataset_check import check_dataset

NAMES = tuple("abcdef")
LICENCE = "licence: CC0-1.0\n"


def looked(folder, **options):
    return check_dataset(load_declaration(folder / "set.yaml"), **options)


def test_a_sound_set_raises_no_doubt(tmp_path):
    truth = make_set(tmp_path, names=NAMES, yaml="unit: mm\n" + LICENCE)
    found = looked(tmp_path)
    assert found.warnings == [] and found.refused == [] and found.taken == 6
    text = "\n".join(found.lines)
    values = np.concatenate([depth[depth > 0] for depth in truth.values()])
    assert f"{values.min():.4g} to {values.max():.4g} m" in text
    assert "images:     48 x 36 (6)" in text and "pairs:      6" in text
    zero = 15 / (SIZE[0] * SIZE[1])
    assert f"valid {1 - zero:.1%}, zero {zero:.1%}" in text
    assert found.picture is not None and found.picture.dtype == np.uint8 and found.picture.shape[1] > 1200


@pytest.mark.parametrize(
    ("scale", "unit", "said"),
    [
        (0.001, "m", r"median depth is \d{4} m, as few .*with  unit: mm  it would be [4-8][.\d]* m"),
        (0.01, "m", r"median depth is [4-8]\d\d m, as few .*with  unit: cm  it would be [4-8][.\d]* m"),
        (1 / 256, "m", r"median depth is \d{4} m, .*with  scale: 1/256  it would be [4-8][.\d]* m"),
        (1.0, "mm", r"median depth is 0.00\d+ m, as few .*with  unit: m  it would be [4-8][.\d]* m"),
    ],
)
def test_a_wrong_unit_is_noticed(tmp_path, scale, unit, said):
    make_set(tmp_path, names=NAMES, ending=".npy", scale=scale, yaml=f"unit: {unit}\n{LICENCE}")
    (doubt,) = looked(tmp_path).warnings
    assert re.search(said, doubt), doubt


def test_whole_metres_are_noticed(tmp_path):
    make_set(tmp_path, names=NAMES, scale=0.1, yaml="unit: m\n" + LICENCE)  # decimetres, said to be metres
    (doubt,) = looked(tmp_path).warnings
    assert "whole numbers" in doubt


def test_depth_said_to_be_disparity_and_maps_upside_down(tmp_path):
    make_set(tmp_path, names=NAMES, ending=".npy", scale=1, yaml="quantity: disparity\n" + LICENCE)
    (doubt,) = looked(tmp_path).warnings
    assert "farther than the upper ones in 100% of the sample: is it  quantity: depth" in doubt
    make_set(tmp_path, names=NAMES, ending=".npy", scale=1, yaml="unit: m\n" + LICENCE)
    for number, name in enumerate(NAMES):
        write_map(tmp_path / f"depth/{name}.npy", room(SIZE, seed=number % 3)[::-1])
    (doubt,) = looked(tmp_path).warnings
    assert "is it  quantity: disparity, or are the maps upside down?" in doubt


def test_a_value_that_means_something_is_noticed(tmp_path):
    make_set(tmp_path, names=NAMES, yaml="unit: mm\n" + LICENCE)
    for number, name in enumerate(NAMES):
        stored = np.round(room(SIZE, seed=number % 3) * 1000)
        stored[:4] = 65535
        write_map(tmp_path / f"depth/{name}.png", stored)
    (doubt,) = looked(tmp_path).warnings
    assert "65535 is the largest stored value of nearly all maps, in 11.1% of their pixels" in doubt
    assert "write  sky: 65535, if nothing,  invalid: [65535]" in doubt
    for more in ("sky: 65535\n", "invalid: 65535\n"):
        (tmp_path / "set.yaml").write_text("images: rgb\ndepth: depth\nunit: mm\n" + more + LICENCE)
        assert looked(tmp_path).warnings == []


def test_maps_stretched_one_by_one_are_noticed(tmp_path):
    make_set(tmp_path, names=NAMES, yaml="unit: mm\n" + LICENCE)
    for number, name in enumerate(NAMES):
        depth = room(SIZE, seed=number % 3)
        depth[0, 0] = depth.max() + 1 + number
        write_map(tmp_path / f"depth/{name}.png", np.round(depth / depth.max() * 65535))
    assert any("their units are lost" in doubt for doubt in looked(tmp_path).warnings)


def test_sizes_are_looked_at_in_all(tmp_path):
    make_set(tmp_path, names=NAMES, yaml="unit: mm\nintrinsics: [40, 40, 20, 20]\n" + LICENCE)
    make_set(tmp_path / "b", names=("x",), size=(40, 40))
    for kind, ending in (("rgb", "jpg"), ("depth", "png")):
        (tmp_path / f"b/{kind}/x.{ending}").rename(tmp_path / f"{kind}/x.{ending}")
    write_map(tmp_path / "depth/c.png", np.ones((36, 36)))
    (tmp_path / "depth/d.png").write_bytes(b"hello")
    (tmp_path / "rgb/e.jpg").unlink()
    found = looked(tmp_path, sample=2)
    assert dict(found.refused) == {
        "c": "its map is 36 x 36 pixels, its image 48 x 36: not of one shape",
        "d": "its depth: not a PNG file",
        "e": "no image of this name in rgb",
    }
    assert found.taken == 4 and any(
        "2 sizes, and intrinsics are those of one" in doubt for doubt in found.warnings
    )
    assert "images:     48 x 36 (3), 40 x 40 (1)" in found.lines


def test_pixels_of_the_sample_are_looked_at(tmp_path):
    make_set(tmp_path, names=NAMES, yaml="unit: mm\n")
    write_map(tmp_path / "depth/a.png", np.zeros(SIZE))
    found = looked(tmp_path)
    assert dict(found.refused) == {"a": "not one pixel has a value"} and found.taken == 5
    (doubt,) = found.warnings
    assert doubt.startswith("no licence is given")
    for name in NAMES:
        write_map(tmp_path / f"depth/{name}.png", np.zeros(SIZE))
    with pytest.raises(ValueError, match=r"none of 6 pairs can be taken \(a: not one pixel has a value; b:"):
        looked(tmp_path)


def test_an_overlay_shows_what_is_near_and_what_is_unknown(tmp_path):
    label = np.full((30, 60), 2.0, np.float32)
    label[:, 30:] = 8
    label[:10] = np.nan
    label[10] = np.nan
    label[10, ::10] = 2  # a scan line of LiDAR, thinner than a pixel of the picture
    image = np.full((600, 1200, 3), (200, 100, 0), np.uint8)
    tile = survey_module._draw_overlay("name", image, np.kron(label, np.ones((20, 20), np.float32)), "depth")
    above, over = tile[:152], tile[152:304]
    assert (above == (200, 100, 0)).all()
    near, far, nothing = over[120, 40].astype(int), over[120, 260].astype(int), over[5, 5]
    assert near[0] > near[2] + 40 and far[2] > far[0] + 40 and len(set(nothing.tolist())) == 1
    thin = np.full((600, 1200), np.nan, np.float32)
    thin[300, ::8] = 3
    tile = survey_module._draw_overlay("name", image, thin, "depth")[152:304]
    assert (tile != tile[:1, :1]).any(2).sum() > 100


@pytest.mark.parametrize("colours", [(), (3,), (4,)])
def test_maps_of_8_bits_are_told_with_a_way_out(tmp_path, colours):
    """What to write instead, and what to declare where 8 bits are all there is; the others are taken."""
    make_set(tmp_path, names=NAMES, yaml="unit: mm\n" + LICENCE)
    for name in "ab":
        path = str(tmp_path / f"depth/{name}.png")
        assert cv2.imwrite(path, np.full((*SIZE, *colours), 7, np.uint8))
    found = looked(tmp_path)
    assert found.taken == 4 and [name for name, _ in found.refused] == ["a", "b"]
    (doubt,) = found.warnings
    assert "2 maps" in doubt and all(
        word in doubt for word in ("16-bit PNG", "NPY", "quantity: disparity", "scale:")
    )
    for name in "cdef":
        assert cv2.imwrite(str(tmp_path / f"depth/{name}.png"), np.full(SIZE, 7, np.uint8))
    with pytest.raises(ValueError, match="none of 6 pairs.*16-bit PNG.*quantity: disparity"):
        looked(tmp_path)


def test_the_way_out_of_8_bits_leads_out(tmp_path):
    make_set(tmp_path, names=NAMES, yaml="quantity: disparity\n" + LICENCE)
    for name in NAMES:
        grey = np.tile(np.arange(SIZE[1], dtype=np.uint8) * 5, (SIZE[0], 1))
        (tmp_path / f"depth/{name}.png").unlink()
        np.save(tmp_path / f"depth/{name}.npy", grey)
    found = looked(tmp_path)
    assert found.taken == 6 and not found.refused

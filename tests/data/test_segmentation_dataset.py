"""Training samples of segmentation: image and class map stay aligned, small images are padded, scales are drawn."""

import numpy as np
import pytest
from made_segmentation import CLASSES, colored, write_colors

from depth_anything.classes import make_class_table, paint_classes, parse_class_table, table_to_list
from depth_anything.data.class_maps import decode_classes, encode_classes, map_labels
from depth_anything.data.reader import Records
from depth_anything.data.segmentation_dataset import PADDING, SegmentationDataset
from depth_anything.data.shards import open_set


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colors") / "colors"
    write_colors(folder)
    return folder


def dataset(root, **changes):
    options = {"seed": 3, "streams": 2, "image_size": 28, "short_side": None, **changes}
    return SegmentationDataset([Records(open_set(root))], **options)


def test_image_and_classes_show_the_same_pixels(root):
    batch = dataset(root).__getitems__(list(range(20)))
    target = batch["target"].numpy()
    assert target.dtype == np.uint8 and target.shape == (20, 28, 28)
    np.testing.assert_array_equal(batch["image"].numpy(), colored(target))  # not resized: exact colors
    np.testing.assert_array_equal(batch["valid"].numpy(), target != 255)
    assert len({target[n].tobytes() for n in range(20)}) > 10


def test_scales_are_drawn_per_sample_and_stay_between_the_limits(root):
    data = dataset(root, scale_jitter=(0.5, 2.0), image_size=14)
    sides = [min(data._resized_shape((36, 48), n)) for n in range(200)]
    assert min(sides) < 22 and max(sides) > 66 and min(sides) >= 18 and max(sides) <= 72
    batch, again = data.__getitems__([5, 6]), data.__getitems__([6])
    assert (batch["image"][1] == again["image"][0]).all() and (batch["target"][1] == again["target"][0]).all()
    # Pixels far from edges keep their color at any scale.
    image, target = batch["image"].numpy().astype(int), batch["target"].numpy()
    close = np.abs(image - colored(target)).max(-1) < 60
    assert close[target != 255].mean() > 0.7


def test_an_image_smaller_than_the_crop_is_padded_and_the_rest_ignored(root):
    batch = dataset(root, image_size=70).__getitems__([0, 1])
    target, image = batch["target"].numpy(), batch["image"].numpy()
    for n in range(2):
        outside = (image[n] == PADDING).all(-1)
        assert outside.sum() == 70 * 70 - 36 * 48 and (target[n][outside] == 255).all()


def test_a_bad_record_is_replaced_and_reported(tmp_path):
    write_colors(tmp_path / "set", count=4, per_shard=4)
    tar = next((tmp_path / "set").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    at = data.index(b"\x89PNG")
    data[at + 40] ^= 1
    tar.write_bytes(data)
    found = dataset(tmp_path / "set", streams=1)
    failed = [failure for n in range(4) for failure in found[n]["failed"]]
    assert len(failed) == 1 and "set/00000" in failed[0]


def test_tables_and_maps_survive_the_round_trip():
    found = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(decode_classes(encode_classes(found)), found)
    assert parse_class_table(table_to_list(CLASSES)) == CLASSES
    colors = {row.color for row in make_class_table([f"c{n}" for n in range(150)])}
    assert len(colors) == 150
    assert paint_classes(np.array([[0, 255]], np.uint8), CLASSES).tolist() == [[[255, 0, 0], [0, 0, 0]]]


def test_a_number_that_is_no_class_is_named():
    with pytest.raises(ValueError, match="9"):
        map_labels(np.array([[1, 9]]), {1: 0})

"""Cityscapes, ADE20K and a user's own sets become class maps with the right numbers."""

import numpy as np
import pytest
from made_segmentation import (
    CITYSCAPES_TRAIN_IDS,
    CLASSES,
    class_map,
    colored,
    make_ade20k,
    make_cityscapes,
    save,
)

from depth_anything.classes import read_class_table
from depth_anything.cli import main
from depth_anything.data.shards import open_set
from depth_anything.evaluation.frames import read_frames
from depth_anything.ingest.custom_segmentation import load_segmentation_declaration
from depth_anything.ingest.sets import ade20k, cityscapes


def frames_of(root):
    return {frame.meta["name"]: frame for frame in read_frames(root)}


def test_cityscapes_becomes_the_benchmarks_19_classes(tmp_path, capsys):
    truth = make_cityscapes(tmp_path / "raw")
    assert main(["shard", "cityscapes", str(tmp_path / "raw"), str(tmp_path / "set")]) == 0
    found = frames_of(tmp_path / "set")
    assert sorted(found) == sorted(truth)
    for name, ids in truth.items():
        expected = np.array(CITYSCAPES_TRAIN_IDS, np.uint8)[ids]
        np.testing.assert_array_equal(found[name].classes, expected)
        assert found[name].image.shape == (16, 32, 3) and found[name].depth is None
    manifest = open_set(tmp_path / "set")
    table = read_class_table(manifest.meta, "set")
    assert [row.name for row in table][::6] == ["road", "traffic light", "rider", "bicycle"] and len(
        table
    ) == 19
    assert manifest.meta["quantity"] == "classes" and "sky_policy" not in manifest.meta
    assert manifest.meta["pixels"]["valid"] + manifest.meta["pixels"]["ignored"] == 2 * 16 * 32
    assert main(["verify", "--decode", str(tmp_path / "set")]) == 0
    assert main(["stats", str(tmp_path / "set"), "--output", str(tmp_path / "stats.png")]) == 0
    assert main(["view", str(tmp_path / "set"), "--output", str(tmp_path / "sheet.png")]) == 0
    shares = [line for line in capsys.readouterr().out.splitlines() if line.startswith("classes:")]
    assert len(shares) == 1 and "ignored" in shares[0] and "bicycle" in shares[0]


def test_a_bad_frame_of_cityscapes_does_not_take_the_others_along(tmp_path):
    make_cityscapes(tmp_path / "raw", frames=5)
    masks = sorted((tmp_path / "raw" / "gtFine").rglob("*labelIds.png"))
    masks[0].write_bytes(masks[0].read_bytes()[:-30])
    masks[1].unlink()
    save(masks[2], np.zeros((8, 8), np.uint8))
    save(masks[3], np.full((16, 32), 40, np.uint8))  # 40 is no label
    assert main(["shard", "cityscapes", str(tmp_path / "raw"), str(tmp_path / "set")]) == 0
    skipped = open_set(tmp_path / "set").meta["skipped"]
    assert skipped["count"] == 4 and len(frames_of(tmp_path / "set")) == 1
    assert any("40" in reason for reason in skipped["reasons"])


def test_withheld_labels_and_255_are_ignored(tmp_path):
    make_cityscapes(tmp_path / "raw", split="test", frames=1)
    path = next((tmp_path / "raw").rglob("*labelIds.png"))
    stored = np.full((16, 32), 255, np.uint8)
    stored[0] = 7
    save(path, stored)
    (line,) = cityscapes.find(tmp_path / "raw", split="test")
    read = cityscapes.read(tmp_path / "raw", line).classes
    assert (read[0] == 0).all() and (read[1:] == 255).all()
    with pytest.raises(ValueError, match="holds|hold"):
        list(cityscapes.find(tmp_path / "raw", split="val"))


def test_ade20k_becomes_150_classes_and_zero_is_ignored(tmp_path):
    truth = make_ade20k(tmp_path / "raw", split="validation", frames=3)
    command = ["shard", "ade20k", str(tmp_path / "raw"), str(tmp_path / "set"), "--split", "validation"]
    assert main(command) == 0
    found = frames_of(tmp_path / "set")
    for name, stored in truth.items():
        expected = np.where(stored == 0, 255, stored.astype(int) - 1)
        np.testing.assert_array_equal(found[name].classes, expected)
        assert found[name].image.shape == (20, 30, 3)  # also the gray photograph
    assert [row.name for row in ade20k.INFO.classes][:3] == ["wall", "building", "sky"]
    assert ade20k.INFO.classes[149].name == "flag"


def test_short_side_resizes_image_and_classes_alike(tmp_path):
    make_cityscapes(tmp_path / "raw", frames=1, size=(32, 64))
    command = ["shard", "cityscapes", str(tmp_path / "raw"), str(tmp_path / "set"), "--short-side", "28"]
    assert main(command) == 0
    (frame,) = frames_of(tmp_path / "set").values()
    assert frame.image.shape[:2] == frame.classes.shape == (28, 56)


def write_own(folder, yaml, *, masks):
    for name, stored in masks.items():
        save(folder / "photos" / f"{name}.png", colored(class_map(1)))
        save(folder / "masks" / f"{name}.png", stored)
    (folder / "own.yaml").write_text(yaml)
    return folder / "own.yaml"


def test_an_own_set_with_several_numbers_a_class(tmp_path):
    found = class_map(3)
    stored = np.array([7, 9, 26] + [0] * 252 + [0], np.uint8)[found]
    stored[5, 5] = 8
    yaml = "images: photos\nmasks: masks\nclasses: {red: [7, 8], green: 9, blue: 26}\nignore: 0\nlicence: CC0-1.0\n"
    path = write_own(tmp_path, yaml, masks={"a": stored, "b": np.full((36, 48), 3, np.uint8)})
    assert main(["shard", "custom-segmentation", str(path), str(tmp_path / "set")]) == 0
    (frame,) = frames_of(tmp_path / "set").values()
    found[5, 5] = 0
    np.testing.assert_array_equal(frame.classes, found)
    meta = open_set(tmp_path / "set").meta
    assert meta["licence"] == "CC0-1.0" and "3" in next(iter(meta["skipped"]["reasons"]))


def test_an_own_set_whose_masks_are_colors(tmp_path):
    found = class_map(4)
    yaml = (
        "images: photos/{stem}.png\nmasks: masks/{stem}.png\nclasses: [red, green, blue]\nvalues: colors\n"
        "colors: {red: [255, 0, 0], green: [0, 255, 0], blue: [0, 0, 255]}\nignore: [[0, 0, 0]]\n"
    )
    path = write_own(tmp_path, yaml, masks={"a": colored(found)})
    assert main(["shard", "custom-segmentation", str(path), str(tmp_path / "set")]) == 0
    (frame,) = frames_of(tmp_path / "set").values()
    np.testing.assert_array_equal(frame.classes, found)
    assert read_class_table(open_set(tmp_path / "set").meta, "set") == CLASSES


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("clases: [a]", "classes"),
        ("classes: [a, a]", "a"),
        ("classes: {a: 1, b: 1}", "1"),
        ("classes: {a: -1}", "-1"),
        ("classes: [a]\nignore: 0", "a"),
        ("classes: [a]\nvalues: colors", "colors"),
        ("classes: [a]\ncolors: {b: [1, 2, 3]}", "b"),
        ("classes: [a]\ncolors: {a: [1, 2, 300]}", "300"),
        ("classes: []", "0 classes"),
    ],
)
def test_mistakes_in_a_declaration_are_named(tmp_path, change, named):
    (tmp_path / "own.yaml").write_text(f"images: photos\nmasks: masks\n{change}\n")
    with pytest.raises(ValueError, match=named) as error:
        load_segmentation_declaration(tmp_path / "own.yaml")
    assert "own.yaml" in str(error.value)

"""The sets of V1 that V2 does not use: DIML, HR-WSI, MegaDepth."""

import cv2
import numpy as np
import pytest
from made_raw import frames_of, hdf5, make_diml, make_hrwsi, make_megadepth, png

from depth_anything.ingest.sets import diml, hrwsi, megadepth


def test_diml_is_in_millimeters_and_low_confidence_is_invalid(tmp_path):
    truth = make_diml(tmp_path)
    found = frames_of(diml, tmp_path)
    assert list(found) == sorted(truth)
    for name, frame in found.items():
        np.testing.assert_allclose(frame.depth, truth[name], rtol=1e-7)
        assert frame.meta["unit"] == "m" and "sky" not in frame.meta
    street = found["outdoor/170721_C0/A/0001"].depth
    assert np.isnan(street[:4]).all() and np.isnan(street[5, 0]) and np.isfinite(street[5, 1])


def test_the_sample_edition_of_diml_is_read(tmp_path):
    """Other folder names, and a suffix of two words; depth_raw, with holes, is not read."""
    truth = make_diml(tmp_path)
    for place in list((tmp_path / "indoor").rglob("up_png")):
        place.with_name("depth_raw").mkdir()
        for path in place.iterdir():
            stem = path.name.removesuffix("_ud.png")
            (place.with_name("depth_raw") / f"{stem}_depth_raw.png").write_bytes(path.read_bytes())
            path.rename(place / f"{stem}_depth_filled.png")
        place.rename(place.with_name("depth_filled"))
        place.with_name("col").rename(place.with_name("color"))
    (tmp_path / "indoor" / "1. Cafe" / "160225" / "1" / "color" / ".DS_Store").write_bytes(b"Bud1")
    found = frames_of(diml, tmp_path)
    assert list(found) == sorted(truth)
    for name, frame in found.items():
        np.testing.assert_allclose(frame.depth, truth[name], rtol=1e-7)


def test_outdoor_diml_without_confidence_is_rejected(tmp_path):
    make_diml(tmp_path)
    next(tmp_path.rglob("0001_conf.png")).unlink()
    png(next(tmp_path.rglob("0002_conf.png")), np.full((4, 4), 255, np.uint8))
    reasons = [frame for frame in frames_of(diml, tmp_path).values() if isinstance(frame, str)]
    assert "its confidence is missing" in reasons[0] and "its confidence has the shape (4, 4)" in reasons[1]


@pytest.mark.parametrize("bits", [8, 16])
def test_hrwsi_disparity_is_stored_unchanged_inside_its_mask(tmp_path, bits):
    truth = make_hrwsi(tmp_path, bits=bits)
    found = frames_of(hrwsi, tmp_path, split="all")
    assert list(found) == sorted(truth)
    for name, frame in found.items():
        np.testing.assert_array_equal(frame.disparity, truth[name].astype(np.float32))
        assert np.isnan(frame.disparity[:2]).all()  # masked
        assert (frame.disparity[2:4] == 0).all() and frame.meta["sky"] == "zero"  # farthest, and known
        assert np.nanmax(frame.disparity) == np.nanmax(truth[name]) > 2 ** (bits - 1)


def test_the_splits_of_hrwsi(tmp_path):
    make_hrwsi(tmp_path)
    assert [line.split("\t")[0] for line in hrwsi.find(tmp_path)] == ["train/aa_1", "train/bb.2"]
    assert [line.split("\t")[0] for line in hrwsi.find(tmp_path, split="val")] == ["val/cc"]
    with pytest.raises(ValueError, match="split=test .*train, val, all"):
        list(hrwsi.find(tmp_path, split="test"))


def test_hrwsi_without_a_mask_is_rejected(tmp_path):
    make_hrwsi(tmp_path)
    next(tmp_path.rglob("train/valid_masks/aa_1.png")).unlink()
    png(next(tmp_path.rglob("train/valid_masks/bb.2.png")), np.zeros((4, 4), np.uint8))
    reasons = list(frames_of(hrwsi, tmp_path).values())
    assert "its mask is missing" in reasons[0] and "its mask has the shape (4, 4)" in reasons[1]


def test_megadepth_is_stored_unchanged_and_ordinal_maps_are_rejected(tmp_path):
    truth = make_megadepth(tmp_path)
    found = frames_of(megadepth, tmp_path)
    assert list(found) == sorted(truth)
    for name, frame in found.items():
        if truth[name] is None:
            assert isinstance(frame, str) and "ordinal" in frame
        else:
            np.testing.assert_array_equal(frame.depth, truth[name].astype(np.float32))
            assert np.isnan(frame.depth[:9]).all() and frame.meta["unit"] == "arbitrary"


def test_megadepth_with_an_ambiguous_image_is_rejected(tmp_path):
    make_megadepth(tmp_path)
    path = next(tmp_path.rglob("0000/dense0/imgs/1_o.jpg"))
    assert cv2.imwrite(str(path.with_suffix(".png")), cv2.imread(str(path)))
    reasons = frames_of(megadepth, tmp_path)["0000/dense0/1_o"]
    assert isinstance(reasons, str) and "several files" in reasons
    hdf5(next(tmp_path.rglob("0000/dense0/depths/2_b.h5")), np.ones((36, 48)), key="depths")
    assert 'no dataset "depth"' in frames_of(megadepth, tmp_path)["0000/dense0/2_b"]

import cv2
import numpy as np
import pytest
from made_raw import exr, frames_of, make_irs

from depth_anything.ingest.sets import irs


@pytest.mark.parametrize("channels", ["RGB", "G", "Y"])
def test_disparity_is_stored_unchanged(tmp_path, channels):
    truth = make_irs(tmp_path, channels=channels)
    found = frames_of(irs, tmp_path)
    assert list(found) == sorted(truth)
    for name, frame in found.items():
        assert frame.depth is None
        np.testing.assert_array_equal(frame.disparity, truth[name].astype(np.float32))
        assert frame.meta["unit"] == "px" and frame.meta["intrinsics"]["fx"] == 480


def test_bad_disparity_and_disparity_beyond_200_m_are_invalid(tmp_path):
    make_irs(tmp_path)
    for frame in frames_of(irs, tmp_path).values():
        assert np.isnan(frame.disparity[0, :4]).all()  # 0, negative, no number, infinite
        assert np.isnan(frame.disparity[1, [0, 2]]).all() and frame.disparity[1, 1] == 0.25
        assert np.isnan(frame.disparity).sum() == 6
        assert "sky" not in frame.meta


def test_half_precision_is_stored_exactly(tmp_path):
    make_irs(tmp_path)
    path = next(tmp_path.rglob("d_00001.exr"))
    stored = np.linspace(0.5, 200, 36 * 48, dtype=np.float32).reshape(36, 48).astype(np.float16)
    exr(path, {"G": stored})
    frame = frames_of(irs, tmp_path)[path.parent.relative_to(tmp_path).as_posix() + "/00001"]
    np.testing.assert_array_equal(frame.disparity, stored.astype(np.float32))


def test_the_left_image_is_stored_unchanged(tmp_path):
    make_irs(tmp_path)
    for line in irs.find(tmp_path):
        image = line.split("\t")[1]
        assert "/l_" in image and irs.read(tmp_path, line).image == (tmp_path / image).read_bytes()


def test_the_first_edition_has_numbers_without_leading_zeros(tmp_path):
    make_irs(tmp_path / "IRSDataset")
    for path in [*tmp_path.rglob("*_0000?.*")]:
        path.rename(path.with_name(path.name.replace("0000", "196")))
    found = frames_of(irs, tmp_path)
    assert list(found)[0] == "IRSDataset/Home/ArchVizInterior03Data/1961"
    assert all(frame.disparity is not None for frame in found.values())


def test_a_disparity_of_another_size_is_rejected(tmp_path):
    make_irs(tmp_path)
    exr(next(tmp_path.rglob("d_00001.exr")), {"G": np.ones((18, 24), np.float32)})
    reasons = [frame for frame in frames_of(irs, tmp_path).values() if isinstance(frame, str)]
    assert reasons == ["its image has 48 x 36 pixels, its disparity 24 x 18"]


def test_channels_that_differ_are_rejected(tmp_path):
    make_irs(tmp_path)
    ones = np.ones((36, 48), np.float32)
    exr(next(tmp_path.rglob("d_00001.exr")), {"R": ones, "G": ones * 2, "B": ones})
    reasons = [frame for frame in frames_of(irs, tmp_path).values() if isinstance(frame, str)]
    assert len(reasons) == 1 and "several channels" in reasons[0]


def test_depth_is_48_over_disparity(tmp_path):
    """Of a wall 6 m away, with the cameras 0.1 m apart and 480 px of focal length, as the set's makers say."""
    make_irs(tmp_path)
    frame = frames_of(irs, tmp_path)["Home/ArchVizInterior03Data/00001"]
    assert 48 / frame.disparity[18, 40] == pytest.approx(6, rel=1e-6)
    assert cv2.imread(str(tmp_path / "Home/ArchVizInterior03Data/l_00001.png")) is not None

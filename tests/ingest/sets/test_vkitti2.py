import cv2
import numpy as np
import pytest
from made_raw import frames_of, make_vkitti2

from depth_anything.ingest.sets import vkitti2


@pytest.mark.parametrize("apart", [False, True])
def test_depth_is_in_centimeters_and_the_far_plane_is_sky(tmp_path, apart):
    truth = make_vkitti2(tmp_path, apart=apart)
    found = frames_of(vkitti2, tmp_path, camera="both")
    assert list(found) == sorted(truth)
    for name, frame in found.items():
        np.testing.assert_allclose(frame.depth, truth[name], rtol=1e-7)  # of a float32
        assert np.isinf(frame.depth[:5]).all() and frame.meta["sky"] == "inf"
        assert frame.depth[5, 5] == np.float32(655.34)
        assert np.isnan(frame.depth[6, 6])
        hundredths = frame.depth[np.isfinite(frame.depth)].astype(np.float64) * 100
        assert np.abs(hundredths - np.round(hundredths)).max() < 1e-2  # the quantum is a centimetre
        assert frame.meta["intrinsics"] == {"fx": 725.0087, "fy": 725.0087, "cx": 620.5, "cy": 187.0}


def test_the_left_camera_is_read_by_default(tmp_path):
    make_vkitti2(tmp_path)
    left = [line.partition("\t")[0] for line in vkitti2.find(tmp_path)]
    assert len(left) == 4 and all("/Camera_0/" in name for name in left)
    assert len(list(vkitti2.find(tmp_path, camera="1"))) == 4
    assert len(list(vkitti2.find(tmp_path, camera="both"))) == 8
    with pytest.raises(ValueError, match="camera=2 .*0, 1, both"):
        list(vkitti2.find(tmp_path, camera="2"))


def test_8_bit_depth_is_rejected(tmp_path):
    """A copy that some program has converted: its values would be 256 times too small."""
    make_vkitti2(tmp_path)
    path = next(tmp_path.rglob("Camera_0/depth_00000.png"))
    stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(path), (stored // 256).astype(np.uint8))
    reasons = [frame for frame in frames_of(vkitti2, tmp_path).values() if isinstance(frame, str)]
    assert len(reasons) == 1 and "8 bits" in reasons[0]


def test_a_flipped_bit_is_detected(tmp_path):
    make_vkitti2(tmp_path)
    path = next(tmp_path.rglob("Camera_0/depth_00000.png"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    reasons = [frame for frame in frames_of(vkitti2, tmp_path).values() if isinstance(frame, str)]
    assert len(reasons) == 1 and "damaged" in reasons[0]

import io

import cv2
import numpy as np
import pytest
from made_raw import frames_of, make_tartanair2
from PIL import Image

from depth_anything.ingest.sets import tartanair2


def test_depth_equals_that_of_the_authors_reader(tmp_path):
    truth = make_tartanair2(tmp_path)
    found = frames_of(tartanair2, tmp_path, camera="all")
    assert list(found) == sorted(truth)
    for name, frame in found.items():
        np.testing.assert_array_equal(frame.depth, truth[name].astype(np.float32))
        _, camera, number = name.rsplit("/", 2)
        path = tmp_path / f"AbandonedCable/Data_easy/P000/depth_{camera}/{number}_{camera}_depth.png"
        theirs = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).view("<f4")[..., 0]
        known = np.isfinite(frame.depth)
        np.testing.assert_array_equal(frame.depth[known], theirs[known])
        assert np.isinf(frame.depth[:6]).all() and frame.meta["sky"] == "inf"


def test_swapping_red_and_blue_would_give_other_values(tmp_path):
    """The trap: what Pillow shows, viewed as it is, looks like depth, and is not."""
    make_tartanair2(tmp_path)
    data = next(tmp_path.rglob("*_depth.png")).read_bytes()
    naive = np.asarray(Image.open(io.BytesIO(data))).copy().view("<f4")[..., 0]
    ours = tartanair2.decode_depth(data)
    assert (np.abs(naive - ours) > 1e-4 * ours)[6:].mean() > 0.5


def test_every_bit_of_a_float_is_decoded():
    rng = np.random.Generator(np.random.Philox(1))
    bits = rng.integers(0, 2**32, (9, 7), dtype=np.uint32)
    bits[0, :4] = np.array([np.nan, np.inf, -0.0, 1e-40], "<f4").view(np.uint32)
    data = cv2.imencode(".png", bits[..., None].view(np.uint8))[1].tobytes()
    np.testing.assert_array_equal(tartanair2.decode_depth(data).view(np.uint32), bits)


def test_one_camera_is_read_by_default(tmp_path):
    make_tartanair2(tmp_path)
    names = [line.partition("\t")[0] for line in tartanair2.find(tmp_path)]
    assert names == [f"AbandonedCable/Data_easy/P000/lcam_front/00000{n}" for n in (0, 1)]
    back = [line.partition("\t")[0] for line in tartanair2.find(tmp_path, camera="rcam_back")]
    assert len(back) == 2 and all("/rcam_back/" in name for name in back)
    with pytest.raises(ValueError, match="camera=front .*lcam_front"):
        list(tartanair2.find(tmp_path, camera="front"))


def test_all_means_the_twelve_pinhole_cameras(tmp_path):
    """Fisheye, panorama and user-defined cameras have similar names and are not read."""
    others = ("lcam_fish", "rcam_fish", "lcam_equirect", "lcam_custom0_pinhole", "lcam_fronts", "ccam_front")
    truth = make_tartanair2(tmp_path, cameras=(*tartanair2.CAMERAS, *others))
    names = {line.partition("\t")[0] for line in tartanair2.find(tmp_path, camera="all")}
    assert names == {name for name in truth if name.split("/")[3] in tartanair2.CAMERAS} and len(names) == 24


def small(mode):
    out = io.BytesIO()
    Image.new(mode, (48, 36)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        small("RGB"),
        small("I;16"),
        small("RGBA")[:-30],
        cv2.imencode(".png", np.full((36, 48, 4), 16544, np.uint16))[1].tobytes(),  # Pillow calls it RGBA
    ],
)
def test_other_pngs_are_rejected(tmp_path, data):
    make_tartanair2(tmp_path, cameras=("lcam_front",))
    next(tmp_path.rglob("000000_lcam_front_depth.png")).write_bytes(data)
    reason = frames_of(tartanair2, tmp_path)["AbandonedCable/Data_easy/P000/lcam_front/000000"]
    assert isinstance(reason, str) and "PNG" in reason


def test_a_flipped_bit_is_detected():
    """Pillow looks at no checksum of pixels: a few of these decode to other numbers."""
    depth = np.linspace(1, 50, 24 * 32, dtype="<f4").reshape(24, 32)
    data = cv2.imencode(".png", depth[..., None].view(np.uint8))[1].tobytes()
    for bit in range(8 * 41, 8 * (len(data) - 12), 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="PNG"):
            tartanair2.decode_depth(bytes(damaged))

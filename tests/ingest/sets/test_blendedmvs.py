import numpy as np
import pytest
from made_raw import frames_of, make_blendedmvs

from depth_anything.ingest.sets import blendedmvs


def test_depth_is_stored_unchanged_with_the_first_row_on_top(tmp_path):
    truth = make_blendedmvs(tmp_path)
    found = frames_of(blendedmvs, tmp_path)
    assert list(found) == sorted(truth)
    for name, frame in found.items():
        np.testing.assert_array_equal(frame.depth, truth[name].astype(np.float32))


def test_holes_are_invalid_and_not_sky(tmp_path):
    make_blendedmvs(tmp_path)
    for frame in frames_of(blendedmvs, tmp_path).values():
        assert np.isnan(frame.depth[:5, :7]).all()  # 0
        assert np.isnan(frame.depth[[6, 7, 8], [6, 7, 8]]).all()  # negative, no number, infinite
        assert np.isfinite(frame.depth).sum() == frame.depth.size - 38
        assert "sky" not in frame.meta
    assert blendedmvs.INFO.sky == "invalid"


def test_the_unit_is_arbitrary_and_intrinsics_come_from_cam_txt(tmp_path):
    make_blendedmvs(tmp_path)
    for frame in frames_of(blendedmvs, tmp_path).values():
        assert frame.meta["unit"] == "arbitrary"
        assert frame.meta["intrinsics"] == {"fx": 40.5, "fy": 40.25, "cx": 23.5, "cy": 17.5}


def test_masked_images_are_not_read(tmp_path):
    truth = make_blendedmvs(tmp_path)
    lines = list(blendedmvs.find(tmp_path))
    assert len(lines) == len(truth) and "masked" not in "".join(lines)
    name, image, _ = lines[0].split("\t")
    assert blendedmvs.read(tmp_path, lines[0]).image == (tmp_path / image).read_bytes()


@pytest.mark.parametrize(
    "camera",
    [
        None,
        "",
        "intrinsic\n1 2",
        "intrinsic\nx 0 0 0 1 0 0 0 1",
        "intrinsic\nnan 0 3 0 4 5 0 0 1",
        "\udce4",
    ],
)
def test_a_frame_without_a_camera_is_accepted(tmp_path, camera):
    make_blendedmvs(tmp_path, scenes=("5a3ca9cb270f0e3f14d0eddb",), frames=1)
    path = next(tmp_path.rglob("*_cam.txt"))
    path.unlink() if camera is None else path.write_text(camera, errors="surrogateescape")
    (frame,) = frames_of(blendedmvs, tmp_path).values()
    assert frame.depth is not None and "intrinsics" not in frame.meta


def test_an_empty_map_is_rejected(tmp_path):
    make_blendedmvs(tmp_path, frames=1)
    path = next(tmp_path.rglob("*.pfm"))
    data = path.read_bytes()
    path.write_bytes(data[: -36 * 48 * 4] + bytes(36 * 48 * 4))
    found = frames_of(blendedmvs, tmp_path)
    assert [frame for frame in found.values() if isinstance(frame, str)] == [
        "no pixel of its label is valid: 1728 zero"
    ]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Pf"),
        (b"Pf\n48 36\n-1.0\n" + bytes(100), "damaged"),
        (b"PF\n48 36\n-1.0\n" + bytes(36 * 48 * 12), "three channels"),
        (b"Pf\n36 48\n-1.0\n" + bytes(36 * 48 * 4), "its image has 48 x 36 pixels, its depth 36 x 48"),
        (b"Pf\n99999999 99999999\n-1.0\n", "32768"),
    ],
)
def test_damaged_depth_is_rejected_with_a_reason(tmp_path, data, reason):
    make_blendedmvs(tmp_path, frames=1, scenes=("5a3ca9cb270f0e3f14d0eddb",))
    next(tmp_path.rglob("*.pfm")).write_bytes(data)
    (reasons,) = frames_of(blendedmvs, tmp_path).values()
    assert isinstance(reasons, str) and reason in reasons


def test_a_single_scene_and_a_folder_above_all_scenes_are_accepted(tmp_path):
    make_blendedmvs(tmp_path / "BlendedMVS" / "low")
    names = [line.partition("\t")[0] for line in blendedmvs.find(tmp_path)]
    assert names[0] == "BlendedMVS/low/5a3ca9cb270f0e3f14d0eddb/00000000"
    alone = [*blendedmvs.find(tmp_path / "BlendedMVS/low/5a3ca9cb270f0e3f14d0eddb")]
    assert [line.split("\t")[0] for line in alone] == ["00000000", "00000001"]
